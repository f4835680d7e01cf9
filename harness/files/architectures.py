"""Layers with two names, the authors' and diffusers' or transformers', and which rows of one the other is: as data."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_DATA = Path(__file__).with_name("architectures.toml")
_BRACES = re.compile(r"\{([^{}]*)\}")
_WILD = re.compile(r"\*\*|\*")
Rows = tuple[int, int]
Values = tuple[str, ...]
Shape = tuple[int, ...]


class Slot(NamedTuple):
    """Rows of a layer that a module changes: a layer by its name in the model, and that name as the LoRA spells it.

    `rows` are the rows of the layer (None: all), `part` the rows of the module's own product that go there (None: all).
    A LoRA of split layers gives several modules one fused layer; a fused module has a slot for every split layer.
    """

    layer: str
    spelling: str
    rows: Rows | None = None
    part: Rows | None = None


class UnplacedError(Exception):
    """Why a module that has a layer cannot be placed: its shape does not fit."""


class UnjudgedError(UnplacedError):
    """Why a module that has a layer is not placed: names and shapes tell no rows, or not which of `layers` it is."""

    def __init__(self, why: str, layers: Iterable[str] = ()) -> None:
        super().__init__(why)
        self.layers = tuple(layers)


@dataclass(frozen=True)
class LayerRow:
    """One layer `left` of an architecture and the layers `right` that are stacked in it, both with wildcards.

    `sizes` names the heights on the right: equal letters, equal heights. `swap` says that the halves of the one layer
    on the right stand in the opposite order, `pair` that they do where there are two halves. `order` says why rows
    cannot be assigned, unless the model's configuration tells its heads, where `heads` says how those lie.
    """

    family: str
    left: str
    right: tuple[str, ...]
    sizes: tuple[str, ...]
    swap: bool | str = False
    order: str = ""
    heads: str = ""

    def heights(self, known: Mapping[int, int], total: int | None) -> dict[str, int]:
        """Return the height of each letter as far as some heights on the right and their sum tell it."""
        found = {self.sizes[place]: height for place, height in known.items()}
        missing = {letter for letter in self.sizes if letter not in found}
        if total is not None and len(missing) == 1:
            letter = missing.pop()
            rest, parts = total - sum(found.get(one, 0) for one in self.sizes), self.sizes.count(letter)
            if rest > 0 and rest % parts == 0:
                found[letter] = rest // parts
        return found

    def rows(self, place: int, heights: Mapping[str, int]) -> Rows | None:
        """Return the rows of `left` that the layer `right[place]` is, None when heights before it are unknown."""
        before = self.sizes[: place + 1]
        if any(letter not in heights for letter in before):
            return None
        end = sum(heights[letter] for letter in before)
        return end - heights[before[-1]], end


@dataclass(frozen=True)
class Alias:
    """Another name of a layer: `name` in the other scheme, and how the two lie; `fused`: the layer is the left one."""

    name: str
    row: LayerRow
    values: Values
    fused: bool
    place: int

    @property
    def others(self) -> tuple[str, ...]:
        """The names on the right, in the order in which they are stacked."""
        return tuple(filled(right, self.values) for right in self.row.right)


def aliases(name: str) -> Iterator[Alias]:
    """Yield the other names of a layer, whose name stands without the prefix of a model."""
    for pattern, row, place in _table().get(name.rpartition(".")[2], ()):
        if found := pattern.fullmatch(name):
            values = found.groups()
            if place is None:
                for place_, right in enumerate(row.right):
                    yield Alias(filled(right, values), row, values, True, place_)
            else:
                yield Alias(filled(row.left, values), row, values, False, place)


def authors_names(layers: Collection[str], families: Sequence[str]) -> dict[str, Alias]:
    """Return {the authors' name of a layer: how it is made of `layers`} in their order; of names the earlier family's.

    Layers that have no other name in these families are left out, and stacks of which some are missing.
    """
    found, placed = dict[str, Alias](), set[str]()
    for layer in layers:
        whole = [a for a in aliases(layer) if not a.fused and set(a.others) <= set(layers)]
        known = [alias for family in families for alias in whole if alias.row.family == family]
        if known and layer not in placed:
            found[known[0].name] = known[0]
            placed.update(known[0].others)
    return found


def filled(template: str, values: Values) -> str:
    """Return `template` with its wildcards replaced by `values`, in their order."""
    rest = iter(values)
    return _WILD.sub(lambda _: next(rest), template)


class _Ends(dict[str, list[tuple[re.Pattern[str], LayerRow, int | None]]]):
    """Patterns by the last component of the names that they fit; those that end in a wildcard fit any."""

    def add(self, template: str, row: LayerRow, place: int | None) -> None:
        last = template.rpartition(".")[2]
        self.setdefault("" if "*" in last else last, []).append((_compiled(template), row, place))

    def get(self, last: str, default: Any = ()) -> Any:
        return [*super().get(last, default), *super().get("", ())]


@cache
def _table() -> _Ends:
    table = _Ends()
    for row in rows():
        table.add(row.left, row, None)
        for place, right in enumerate(row.right):
            table.add(right, row, place)
    return table


def read_toml(path: Path) -> dict[str, Any]:
    """Return what a file of the package's own data holds."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


@cache
def _data() -> dict[str, Any]:
    return read_toml(_DATA)


@cache
def rows() -> tuple[LayerRow, ...]:
    """Return every row of the table."""
    return tuple(
        row
        for family in _data().values()
        if isinstance(family, dict)
        for left, right in family["layers"].items()
        for row in _rows(family["title"], left, right if isinstance(right, dict) else {"rows": right})
    )


def _rows(family: str, left: str, right: Mapping[str, Any]) -> Iterator[LayerRow]:
    lefts, rights = _expanded(left), _expanded(right["rows"])
    stacks = [(lefts[0], rights)] if len(lefts) == 1 else list(zip(lefts, ([one] for one in rights), strict=True))
    for name, parts in stacks:
        sizes = tuple(right["sizes"].split()) if "sizes" in right else ("D",) * len(parts)
        yield LayerRow(
            family, name, tuple(parts), sizes, right.get("swap", False), right.get("order", ""), right.get("heads", "")
        )


def _expanded(template: str) -> list[str]:
    found = _BRACES.search(template)
    if found is None:
        return [template]
    return [template[: found.start()] + word + template[found.end() :] for word in found[1].split(",")]


def _compiled(template: str) -> re.Pattern[str]:
    parts: Sequence[str] = re.split(r"(\*\*|\*)", template)
    return re.compile("".join({"*": r"(\d+)", "**": r"(.+)"}.get(part, re.escape(part)) for part in parts))


def sliced(
    outputs: int,
    inputs: int,
    group: Sequence[tuple[Alias, str]],
    layers: Mapping[str, Shape | None],
    config: Mapping[str, Any],
) -> Iterator[Slot]:
    """Yield the slots of a module [outputs, inputs] that is one part of a fused layer, or that stacks several layers.

    `group` are the aliases of one row that the module's name is, with the layers of the model that have them; `config`
    is the model's.

    Raises:
        UnplacedError: the heights are unknown, or the rows stand in another order.
    """
    alias, layer = group[0]
    row = alias.row
    heads = heads_of(config, row.heads) if row.heads else None
    if row.order and heads is None:
        raise UnjudgedError(f"{layer}: {row.order}", [layer for _, layer in group])
    if heads and heads.interleaved:
        yield from _interleaved(heads, outputs, group, layers)
    elif len(row.right) == 1:
        yield from _turned(alias, layer, outputs, inputs)
    elif alias.fused:
        shape = layers[layer]
        if shape and len(shape) == 3:
            raise UnjudgedError(f"{layer}: how experts stack their parts differs between models", [layer])
        rows = row.rows(alias.place, row.heights({alias.place: outputs}, shape[0] if shape else None))
        if rows is None:
            raise UnjudgedError(f"{layer}: which of its rows these are cannot be told", [layer])
        yield Slot(layer, alias.name, rows)
    else:
        yield from _stacked(group, outputs, layers)


def _interleaved(
    heads: Heads, outputs: int, group: Sequence[tuple[Alias, str]], layers: Mapping[str, Shape | None]
) -> Iterator[Slot]:
    """Yield a slot for every run of rows of q, k or v in the layer that has all of them, or of that in a layer of one.

    Raises:
        UnplacedError: the heights are no such heads.
    """
    for alias, layer in group:
        shape = layers[layer]
        if shape is None:
            raise UnjudgedError(f"{layer}: its rows are not known", [layer])
        total, own = (shape[0], outputs) if alias.fused else (outputs, shape[0])
        size, rest = divmod(total, heads.count + 2 * heads.kv)
        height = size * heads.count // heads.kv if alias.place == 0 else size
        if rest or not size or own != height * heads.kv:
            raise UnplacedError(f"{layer}: no {heads.count} heads and {heads.kv} of k and v")
        step, first = total // heads.kv, 0 if alias.place == 0 else total // heads.kv - (3 - alias.place) * size
        for one in range(heads.kv):
            whole = one * step + first, one * step + first + height
            part = one * height, (one + 1) * height
            name = alias.name if alias.fused else alias.others[alias.place]
            yield Slot(layer, name, whole, part) if alias.fused else Slot(layer, name, part, whole)


def turns(swap: bool | str, rows: int, inputs: int) -> bool:
    """Tell whether the halves of a layer [rows, inputs] change places between its two names."""
    return bool(swap) and (swap != "pair" or rows == 2 * inputs)


def _turned(alias: Alias, layer: str, rows: int, inputs: int) -> Iterator[Slot]:
    """Yield the slot of a layer that only has another name, or those of its two halves where they change places."""
    half = rows // 2
    if not turns(alias.row.swap, rows, inputs):
        yield Slot(layer, alias.name)
        return
    yield Slot(layer, alias.name, (half, rows), (0, half))
    yield Slot(layer, alias.name, (0, half), (half, rows))


def _stacked(group: Sequence[tuple[Alias, str]], outputs: int, layers: Mapping[str, Shape | None]) -> Iterator[Slot]:
    """Yield a slot for every layer that a module stacks; xlabs' modules stop before the last."""
    row = group[0][0].row
    known = {alias.place: shape[0] for alias, layer in group if (shape := layers[layer])}
    heights = row.heights(known, outputs)
    for alias, layer in sorted(group, key=lambda pair: pair[0].place):
        part = row.rows(alias.place, heights)
        if part is None:
            raise UnjudgedError(
                f"{layer}: which rows of the module go there cannot be told", [layer for _, layer in group]
            )
        if part[0] < outputs:
            yield Slot(layer, alias.others[alias.place], None, part)
    ends = {part[1] for alias, _ in group if (part := row.rows(alias.place, heights))}
    if outputs not in ends:
        raise UnplacedError(f"{group[0][1]}: the layers that it stacks have other heights than its {outputs} rows")


@dataclass(frozen=True)
class Heads:
    """How many heads a model has, of queries and of keys, and whether their rows are interleaved in a fused layer."""

    count: int
    kv: int
    interleaved: bool


_COUNTS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KV_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_BY_HEAD = frozenset({"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"})


def heads_of(config: Mapping[str, Any], how: str) -> Heads | None:
    """Return the heads of a model as its configuration tells them; None where it does not, or not how they lie.

    `how`: `grouped`, or `by model` where the type of the model decides.
    """
    said = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config
    counts = [next((said[key] for key in keys if isinstance(said.get(key), int)), 0) for keys in (_COUNTS, _KV_COUNTS)]
    count, kv = counts[0], counts[1] or counts[0]
    if count <= 0 or kv <= 0 or count % kv:
        return None
    if how == "grouped":
        return Heads(count, kv, True)
    kind = said.get("model_type")
    if kind in _BY_HEAD:
        return Heads(count, count, True)
    if kind == "falcon":
        return _falcon(said, count, kv)
    return Heads(count, kv, False) if kind == "chatglm" else None


def _falcon(said: Mapping[str, Any], count: int, kv: int) -> Heads:
    """Return the heads of Falcon: by groups in its newer models, of one key for all or by head in the older ones."""
    if said.get("new_decoder_architecture"):
        return Heads(count, kv, True)
    return Heads(count, 1, False) if said.get("multi_query", True) else Heads(count, count, True)


def looks_like(layers: Mapping[str, Shape | None], *, by_width: bool = False) -> str | None:
    """Return what model has layers of these names and shapes [out, in, ...]; None when no sign of one is known.

    Names may be flattened. With `by_width` only signs count that tell of a width too.
    """
    for look, dotted, flat in _signs():
        wide = not {"inputs", "ratio"}.isdisjoint(look)
        for name, shape in layers.items() if wide or not by_width else ():
            pattern = dotted if "." in name or look.get("dotted") else flat
            if pattern.search(name) and (not wide or _is_as_wide(look, shape)):
                return str(look["title"])
    return None


def _is_as_wide(look: Mapping[str, Any], shape: Shape | None) -> bool:
    if not shape or len(shape) < 2 or 0 in shape[:2]:
        return False
    high, wide = shape[:2]
    return bool(look.get("inputs", wide) == wide and look.get("ratio", 0) * wide in (0, high))


@cache
def _signs() -> list[tuple[Mapping[str, Any], re.Pattern[str], re.Pattern[str]]]:
    looks = _data()["looks"]
    return [(look, *(re.compile("|".join(_sign(one, mark) for one in look["any"])) for mark in "._")) for look in looks]


def _sign(template: str, mark: str) -> str:
    parts = ({"*": r"\d+", "**": ".+"}.get(part, re.escape(part)) for part in template.lstrip("^").split("."))
    start = "^" if template.startswith("^") else f"(?:^|{re.escape(mark)})"
    return f"{start}{re.escape(mark).join(parts)}$"
