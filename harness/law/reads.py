"""What each tool was measured to read: the committed table, and how a file's layers tell its architecture.

`reads.json` is written by `python -m benchmarks.reads`, which runs the tools' own code on a tiny model of every
architecture; a row says what each layer got under one spelling of keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

TABLE = Path(__file__).with_name("reads.json")
_BLOCK = re.compile(r"\D*\d+(?=_)")
_NUMBER = re.compile(r"_\d+(?=_|$)")
Place: TypeAlias = tuple[str, str]
"""Architecture, and whose names its layers have there: the model's `own`, the authors' `original`, or `sgm`."""
Effect = Literal["law", "factor", "drops", "nothing", "raises", "hangs", "wrong", "unknown"]


@dataclass(frozen=True)
class Reading:
    """What became of a file's modules: the effect, a sentence, and for `factor` how many times too strong.

    `law` means strength * alpha / rank on every module; `factor` without a number differs between modules.
    """

    effect: Effect
    what: str = ""
    factor: float | None = None
    alpha_ignored: bool = False


_AS_TRAINED = Reading("law")
_UNSET = Reading(
    "wrong", "puts factors into the layers and never sets them: what they add is an error, or whatever memory holds"
)


@cache
def pattern_of(name: str) -> str:
    """Return a module's name with `_` for dots and `#` for numbers, whether the file flattens its names or not."""
    return _NUMBER.sub("_#", f"_{name.replace('.', '_')}")[1:]


def block_of(name: str) -> str:
    """Return the name of the block that a layer is in, up to its first number, with `_` for dots."""
    found = _BLOCK.match(flat := name.replace(".", "_"))
    return found[0] if found else flat


@cache
def _table() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


@cache
def _rows() -> dict[tuple[str, str, str, str], Mapping[str, Any]]:
    return {(row["tool"], row["family"], row["names"], row["scheme"]): row for row in _table()["rows"]}


@cache
def _layers() -> dict[Place, frozenset[str]]:
    every: Mapping[str, Mapping[str, list[str]]] = _table()["layers"]
    return {(family, names): frozenset(each) for family, by in every.items() for names, each in by.items()}


LABELS = {
    "ok": "as trained", "nothing": "nothing loaded", "raises": "raises", "hangs": "hangs",
    "alpha ignored": "alpha ignored", "magnitudes ignored": "magnitudes ignored",
    "weights never set": "weights never set",
    "partly": "some layers only", "depends": "depends on the layers",
}  # fmt: skip


def every_row() -> list[Mapping[str, Any]]:
    """Return what was measured: tool, release, family, names, scheme and what becomes of one and of several scales."""
    rows: list[Mapping[str, Any]] = _table()["rows"]
    return rows


def kind_of(outcome: Any) -> str:
    """Return the key of LABELS for what was measured of a spelling."""
    if isinstance(outcome, str):
        return outcome
    if "all" in outcome:
        return "depends"
    return next((kind for kind in ("raises", "hangs") if kind in outcome), "partly")


def measured_on() -> str:
    """Return the date of the table."""
    return str(_table()["measured"])


def release_of(tool: str) -> str | None:
    """Return the release of `tool` that was measured."""
    return next((row["release"] for row in _table()["rows"] if row["tool"] == tool), None)


def places_of(patterns: Iterable[str]) -> tuple[Place, ...]:
    """Return every measured architecture that has all layers of a file, given as patterns, with whose names."""
    wanted = frozenset(patterns)
    return tuple(place for place, layers in _layers().items() if wanted and wanted <= layers)


def title_of(family: str) -> str:
    """Return what people call an architecture."""
    return str(_table()["titles"].get(family, family))


def layers_of(place: Place) -> frozenset[str]:
    """Return the layers of an architecture under these names, as patterns."""
    return _layers().get(place, frozenset())


def has_other_names(family: str) -> bool:
    """Tell whether the authors of an architecture call its layers otherwise than diffusers does."""
    return len(_table()["layers"].get(family, ())) > 1


def reading(tool: str, place: Place, scheme: str, counts: Mapping[str, int], *, mixed: bool) -> Reading | None:
    """Return what `tool` makes of a file whose keys are spelled as `scheme`, on one architecture; None: not measured.

    `counts` has the file's layer patterns with the number of modules of each; `mixed`: several ranks or alphas.
    """
    row = _rows().get((tool, *place, scheme))
    if row is None:
        return None
    outcome = row.get("mixed", row["uniform"]) if mixed else row["uniform"]
    if not isinstance(outcome, dict) or "all" not in outcome:
        return _read(outcome, counts)
    if _each_by_itself(outcome):
        return _read(outcome["all"], counts)
    parts = _parts({p: number / _in_one_block(place, p) for p, number in counts.items()}, layers_of(place))
    found = [_read(outcome[part], counts) for part in parts if part in outcome]
    if not found or len({(each.effect, each.factor, each.alpha_ignored) for each in found}) > 1:
        seen = "; ".join(f"{name}: {_read(each, counts).what or 'as trained'}" for name, each in outcome.items())
        return Reading("unknown", f"depends on which modules of the model a file has ({seen[:300]})")
    return found[0]


