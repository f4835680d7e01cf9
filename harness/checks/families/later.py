"""Later: what was loaded stays what it is when the model runs, is copied, cast or saved, and files are replaced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from harness.benches import Bench, Layer
from harness.checks.cell import Cell
from harness.checks.families.side_effects import another
from harness.checks.family import Need, Sighting, follows, has, judge, judges
from harness.checks.observation import Observation, changed_otherwise
from harness.checks.trial import (
    ASIDE,
    CAST,
    COPY,
    LAY_OUT,
    REPLACE,
    RUN,
    SAVE,
    TRAIN,
    UNLOAD,
    WHOLE,
    Step,
    load,
    rebuild,
    run_trial,
)
from harness.example import Example
from harness.measure.bench_summary import NEVER_RUNS
from harness.text import count, first_of

_DRIFT = 0.02  # of the effect, between answers of models that should answer alike
_HALF_DRIFT = 0.3  # where one of them computes in bfloat16
_BESIDE = 0.005  # of the effect, between a model and the base with its layers' weights, both in float32
_WHOLE = ("lora", "conv")  # the variants of which a model is held against the weights of its layers
_PLAIN = "lora"  # the variant in which copies, saved state and caches are tried: they know nothing of variants


@dataclass(frozen=True)
class _Later:
    """`steps` after which the model must be as after one load, `what` they are in words; it may refuse all but runs.

    Unless `layers` are compared, the model's own answers are, before and after, which may be `drift` apart: a layer of
    a copy may well answer nothing when it is asked alone.
    """

    steps: tuple[Step, ...]
    what: str
    may_raise: bool = True
    requires: Need | None = None
    layers: bool = True
    drift: float = _DRIFT


_RUNS = (_Later((load(), RUN, RUN, RUN), "running the model three times", may_raise=False),)
_STATE = (
    _Later((load(), ASIDE), "loading another file into another model"),
    _Later((load(), TRAIN), "running the model with gradients on", layers=False),
    _Later((load(), COPY), "copying the loaded model (copy.deepcopy)", layers=False),
    _Later(
        (load(), SAVE),
        "saving the loaded model's state and loading it into another that was loaded alike",
        layers=False,
    ),
)
_HALF_RUN = _Later((load(), RUN), "running the loaded bfloat16 model", may_raise=False)
_CAST = _Later((load(), CAST), "casting the loaded bfloat16 model to float32", layers=False, drift=_HALF_DRIFT)
_EARLIER = (
    _Later(
        (load(file="replaced"), rebuild(1), REPLACE, load(file="replaced")),
        "loading another file of the same path into another model before",
    ),
    _Later(
        (load(file="other"), UNLOAD, load()), "loading and unloading another file of the same name", requires="unload"
    ),
    _Later(
        (load(file="replaced"), UNLOAD, REPLACE, load(file="replaced")),
        "loading and unloading another file of the same path",
        requires="unload",
    ),
)


@judges("side_effects", finds="training mode or dropout left on", codes=("LH406",))
def check_mode(observation: Observation) -> list[Sighting]:
    """LH406 when modules that were not in training mode are, or answers to one input differ from call to call."""
    names = observation.training
    if names:
        fact = f"{count(len(names), 'module')} in training mode after loading, first {names[0]}"
        return [Sighting("LH406", observation, fact=fact)]
    names = observation.unsteady
    fact = f"{len(names)} layers answer the same input differently when asked again"
    return [Sighting("LH406", observation, names, fact)] if names else []


@follows("side_effects", finds="another answer later, in a copy or beside the layers", codes=("LH407",))
def check_later(cell: Cell, once: Observation, dtypes: tuple[str, ...]) -> Iterator[Sighting]:
    """LH407 when the effect is another after the model ran, was copied, cast, or saved, or another model was loaded.

    LH401 when the model answers otherwise than by its layers; the code of what goes wrong where its convolutions lie
    channels last.
    """
    yield from _channels_last(cell, once)
    if cell.bench.run is None:
        return  # nothing shows what a model answers that nobody can run
    found = tuple(_first_other("LH407", cell, once, _RUNS))
    yield from found or _beside_its_layers(cell, once)  # what runs change is no attribute beside the weights
    if found or cell.variant_name != _PLAIN:
        return
    yield from (found := tuple(_first_other("LH407", cell, once, _STATE)))
    if not found and "bfloat16" in dtypes:
        half = run_trial(cell, replace(once.example, dtype="bfloat16"))
        yield from () if half.raised else _first_other("LH407", cell, half, (_HALF_RUN, _CAST))


def _channels_last(cell: Cell, once: Observation) -> Iterator[Sighting]:
    """Yield what goes wrong in a model whose convolutions lie channels last, where another memory format is right."""
    if cell.variant_name != "conv":
        return
    seen, where = run_trial(cell, once.example, (LAY_OUT, load())), "in a model that is channels last in memory"
    if seen.raised:
        yield Sighting(seen.raised.code, seen, fact=f"{seen.raised.what}; {where}")
    elif changed_otherwise(once, seen):
        yield from (replace(fault, fact=f"{fault.fact}; {where}") for fault in judge(seen))


def _beside_its_layers(cell: Cell, once: Observation) -> Iterator[Sighting]:
    """Yield LH401 when the model answers otherwise than the base would with the weights that its layers show.

    An attribute, a function or a processor is another then, which no weight shows.
    """
    exact = all(fits[0].unchanged or fits[0].direction_right for fits in once.fits.values())
    told = once.others_changed or once.bent or once.not_finite or not exact
    layers = cell.bench.layers.values()
    if told or cell.variant_name not in _WHOLE or cell.bench.run is None or not _has_plain_weights(cell.bench, layers):
        return
    if none := _without_effect(cell, once):  # which may be too little of the whole effect to be seen in it
        yield none
        return
    seen = run_trial(cell, once.example, (load(), WHOLE))
    if seen.raised or seen.drift <= _BESIDE:
        return
    what = "the model answers otherwise than by its layers' weights, biases and norms, which are right"
    yield Sighting("LH401", seen, fact=f"{what}: {seen.drift:.1%} of the effect is another")


def _without_effect(cell: Cell, once: Observation) -> Sighting | None:
    """Return LH102 when the modules that the model does not call change none of its answers, though their weights do.

    Their layers answer right when they are asked.
    """
    never = tuple(target for target in once.example.targets if target.name in cell.bench.uncalled)
    if not never:
        return None
    alone = run_trial(cell, replace(once.example, targets=never), (load(), WHOLE))
    if alone.raised or not abs(alone.drift - 1) <= _BESIDE:
        return None
    what = f"{count(len(never), 'module')} without effect on what the model answers, whose forward does not call"
    return Sighting("LH102", alone, fact=f"{what} {first_of([target.name for target in never])}: {NEVER_RUNS}")


def _has_plain_weights(bench: Bench, layers: Iterable[Layer]) -> bool:
    """Whether the weights that layers show can be put into a bench: none is shared, coded, computed, or many in one."""
    return not bench.shared and not any(each.codes or each.computed or each.kind == "experts" for each in layers)


@follows("side_effects", finds="a file loaded before that comes back", codes=("LH408",))
def check_earlier(cell: Cell, once: Observation, dtypes: tuple[str, ...]) -> Iterator[Sighting]:
    """LH408 when what an earlier file put into the loader's memory is loaded in the place of this one."""
    yield from _first_other("LH408", cell, once, _EARLIER if cell.variant_name == _PLAIN else ())


