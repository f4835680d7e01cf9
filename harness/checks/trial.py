"""One trial: write the example as a file, have a model taken through steps where the loader runs, compare layers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.checks.cell import Cell
from harness.checks.measuring import answering
from harness.checks.observation import Observation, observation_of, wrong_direction
from harness.checks.trial_files import File, TrialFiles, bytes_of, updates_of
from harness.checks.unloaded import base_weights, weights_seen
from harness.checks.work import DENSE, WEIGHT, Kind, Order
from harness.example import Example
from harness.isolation.calls import Raised, lost_raised
from harness.isolation.subject import Here, SubjectLostError
from harness.measure.compare import norm
from harness.measure.effective import DENSE as INPUTS
from harness.measure.effective import dense_input
from harness.measure.tolerance import UNIT_ROUNDOFF
from harness.variants import Update

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDINGS = 32  # of a dense answer: the sum, and B @ (A @ x) whose parts are larger than their product
_REMEMBERED = 4  # examples, and the last one: a loader that mixes files up has the first ones, or the last
_BLURS = 3  # times what a layer that rounds its input loses of a dense answer anyway
_SHARE = 0.05  # of the change, below which a dense answer is a matter of precision


@dataclass(frozen=True)
class Step:
    """One call of the subject, or what its users do between calls.

    Of the subject: load a file of the trial, undo the last load, set the strength of what is loaded. Of its users: go
    on with a new model (`rebuild`), load a file into a second one and go on with the first (`aside`), run the model,
    run it with gradients (`train`), copy it, cast it to float32, have its convolutions lie channels last (`lay_out`),
    save its state and load that into a fresh model, run it beside the base that has its layers' weights (`whole`),
    replace a file. `times` multiplies the strength of the example, or the layers of the new model (a power of two);
    None calls the loader without a strength.
    `file`: the example's own, a copy of it, the other example's, or the one that `replace` puts the example's own in
    the place of, the other example's before.
    """

    kind: Kind
    times: float | None = 1.0
    file: File = "example"


load: Callable[..., Step] = partial(Step, "load")
set_strength: Callable[[float], Step] = partial(Step, "set_strength")  # without loading again
rebuild: Callable[[float], Step] = partial(Step, "rebuild")
UNLOAD, RUN, COPY, CAST, SAVE = Step("unload"), Step("run"), Step("copy"), Step("cast"), Step("save")
WHOLE, TRAIN, LAY_OUT = Step("whole"), Step("train"), Step("lay_out")
REPLACE, ASIDE = Step("replace", file="replaced"), Step("aside", file="other")
_WITH_FILES = ("load", "aside", "replace")


def run_trial(
    cell: Cell,
    example: Example,
    steps: Sequence[Step] = (load(),),
    *,
    other: Example | None = None,
    edit: Callable[[Path], None] | None = None,
    listen: bool = False,
) -> Observation:
    """Take a fresh model through `steps`, by default one load of `example`, and measure it.

    `other` is the second file that a step may load. `edit` changes the file of the example before. With `listen` what
    the loader says is kept.
    """
    updates = updates_of(cell, example)
    with tempfile.TemporaryDirectory(prefix="lora-harness-") as folder:
        files = TrialFiles(cell, example, updates, other, Path(folder))
        order = files.order
        if edit:
            edit(files.example)
        written = bytes_of(files.example)
        orders = tuple(
            (s.kind, _number(s, example), str(files.path(s.file)) if s.kind in _WITH_FILES else "") for s in steps
        )
        try:
            answer = _asked(cell, example, orders, listen)
            own = _own_base(cell, example, orders) if "raised" not in answer else {}
        except SubjectLostError as lost:
            return Observation(example, raised=lost_raised(lost))
        file_changed = bytes_of(files.example) != written
    if "raised" in answer:
        return Observation(example, raised=Raised(**answer["raised"]))
    times = next((step.times for step in reversed(steps) if step.kind == "rebuild"), 1.0) or 1.0
    seen = _observation(cell, example, updates, times, answer, own)
    if any(wrong_direction(fits[0]) for fits in seen.fits.values()):
        seen = replace(seen, earlier=_earlier(cell, example))
    cell.earlier[_REMEMBERED:] = [example]
    return replace(seen, file_changed=file_changed, order=order)


def _earlier(cell: Cell, example: Example) -> dict[str, list[Tensor]]:
    """Return B @ A of every module of the files that were loaded before, by layer."""
    found: dict[str, list[Tensor]] = {}
    for other in cell.earlier:
        if other.value_seed != example.value_seed:  # of one seed, a lower rank has the first rows of a higher one
            for name, update in updates_of(cell, replace(other, dtype=example.dtype)).items():
                found.setdefault(name, []).append(update.direction.product)
    return found


def _number(step: Step, example: Example) -> float | None:
    return step.times if step.kind == "rebuild" or step.times is None else step.times * example.strength


def _asked(
    cell: Cell, example: Example, steps: tuple[tuple[Kind, float | None, str], ...], listen: bool
) -> dict[str, Any]:
    """Have the trial done where the subject's code runs, and check that what comes back can be its answer.

    Raises:
        SubjectLostError: nothing came back, or something else.
    """
    bias = cell.variant.bias
    answer = ask(cell, example, Order(cell.bench_name, example.dtype, steps, cell.allowed, bias, listen))
    problem = _problem(answer, cell, base_weights(cell.bench, example.dtype, bias))
    if problem:
        raise SubjectLostError("raised", f"its process sent {problem}")
    return {"tensors": {}, **answer}


def ask(cell: Cell, example: Example, order: Order) -> Any:
    """Give the order where the subject's code runs; return what comes back.

    Raises:
        SubjectLostError: nothing does.
    """
    steps = len(order.steps)
    with cell.watch(cell.reproduce(example), (steps + 1) * cell.allowed):
        asked = cell.asked or Here(answering(cell.subject))
        return asked.ask(asdict(order), cell.allowed, parts=steps + 1)


def _own_base(cell: Cell, example: Example, steps: tuple[tuple[Kind, float | None, str], ...]) -> dict[str, Tensor]:
    """Return the weights that a loader which quantises has made of the base: its own load of the file at strength 0.

    Raises:
        SubjectLostError: nothing came back, or it cannot load at strength 0.
    """
    first = next((path for kind, _, path in steps if kind == "load"), None)
    if not cell.subject.declaration.quantises or first is None:
        return {}
    answer = _asked(cell, example, (("load", 0.0, first),), False)
    if "raised" in answer:
        raise SubjectLostError("raised", f"loading at strength 0, its baseline: {answer['raised']['what']}")
    kept = answer["tensors"].items()
    return {name.removeprefix(WEIGHT): weight for name, weight in kept if name.startswith(WEIGHT)}


def _problem(answer: Any, cell: Cell, base: Mapping[str, Tensor]) -> str | None:
    """Return what is wrong with an answer that no harness wrote, or None."""
    if not isinstance(answer, dict):
        return "no measurements"
    if "raised" in answer:
        fields = answer["raised"]
        known = isinstance(fields, dict) and fields.keys() <= Raised.__dataclass_fields__.keys() and "what" in fields
        return None if known and fields.get("code") in ("LH901", "LH902", "LH903") else "a failure without its code"
    lists = [answer.get(kind) for kind in ("others", "training", "unsteady", "said")]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        return "measurements without their names"
    if not isinstance(answer.get("drift"), float):
        return "measurements without what its answers have in common"
    if not isinstance(tensors := answer.get("tensors", {}), dict):
        return "measurements without their weights"
    for key, tensor in tensors.items():
        if _shape(key, base) != tuple(getattr(tensor, "shape", ())) or str(tensor.dtype) != "torch.float64":
            return f"a tensor that no layer of {cell.bench_name} has"
    return None


def _shape(key: str, base: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """Return which shape a tensor of an answer has, None for one that no answer has."""
    kind, colon, name = key.partition(":")
    if name not in base or kind + colon not in (WEIGHT, DENSE):
        return None
    return tuple(base[name].shape) if kind + colon == WEIGHT else (INPUTS, len(base[name]))


def _observation(
    cell: Cell,
    example: Example,
    updates: Mapping[str, Update],
    times: float,
    answer: Mapping[str, Any],
    own: Mapping[str, Tensor],
) -> Observation:
    known, bias, view = base_weights(cell.bench, example.dtype, cell.variant.bias), cell.variant.bias, cell.view
    base, tensors = {**known, **own}, answer["tensors"]
    before = base if times == 1 else {name: times * weight for name, weight in base.items()}
    after = {name: tensors.get(WEIGHT + name, weight) for name, weight in base.items()}
    plain = weights_seen(view, cell.bench, example.dtype, bias)
    first = view.gather(before, known, plain)
    uncoded = plain if own and times == 1 else None
    seen = observation_of(cell, example, updates, first, view.gather(after, before, first), uncoded)
    bent = tuple(_bent(cell, example, before, after, tensors))
    return replace(
        seen,
        others_changed=tuple(dict.fromkeys((*seen.others_changed, *answer["others"]))),
        bent=bent,
        training=tuple(answer["training"]),
        unsteady=tuple(answer["unsteady"]),
        drift=answer["drift"],
        said=tuple(answer["said"]),
    )


def _bent(
    cell: Cell,
    example: Example,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> Iterator[str]:
    """Yield the layers whose answer to dense input is not that of the weight they show to the identity."""
    import torch

    roundoff = UNIT_ROUNDOFF[example.dtype]
    for name, layer in cell.bench.layers.items():
        if DENSE + name not in tensors:
            continue
        x = dense_input(layer, getattr(torch, example.dtype))
        assert x is not None
        weight = after[name][:, : layer.columns]
        off = norm(tensors[DENSE + name] - x.double() @ weight.T)
        rounding = _ROUNDINGS * roundoff * norm(x.double()) * norm(weight) / layer.columns**0.5
        if off <= rounding:
            continue
        blur = _BLURS * layer.blur * norm(x.double() @ weight.T)
        change = weight - before[name][:, : layer.columns]
        if not off <= max(rounding, blur, _SHARE * norm(x.double() @ change.T)) and bool(weight.isfinite().all()):
            yield name
