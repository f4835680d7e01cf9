"""What is done where the subject's code runs: take a fresh model through the steps of a trial, measure every layer.

Nothing is judged here: a process that foreign code runs in sends numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import equal  # bound here: a subject may replace torch's own

from harness.benches import Bench, get_bench
from harness.errors import one_line
from harness.isolation.calls import CallFailedError, Raised, guarded
from harness.isolation.limits import TimeLimitExceeded, alarm
from harness.isolation.subject import Part
from harness.loaders.protocol import Subject
from harness.measure.compare import norm
from harness.measure.effective import MissingModuleError, effective_weights, offsets, weights_while_running
from harness.measure.tolerance import UNIT_ROUNDOFF

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kind = Literal["load", "unload", "set_strength", "rebuild"]
WEIGHT, DENSE = "weight:", "dense:"  # what the tensors of an answer are


@dataclass(frozen=True)
class Order:
    """A trial as the subject's process is told of it.

    `steps` are (kind, strength of the call or factor on the layers, path of the file); `seconds` may each take, and so
    may the measuring. With `bias` the layers' biases are measured too.
    """

    bench: str
    dtype: str
    steps: tuple[tuple[Kind, float, str], ...]
    seconds: float
    bias: bool = False


@dataclass
class _Work:
    """The trial as it goes: the model as the last step left it, and what the calls changed in torch itself."""

    subject: Subject
    order: Order
    model: torch.nn.Module
    times: float = 1.0
    left: list[str] = field(default_factory=list)

    @property
    def bench(self) -> Bench:
        return get_bench(self.order.bench)

    def take(self, kind: Kind, number: float, path: str) -> None:
        if kind == "rebuild":
            self.model, self.times = _rebuilt(self.bench, self.order.dtype, number), number
            return
        self.model = guarded(self.model, self._call(kind, number, path), alarm(self.order.seconds), self.left)

    def _call(self, kind: Kind, number: float, path: str) -> Callable[[torch.nn.Module], object]:
        """Return the call to make on the model; what the subject does not declare does nothing."""
        if kind == "load":
            return lambda model: self.subject.load(model, Path(path), strength=number)
        declared = self.subject.declaration
        if kind == "unload":
            return declared.unload or _nothing
        set_strength = declared.set_strength
        return (lambda model: set_strength(model, number)) if set_strength else _nothing

    def measured(self) -> dict[str, Any]:
        """Return the layers that are not as in the base, what else is not, and what asked layers answer to input."""
        bench, dtype, bias, dense = self.bench, self.order.dtype, self.order.bias, dict[str, "Tensor"]()
        base = base_weights(bench, dtype, bias)
        with alarm(self.order.seconds):  # a loader may do its work at the first forward
            found = effective_weights(self.model, bench.layers, bias=bias, dense=dense)
            if all(equal(self.times * base[name], found[name]) for name in bench.layers):
                dense.clear()
                found = weights_while_running(self.model, bench.layers, bench.forward, bias=bias, dense=dense)
            shifted = () if bias else tuple(_shifted(bench, self.model, dtype))
        changed = {WEIGHT + name: value for name, value in found.items() if not equal(value, base[name])}
        others = [*_other_state(bench, self.model, dtype, bias), *shifted, *self.left]
        return {"others": others, "tensors": changed | {DENSE + name: value for name, value in dense.items()}}


def _nothing(model: torch.nn.Module) -> None:
    return None


def answer(subject: Subject, order: dict[str, Any], on_part: Part) -> dict[str, Any]:
    """Do the `order`, the fields of an `Order`; return what was measured, or under `raised` what went wrong.

    Before each step and the measuring, `on_part` hears that the one before has ended.
    """
    todo = Order(**order)
    work = _Work(subject, todo, get_bench(todo.bench).build(_dtype(todo.dtype)))
    try:
        for step in todo.steps:
            on_part("step")
            work.take(*step)
        on_part("measure")
        return work.measured()
    except (Exception, TimeLimitExceeded) as error:
        return {"raised": asdict(_raised(error))}


def answering(subject: Subject) -> Callable[[Any, Part], Any]:
    """Return what answers for `subject`."""
    return partial(answer, subject)


def _raised(error: BaseException) -> Raised:
    """Say how a call, or the measuring of the model that it left, went wrong."""
    if isinstance(error, CallFailedError):
        return error.raised
    if isinstance(error, MissingModuleError):
        return Raised("LH902", f"the loaded model has no module {error}")
    if isinstance(error, TimeLimitExceeded):
        return Raised("LH901", f"the loaded model does not answer: {error}", timed_out=True)
    return Raised("LH902", f"the loaded model does not run: {one_line(error)}")


def _rebuilt(bench: Bench, dtype: str, times: float) -> torch.nn.Module:
    model = bench.build(_dtype(dtype))
    for weight in {id(w): w for name in bench.layers if (w := model.get_submodule(name).weight) is not None}.values():
        weight.data.mul_(times)  # type: ignore[operator]  # nn.Module's attributes are tensors or modules
    return model


@cache
def base_weights(bench: Bench, dtype: str, bias: bool = False) -> dict[str, Tensor]:
    """Return the effective weights of the unloaded bench, in float64, with their biases when asked."""
    return effective_weights(bench.base(_dtype(dtype)), bench.layers, bias=bias)


@cache
def _base_offsets(bench: Bench, dtype: str) -> dict[str, Tensor]:
    """Return what the layers of the unloaded bench answer to zeros, in float64."""
    return offsets(bench.base(_dtype(dtype)), bench.layers)


def _other_state(bench: Bench, model: torch.nn.Module, dtype: str, bias: bool) -> tuple[str, ...]:
    """Return the parameters and buffers that are not measured (biases, norms) and not what they were."""
    measured = ("weight", "bias") if bias else ("weight",)
    weights = {f"{layer}.{kind}" for layer in bench.layers for kind in measured}
    expected = {name: value for name, value in bench.base(_dtype(dtype)).state_dict().items() if name not in weights}
    state = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    found = {base: value for name, value in state if (base := _base_name(name)) in expected}
    return tuple(n for n, value in found.items() if not equal(value.cpu().to(expected[n].dtype), expected[n]))


def _shifted(bench: Bench, model: torch.nn.Module, dtype: str) -> Iterator[str]:
    """Yield the layers whose answer to zeros changed: a bias is lost or scaled, or a hook adds to the output."""
    for name, value in offsets(model, bench.layers).items():
        expected = _base_offsets(bench, dtype)[name]
        if norm(value - expected) > 8 * UNIT_ROUNDOFF[dtype] * norm(expected):
            yield f"{name}.bias"


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
