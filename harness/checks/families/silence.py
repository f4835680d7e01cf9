"""Silence: what a loader cannot apply is refused or said to be left out, never dropped without a word."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.benches import own_benches
from harness.checks.cell import Cell
from harness.checks.family import Sighting, follows, judge
from harness.checks.observation import Observation, probes_of
from harness.checks.trial import load, run_trial
from harness.checks.trial_files import prefix_of, rewrite, tensors_of
from harness.example import Example, Target
from harness.files import FORMATS, LoraParts, LoraWeights, read_lora, write_lora
from harness.law.diagnosis import diagnose
from harness.loaders.protocol import COMMAND, IMPLIED_VARIANTS
from harness.variants import VARIANTS
from harness.verdict.codes import CODES

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]
Edit = Callable[[Cell, Path], None]
NOT_TRIED = "of a loader that loads the wrong thing nobody can say what it did with the rest"
_MOST = 6  # modules of a file of another variant
_LAW = ("scale", "strength")
_PLAIN = 1e-3
_COMPLAINT = re.compile(
    r"unexpected|un(?:known|supported|used|matched|loaded|recogni[sz]ed|resolved)|support|skip|ignor|miss|match|found|cannot"
    r"|could ?n.t|unable|fail|warn|invalid|without|drop|not (?:loaded|applied|used|handled)|left (?:out|over)|error",
    re.IGNORECASE,
)
_PARTIAL = re.compile(r"(\d+)\s*(?:/|of|out of)\s*(\d+)")
_VARIES = re.compile(r"/[\w./-]+|[0-9][0-9.]*")


@dataclass(frozen=True)
class _Kind:
    """One thing that cannot be applied: its `name`, and how it is put into a written file."""

    name: str
    edit: Edit


def tries_silence(cell: Cell) -> bool:
    """Whether silence is tried in `cell`: on the first bench of each format, of a command on the first of all.

    The first is that of those asked for. On a bench of the author's own it always is.
    """
    subject = cell.subject
    formats, benches = cell.formats or subject.formats, cell.benches or subject.benches
    if subject.defaults.examples <= COMMAND.examples and cell.format != formats[0]:
        return False
    places = (bench for bench in benches if subject.unsupported(cell.format, bench) is None)
    return cell.variant_name == "lora" and (cell.bench_name in own_benches() or cell.bench_name == next(places, None))


@follows("silence", finds="what cannot be applied is dropped without a word", codes=("LH103",))
def check_silence(cell: Cell, once: Observation, dtypes: tuple[str, ...]) -> Iterator[Sighting]:
    """LH103 for what is silently left out, the law's own code where it is loaded with another scale."""
    if not tries_silence(cell) or not all(fits[0].direction_right for fits in once.fits.values()):
        return
    usual = run_trial(cell, once.example, (load(),), listen=True)
    if all(fits[0].unchanged for fits in once.fits.values()) and any(_says(line, ()) for line in usual.said):
        return  # it says that it loads nothing of the whole file, and would say the same of a part
    for kind in _KINDS:
        seen = _tried(cell, once.example, kind)
        if seen is not None:
            cell.heard[kind.name] = _outcome(seen, usual, right=_is_applied(cell, kind, seen))
    told = {fault.code for fault in judge(once)}
    found = [_of_variant(cell, other, usual, told) for other in undeclared(cell)]
    silent = tuple(name for name, outcome in cell.heard.items() if outcome == "silent")
    by_law = [finding for finding in found if finding]
    rest = tuple(name for name in silent if name not in {f.data["silent"][0] for f in by_law})
    yield from by_law
    if rest:
        fact = f"{', '.join(rest)}; {_count(cell.heard)}"
        yield Sighting("LH103", once, fact=fact, check="silence", data=_data(cell, rest))


def _data(cell: Cell, silent: Sequence[str]) -> dict[str, Any]:
    return {"silent": list(silent), "heard": dict(cell.heard)}


def _count(heard: Mapping[str, str]) -> str:
    """Say of how many kinds each thing happened."""
    words = {"applied": "applied right", "refused": "refused", "said": "said to be left out", "silent": "silent"}
    counts = ((list(heard.values()).count(outcome), word) for outcome, word in words.items())
    return f"of {len(heard)} kinds " + ", ".join(f"{number} {word}" for number, word in counts if number)


