"""The work of a trial where the subject's code runs: the steps that a model is taken through, and its measuring.

Nothing is judged here: a process that foreign code runs in sends numbers only.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import equal  # bound here: a subject may replace torch's own

from harness.benches import Bench, Layer, get_bench
from harness.benches.layer import parameter_of
from harness.checks.changed import other_state, shifted, training
from harness.checks.experts import check_experts
from harness.checks.unloaded import base_output, base_weights, stored_layers
from harness.isolation.calls import guarded, listened
from harness.isolation.limits import alarm
from harness.loaders.protocol import Subject
from harness.measure.compare import norm
from harness.measure.effective import (
    dense_input,
    effective_weight,
    effective_weights,
    offsets,
    weights_while_running,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kind = Literal[
    "load",
    "unload",
    "set_strength",
    "rebuild",
    "aside",
    "run",
    "train",
    "copy",
    "cast",
    "lay_out",
    "save",
    "whole",
    "replace",
]
WEIGHT, DENSE = "weight:", "dense:"  # what the tensors of an answer are
NEXT = "next"  # the folder, beside a file, of what `replace` puts in its place
_CASTS = 2  # answers are compared that are each off by the rounding of the base's own
_UNSTEADY = 0.01  # of an answer: dropout changes tenths of it, rounding thousandths


@dataclass(frozen=True)
class Order:
    """A trial as the subject's process is told of it.

    `steps` are (kind, strength of the call or factor on the layers, path of the file), without a strength where the
    loader is called without one; `seconds` may each take, and so may the measuring. With `bias` the layers' biases are
    measured too, with `listen` what the loader says is kept.
    """

    bench: str
    dtype: str
    steps: tuple[tuple[Kind, float | None, str], ...]
    seconds: float
    bias: bool = False
    listen: bool = False


@dataclass
class Work:
    """The trial as it goes: the model as the last step left it, and what the calls changed in torch itself."""

    subject: Subject
    order: Order
    model: torch.nn.Module
    beside: torch.nn.Module | None = None
    times: float = 1.0
    left: list[str] = field(default_factory=list)
    last: tuple[str, float | None] = ("", None)
    is_cast: bool = False
    effects: list[Tensor] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    @classmethod
    def begun(cls, subject: Subject, order: Order) -> Work:
        """Return the work that an order asks for, on a fresh model.

        Raises:
            UserError: the bench is no model of the release that is here.
        """
        return cls(subject, order, get_bench(order.bench).build(_dtype(order.dtype)))

    @property
    def bench(self) -> Bench:
        """The bench that the model is one of."""
        return get_bench(self.order.bench)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model runs in, whatever a loader has put into it."""
        return _dtype("float32" if self.is_cast else self.order.dtype)

    def take(self, kind: Kind, number: float | None, path: str) -> None:
        """Do one step.

        Raises:
            CallFailedError: a call of the subject went wrong.
            TimeLimitExceeded: a step took too long.
        """
        if kind in _OURS:
            with alarm(self.order.seconds):
                _OURS[kind](self, number or 0.0, path)
        else:
            with listened(self.said) if self.order.listen else contextlib.nullcontext():
                self.model = guarded(self.model, self._call(kind, number, path), alarm(self.order.seconds), self.left)
            self.last = (path, number) if kind == "load" else self.last

    def rebuild(self, number: float, path: str) -> None:
        """Go on with a fresh model whose layers are multiplied by `number`."""
        self.model, self.times = _rebuilt(self.bench, self.order.dtype, number), number

    def aside(self, number: float, path: str) -> None:
        """Load a file into a model beside this one, which is there until the end, and go on with this one."""
        kept, last = self.model, self.last
        self.rebuild(1.0, "")
        self.take("load", number, path)
        self.beside, self.model, self.last = self.model, kept, last

    def run(self, number: float, path: str) -> None:
        """Run the model once."""
        self._answers(self.model)

    def train(self, number: float, path: str) -> None:
        """Run the model without gradients, and with them."""
        self._answers(self.model)
        self._answers(self.model, gradients=True)

    def copy(self, number: float, path: str) -> None:
        """Go on with a copy of the model."""
        before, self.model = self.model, copy.deepcopy(self.model)
        self._answers(self.model, before)
        self._answer_afresh()

    def cast(self, number: float, path: str) -> None:
        """Go on with the model in float32."""
        self._answers(self.model)
        self.model, self.is_cast = self.model.to(_dtype("float32")), True
        self._answers(self.model)

    def lay_out(self, number: float, path: str) -> None:
        """Have convolutions lie channels last in memory, as users do for speed: a view of all rows is none then."""
        import torch

        for weight in self.model.parameters():
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def save(self, number: float, path: str) -> None:
        """Save all of the model's state, and go on with a fresh model, loaded as the last one was, that gets it."""
        before, state = self.model, {name: value.clone() for name, value in self.model.state_dict().items()}
        self._load_afresh()
        self.model.load_state_dict(state)
        self._answers(self.model, before)
        self._answer_afresh()

    def whole(self, number: float, path: str) -> None:
        """Run the model, and the base with the weights that the model's layers show: all else is the same in both."""
        bench, base = self.bench, base_weights(self.bench, self.order.dtype)
        found = effective_weights(self.model, bench.layers, dtype=self.dtype)
        if all(self._as_before(base[name], found[name]) for name in bench.layers):
            found = weights_while_running(self.model, bench.layers, self._answer, dtype=self.dtype)
        self._answers(_with_weights(bench, self.order.dtype, found), self.model)

    def _load_afresh(self) -> None:
        path, strength = self.last
        self.rebuild(1.0, "")
        self.take("load", strength, path)

    def _answer_afresh(self) -> None:
        """Keep what another model answers that was loaded alike: what copying or saving undoes is gone in both."""
        kept = self.model
        self._load_afresh()
        self._answers(self.model)
        self.model = kept

    def _answers(self, *models: torch.nn.Module, gradients: bool = False) -> None:
        """Run each model, the copies before what they are made of, and keep what the LoRA changed in its answer."""
        plain = base_output(self.bench, self.order.dtype, self.is_cast)
        self.effects += [self._answer(model, gradients=gradients).double() - plain for model in models]

    def _answer(self, model: torch.nn.Module, *, gradients: bool = False) -> Tensor:
        return self.bench.forward(model, self.dtype, gradients=gradients)

    @property
    def drift(self) -> float:
        """How far apart the effects on models that should answer alike are, as a share of one of them.

        What a cast makes of the base's own answer, it makes of each: an effect below that cannot be told apart.
        """
        if not self.effects:
            return 0.0
        last = self.effects[-1]
        size = norm(last) or norm(self.effects[0])
        apart = max(norm(each - last) for each in self.effects) - self._cast_noise
        return max(0.0, apart) / size if size else 0.0

    @property
    def _cast_noise(self) -> float:
        if not self.is_cast:
            return 0.0
        half, single = (base_output(self.bench, self.order.dtype, cast) for cast in (False, True))
        return _CASTS * norm(half - single)

    def replace(self, number: float, path: str) -> None:
        """Put another file, or folder, in the place of `path`."""
        old, new = Path(path), Path(path).parent / NEXT / Path(path).name
        shutil.rmtree(old) if old.is_dir() else old.unlink()
        new.rename(old)

    def _experts_as_before(self, base: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Layer]:
        """Return the experts that are not merged: what is added to them is there only while the model runs."""
        every = ((name, layer) for name, layer in self.bench.layers.items() if layer.kind == "experts")
        return {name: layer for name, layer in every if self._as_before(base[name], found[name])}

    def _as_before(self, base: Tensor, found: Tensor) -> bool:
        return found is base or equal(base if self.times == 1 else self.times * base, found)

    def _call(self, kind: Kind, number: float | None, path: str) -> Callable[[torch.nn.Module], object]:
        """Return the call to make on the model; what the subject does not declare does nothing."""
        if kind == "load":
            return lambda model: self.subject.load(model, Path(path), **_strength(number))
        declared = self.subject.declaration
        if kind == "unload":
            return declared.unload or _nothing
        set_strength = declared.set_strength
        return (lambda model: set_strength(model, number or 0.0)) if set_strength else _nothing

    def measured(self) -> dict[str, Any]:
        """Return the layers that are not as in the base, what else is not, and what asked layers answer to input."""
        bench, dtype, bias, dense = self.bench, self.order.dtype, self.order.bias, dict[str, "Tensor"]()
        base, constants = base_weights(bench, dtype, bias), dict[str, "Tensor"]()
        with alarm(self.order.seconds):  # a loader may do its work at the first forward
            how: dict[str, Any] = {"bias": bias, "dense": dense, "dtype": self.dtype}
            stored = stored_layers(bench, dtype) if self.times == 1 else {}
            found = effective_weights(self.model, bench.layers, constants=constants, stored=stored, **how)
            if all(self._as_before(base[name], found[name]) for name in bench.layers):
                dense, constants = {}, {}
                found = weights_while_running(self.model, bench.layers, self._answer, **how | {"dense": dense})
            elif still := self._experts_as_before(base, found):
                constants = {}
                found |= weights_while_running(self.model, still, self._answer, **how)
            check_experts(self.model, bench, self._experts_as_before(base, found), self.order.dtype, self.times)
            if len(constants) < len(bench.layers):  # some layer ran, which may have changed others
                constants = {} if bias else offsets(self.model, bench.layers, self.dtype, stored)
            offset = () if bias else tuple(shifted(bench, constants, dtype))
            unsteady = list(_unsteady(self, found, dense))
        changed = {n: value for n, value in found.items() if value is not base[n] and not equal(value, base[n])}
        others = [*other_state(bench, self.model, dtype, bias), *offset, *self.left]
        tensors = {WEIGHT + name: value for name, value in changed.items()}
        tensors |= {DENSE + name: value for name, value in dense.items()}
        in_training = list(training(bench, self.model))
        return {
            "others": others,
            "training": in_training,
            "unsteady": unsteady,
            "drift": self.drift,
            "said": self.said,
            "tensors": tensors,
        }