def _other_file(example: Example, scenario: _Later) -> Example:
    """Return what the other file has: the same modules where one replaces the other, so that they are of one size."""
    other = another(example)
    replaced = any(step.file == "replaced" for step in scenario.steps)
    return replace(example, value_seed=other.value_seed) if replaced else other


def _first_other(code: str, cell: Cell, once: Observation, scenarios: Sequence[_Later]) -> Iterator[Sighting]:
    for scenario in scenarios:
        if not has(cell, scenario.requires):
            continue
        seen = run_trial(cell, once.example, scenario.steps, other=_other_file(once.example, scenario))
        if seen.raised and scenario.may_raise:
            continue
        if seen.raised:
            loaded = seen.raised.loaded  # else the load failed, which it did not before: now and then is a fault too
            fact = f"{scenario.what}: {seen.raised.what}" if loaded else seen.raised.what
            yield Sighting(code if loaded else seen.raised.code, seen, fact=fact)
            return
        if names := tuple(changed_otherwise(once, seen)) if scenario.layers else ():
            what = f"{len(names)} of {len(once.fits)} layers are not as after one load"
            yield Sighting(code, seen, names, f"{what}, after {scenario.what}")
            return
        if not seen.drift <= scenario.drift:
            yield Sighting(code, seen, fact=f"{seen.drift:.0%} of the effect is another after {scenario.what}")
            return