def _each_by_itself(outcome: Mapping[str, Any]) -> bool:
    """Tell whether what becomes of a layer does not hang on the others: the same are dropped whichever are there."""
    if not {"blocks", "half"} <= outcome.keys() or not all(
        each == "ok" or (isinstance(each, dict) and each.keys() <= {"dropped"}) for each in outcome.values()
    ):
        return False
    lost = {part: set() if each == "ok" else set(each["dropped"]) for part, each in outcome.items()}
    same = all(
        lost[p] == {name for name in lost["all"] if in_part(p, name)} for p in lost if p in ("blocks", "attention")
    )
    return same and lost.get("half", set()) <= lost["all"]


def knows_magnitudes(tool: str, kind: str) -> bool:
    """Tell whether `tool` applied magnitudes of a `kind` (`out`, `in`, `vector`) somewhere, or was never asked to."""
    seen = [row["uniform"] for row in _table()["rows"] if row["tool"] == tool and row["scheme"].endswith(f"+{kind}")]
    return not seen or "ok" in seen


_BLOCKS = re.compile(r"(blocks|layers|refiner|resnets|attentions)_#")


def in_part(part: str, pattern: str) -> bool:
    """Tell whether a layer is in a part of the model that people train: `all`, its `blocks`, `attention`."""
    return part == "all" or bool(_BLOCKS.search(pattern) and (part == "blocks" or "att" in pattern))


def _in_one_block(place: Place, pattern: str) -> int:
    """Return how many layers of a block have this pattern, such as `ffn.0` and `ffn.2`."""
    family, names = place
    return int(_table().get("several", {}).get(family, {}).get(names, {}).get(pattern, 1))


def _parts(blocks: Mapping[str, float], layers: frozenset[str]) -> tuple[str, ...]:
    """Return which part of the model the file has in full; with another choice of layers, the parts that tell of it.

    `blocks` has the file's layer patterns with the number of blocks that they fill.
    """
    inside = all(in_part("blocks", pattern) for pattern in blocks)
    others = ("blocks", "attention", "half") if inside else ("all", "half")
    by_stack: dict[str, set[float]] = {}
    for pattern, number in blocks.items():
        by_stack.setdefault(pattern.partition("#")[0], set()).add(number)
    if any(len(each) > 1 for each in by_stack.values()):
        return others  # some blocks have layers that others lack
    parts = {part: {name for name in layers if in_part(part, name)} for part in ("all", "blocks", "attention")}
    return next(((part,) for part, names in parts.items() if names == set(blocks)), others)


def _read(outcome: Any, counts: Mapping[str, int]) -> Reading:
    if outcome == "ok":
        return _AS_TRAINED
    if outcome == "nothing":
        return Reading("nothing", "loads none of its modules, without an error")
    if outcome == "alpha ignored":
        return Reading("factor", "ignores alpha: every module is applied at scale 1", alpha_ignored=True)
    if outcome == "magnitudes ignored":
        return Reading("drops", "ignores the magnitudes of DoRA: a plain LoRA is applied")
    if outcome == "weights never set":
        return _UNSET
    if "raises" in outcome or "hangs" in outcome:
        effect: Effect = "raises" if "raises" in outcome else "hangs"
        return Reading(effect, f"{effect}, on a small model: {outcome[effect].rstrip(': ')}")
    return _partly(outcome, counts)


def dropped(lost: Sequence[str], counts: Mapping[str, int]) -> Reading:
    """Return the reading of a file whose layers of these patterns are left out."""
    number, total = sum(counts[pattern] for pattern in lost), sum(counts.values())
    what = f"drops {number} of {total} modules, such as {lost[0]}"
    return Reading("nothing" if number == total else "drops", what)


def _partly(outcome: Mapping[str, Any], counts: Mapping[str, int]) -> Reading:
    if lost := [pattern for pattern in outcome.get("dropped", ()) if pattern in counts]:
        return dropped(lost, counts)
    if any(pattern in counts for pattern in outcome.get("unset", ())):
        return _UNSET
    if plain := [pattern for pattern in outcome.get("plain", ()) if pattern in counts]:
        return Reading("drops", f"ignores the magnitudes of DoRA in some layers, such as {plain[0]}")
    if wrong := [pattern for pattern in outcome.get("other", ()) if pattern in counts]:
        return Reading("wrong", f"puts something else than B @ A into {wrong[0]}")
    factors = {value for name, each in outcome.get("factor", {}).items() if name in counts for value in each}
    if not factors:
        return Reading("law")
    low, high = min(factors), max(factors)
    span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return Reading("factor", f"applies modules {span} times as strong as trained")