_OURS: Mapping[Kind, Callable[[Work, float, str], None]] = {
    "rebuild": Work.rebuild,
    "aside": Work.aside,
    "run": Work.run,
    "train": Work.train,
    "copy": Work.copy,
    "cast": Work.cast,
    "lay_out": Work.lay_out,
    "save": Work.save,
    "whole": Work.whole,
    "replace": Work.replace,
}


def _strength(number: float | None) -> dict[str, float]:
    return {} if number is None else {"strength": number}


def _nothing(model: torch.nn.Module) -> None:
    return None


def _unsteady(work: Work, found: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the layers that answer the same input differently when they are asked once more.

    Only those are asked again whose answer to dense input is not that of their weight.
    """
    import torch

    if not dense:
        return
    modules, layers, like = dict(work.model.named_modules()), work.bench.layers, torch.empty(0, dtype=work.dtype)
    for name, answer in dense.items():
        x = dense_input(layers[name], work.dtype)
        if x is None or name not in modules or not _apart(answer, x.double() @ found[name][:, : x.shape[1]].T):
            continue
        if _apart(effective_weight(modules[name], layers[name], like, bias=work.order.bias), found[name]):
            yield name


def _apart(one: Tensor, other: Tensor) -> bool:
    return not norm(one - other) <= _UNSTEADY * norm(other)


def _rebuilt(bench: Bench, dtype: str, times: float) -> torch.nn.Module:
    model = bench.build(_dtype(dtype))
    if times == 1:
        return model  # what a weight is stored as may not be a number
    weights = (parameter_of(model, name, layer) for name, layer in bench.layers.items())
    for weight in {id(weight): weight for weight in weights if weight is not None}.values():
        weight.data.mul_(times)
    return model


def _with_weights(bench: Bench, dtype: str, weights: Mapping[str, Tensor]) -> torch.nn.Module:
    """Return the bench with other weights in its layers, [rows, columns] each."""
    model = bench.build(_dtype(dtype))
    for name, layer in bench.layers.items():
        weight, value = parameter_of(model, name, layer), weights[name]
        weight.data.copy_(value.T if layer.kind in ("transposed", "embedding") else value.reshape(weight.shape))
    return model


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