def silence_title(heard: Mapping[str, str]) -> str:
    """Return the title of a loader that was silent about nothing."""
    return f"silence right: {_count(heard)}"


def undeclared(cell: Cell) -> Iterator[Cell]:
    """Yield the cells of variants that the loader does not declare and a file of this format can be, one for each.

    Those that another one implies are left out with it.
    """
    subject = cell.subject
    for name, variant in ((n, v) for n, v in VARIANTS.items() if n not in IMPLIED_VARIANTS):
        others = () if cell.bench_name in own_benches() else subject.benches
        benches = (cell.bench_name, *others)
        # what was loaded before belongs to the layers of its own bench
        cells = (replace(cell, bench_name=bench, variant_name=name, earlier=[]) for bench in benches)
        place = next((c for c in cells if c.possible and variant.topology == "own"), None)
        if place is not None and not _is_declared(place):
            yield place


def _is_declared(place: Cell) -> bool:
    subject, variant = place.subject, place.variant_name
    return variant in subject.variants and subject.unsupported(place.format, place.bench_name, variant) is None


def _tried(cell: Cell, example: Example, kind: _Kind) -> Observation | None:
    """Load the example with what is put into its file; None where such a file cannot be."""
    if FORMATS[cell.format].suffix != ".safetensors":
        return None
    try:
        return run_trial(cell, example, (load(),), edit=lambda path: kind.edit(cell, path), listen=True)
    except (ValueError, LookupError):
        return None


def _is_applied(cell: Cell, kind: _Kind, seen: Observation) -> bool:
    """Whether what was put into the file is in the model, as far as such a thing can be there."""
    if kind.name == _UNDECLARED:
        return _undeclared_module(cell) in seen.others_changed
    return kind.name == _PREFIX and not judge(seen)


def _of_variant(cell: Cell, place: Cell, usual: Observation, told: Collection[str]) -> Sighting | None:
    """Load a file of a variant that is not declared; return a finding where it gets another scale than in training.

    `told` are the codes of what goes wrong in a plain file too: that says nothing of the variant.
    """
    from harness.checks.plan import smoke_example

    example = smoke_example(place, place.targets[:_MOST])
    if len(example.targets) > 1 and place.has_alpha:
        example = replace(example, targets=tuple(_varied(place, example.targets)))
    seen = run_trial(place, example, (load(),), listen=True)
    faults = [] if seen.raised else judge(seen)
    outcome = _outcome(seen, usual, right=not faults)
    if outcome == "silent" and told and {fault.code for fault in faults} <= set(told):
        return None
    cell.heard[place.variant_name] = outcome
    if outcome != "silent" or {fault.code for fault in faults} != {"LH209"}:
        return None
    named = diagnose(list(probes_of(seen, place)))
    plain = named.law is not None and abs(named.law.constant - 1) < _PLAIN  # one file: a factor fits by chance
    code = named.code if plain and named.code and CODES[named.code].family in _LAW else "LH209"
    fact = (
        f"a file of the variant {place.variant_name}, which is not declared, is loaded without a word: {faults[0].fact}"
    )
    data = _data(cell, [place.variant_name])
    return Sighting(code, seen, faults[0].modules, fact, check="silence", data=data, place=place)


def _varied(place: Cell, targets: Sequence[Target]) -> Iterator[Target]:
    """Yield the targets with several ranks and alphas, so that a law shows."""
    most = place.variant.rank_limit(place.view)
    shapes = ((4, 8.0), (2, 3.0), (6, 10.5), (3, 1.25), (5, 4.0), (8, 6.0))
    for target, (rank, alpha) in zip(targets, shapes, strict=False):
        yield replace(target, rank=min(rank, most), alpha=alpha)


def _outcome(seen: Observation, usual: Observation, *, right: bool) -> str:
    if seen.raised:
        return "refused"
    if any(_says(line, usual.said) for line in seen.said):
        return "said"
    return "applied" if right else "silent"


def _says(line: str, usual: Sequence[str]) -> bool:
    """Whether a line tells that something is left out, and was not there for a file that fits."""
    if any(part[0] != part[1] for part in _PARTIAL.findall(line)) and line not in usual:
        return True
    new = _VARIES.sub("#", line) not in {_VARIES.sub("#", other) for other in usual}
    return new and (line.startswith("warning: ") or _COMPLAINT.search(line) is not None)


def _more(
    cell: Cell, path: Path, names: Iterable[str], change: Callable[[Tensor, int], Tensor] | None = None
) -> Tensors:
    """Return the tensors of the file's first module under other names, as the format writes them.

    `change` gets A and the number of its axis of inputs, and B and that of its outputs.
    """
    from safetensors.torch import load_file

    adapter = read_lora(path)
    name = next(iter(adapter.modules))
    halves = {half: adapter.part(name, half) for half in "AB"}
    halves = {half: change(part, int(half == "A")) for half, part in halves.items()} if change else halves
    weights: dict[str, LoraWeights | LoraParts] = {other: LoraParts(halves, _alpha(cell)) for other in names}
    folder = path.parent / "more"
    folder.mkdir()
    written = write_lora(folder / path.name, cell.format, weights, prefix=prefix_of(cell), durable=False)
    return load_file(tensors_of(written))


def _alpha(cell: Cell) -> float | None:
    return 8.0 if FORMATS[cell.format].alpha[0] != "none" else None


def _absent(cell: Cell, path: Path) -> None:
    name = cell.targets[0]
    other = re.sub(r"\.\d+\.", ".97.", name, count=1)
    other = other if other != name else f"{name.rpartition('.')[0]}.extra_proj"
    rewrite(path, lambda tensors: tensors | _more(cell, path, [other]))


def _undeclared_module(cell: Cell) -> str:
    """Return a layer that the loader declares not to take.

    Raises:
        LookupError: there is none.
    """
    every = replace(cell, subject=replace(cell.subject, declaration=replace(cell.subject.declaration, modules=None)))
    if (found := next((name for name in every.targets if name not in cell.targets), None)) is None:
        raise LookupError("it takes every layer")
    return found


def _beside(cell: Cell, path: Path) -> None:
    name = _undeclared_module(cell)
    layer = cell.view.layers[name]

    def fitted(part: Tensor, axis: int) -> Tensor:
        size = layer.columns if axis else layer.rows
        times = [1, 1]
        times[axis] = -(-size // part.shape[axis])
        return part.repeat(times).narrow(axis, 0, size).contiguous()

    rewrite(path, lambda tensors: tensors | _more(cell, path, [name], fitted))


def _foreign(cell: Cell, path: Path) -> None:
    names = [f"decoder.layers.{i}.{part}" for i in range(2) for part in ("mlp.gate_proj", "self_attn.qkv_proj")]
    rewrite(path, lambda tensors: _more(cell, path, names))


def _wider(cell: Cell, path: Path) -> None:
    """Give the first module the shape that it has in a model of twice the width."""
    import torch

    name = next(iter(read_lora(path).modules))
    rewrite(path, lambda own: own | _more(cell, path, [name], lambda part, axis: torch.cat([part, part], axis)))


def _renamed(cell: Cell, path: Path) -> None:
    """Put another prefix in the place of the format's own."""
    prefix = prefix_of(cell)
    own = FORMATS[cell.format].write_prefix if prefix is None else prefix
    other = "lora_somewhere_" if FORMATS[cell.format].flattened else "somewhere.else."
    rewrite(path, lambda tensors: {other + key.removeprefix(own): tensor for key, tensor in tensors.items()})


def _halved(cell: Cell, path: Path) -> None:
    adapter = read_lora(path)
    gone = next(iter(adapter.modules.values())).keys["B"]
    rewrite(path, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != gone})


def _strange(cell: Cell, path: Path) -> None:
    key = next(iter(read_lora(path).modules.values())).keys["A"]
    stem = re.sub(r"\.(?:lora[._]\w+|down|lora_A\.default)(?:\.default)?(?:\.weight)?$", "", key)
    rewrite(path, lambda tensors: tensors | {f"{stem}.lora_gate.weight": tensors[key].clone()})


_PREFIX, _UNDECLARED = "an unknown prefix", "a module that it does not declare"
_KINDS = (
    _Kind("a module the model lacks", _absent),
    _Kind(_PREFIX, _renamed),
    _Kind("a file for another model", _foreign),
    _Kind("a module of another shape", _wider),
    _Kind(_UNDECLARED, _beside),
    _Kind("half of a pair", _halved),
    _Kind("an unknown kind of key", _strange),
)
KINDS = (*(kind.name for kind in _KINDS), *VARIANTS)
"""What a loader may be silent about: the parts of a file that no loader can apply, and variants it does not declare."""
