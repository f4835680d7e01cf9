"""One trial: write the example as a file, let the loader load it, and measure every layer of the model afterwards."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from harness.benches import Bench, View, get_bench
from harness.checks.steps import File, Step, load
from harness.checks.written import bytes_of, copy_of, file_order, writable, write_example
from harness.errors import one_line
from harness.example import Example
from harness.isolation.limits import CallFailedError, Limit, Raised, TimeLimitExceeded, guarded, no_limit
from harness.loaders.protocol import Subject
from harness.measure.compare import Fit, norm
from harness.measure.effective import MissingModuleError, effective_weights, offsets, weights_while_running
from harness.measure.tolerance import UNIT_ROUNDOFF, coarser
from harness.variants import Update, Variant, get_variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Cell:
    """One place of the matrix: a loader, a file format, a bench and a variant of LoRA."""

    subject: Subject
    format: str
    bench_name: str
    variant_name: str = "lora"
    limit: Limit = field(default=no_limit, compare=False)
    seconds: float | None = None

    @property
    def bench(self) -> Bench:
        """The bench itself."""
        return get_bench(self.bench_name)

    @property
    def variant(self) -> Variant:
        """What the modules of the file are."""
        return get_variant(self.variant_name)

    @property
    def view(self) -> View:
        """The bench's layers as the file names them."""
        view = self.variant.view(self.bench)
        assert view is not None, f"{self.bench_name} has no layers for {self.variant_name}"
        return view

    @property
    def targets(self) -> tuple[str, ...]:
        """The layers a file of this cell may change."""
        return tuple(name for name in self.variant.targets(self.view) if writable(self.format, name))

    @property
    def possible(self) -> bool:
        """Whether the format can say the variant and the bench has layers for it."""
        formats = self.variant.formats
        fits = (formats is None or self.format in formats) and self.variant.view(self.bench) is not None
        return fits and len(self.targets) > 0

    def reproduce(self, example: Example) -> str:
        """Return the command that repeats `example` in this cell."""
        where = f"{shlex.quote(self.subject.spec)} --format {self.format} --bench {self.bench_name}"
        where += f" --variant {self.variant_name}" if self.variant_name != "lora" else ""
        everything = {t.name for t in example.targets} == set(self.targets)
        return f"lora-harness check {where} {example.as_options(everything=everything)}"


@dataclass(frozen=True)
class Observation:
    """What one trial showed: a fit per target (whole layer first, then its slices), and what else changed.

    `order` lists the targets as the keys of the file stand.
    """

    example: Example
    fits: Mapping[str, tuple[Fit, ...]] = field(default_factory=dict)
    changes: Mapping[str, Tensor] = field(default_factory=dict)
    products: Mapping[str, Tensor] = field(default_factory=dict)
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    others_changed: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()
    file_changed: bool = False
    order: tuple[str, ...] = ()
    raised: Raised | None = None


def run_trial(
    cell: Cell, example: Example, steps: Sequence[Step] = (load(),), *, other: Example | None = None
) -> Observation:
    """Take a fresh model through `steps`, by default one load of `example`, and measure it.

    `other` is the second file that a step may load.
    """
    import torch

    bench, bias = cell.bench, cell.variant.bias
    base = base_weights(bench, example.dtype, bias)
    updates = cell.variant.updates(example, cell.view, cell.view.gather(base))
    times = next((step.times for step in reversed(steps) if step.kind == "rebuild"), 1.0)
    before = base if times == 1 else {name: times * weight for name, weight in base.items()}
    model = bench.build(_dtype(example.dtype))
    with tempfile.TemporaryDirectory(prefix="lora-harness-") as folder:
        path = write_example(cell, example, updates, Path(folder))
        written, order = bytes_of(path), file_order(path, cell.view)

        def file(which: File) -> Path:
            if which == "other" and other is not None:
                own = cell.variant.updates(other, cell.view, cell.view.gather(base))
                return write_example(cell, other, own, Path(folder) / "other")
            return copy_of(path) if which == "copy" else path

        left: list[str] = []
        try:
            for step in steps:
                if step.kind == "rebuild":
                    model = _rebuilt(bench, example.dtype, step.times)
                    continue
                call = step.call(cell.subject, file, example.strength)
                model = guarded(model, call, cell.limit(cell.reproduce(example), cell.seconds), left)
            with cell.limit(cell.reproduce(example), cell.seconds):  # a loader may do its work at the first forward
                after = effective_weights(model, bench.layers, bias=bias)
                if all(torch.equal(before[name], after[name]) for name in bench.layers):
                    after = weights_while_running(model, bench.layers, bench.forward, bias=bias)
                shifted = () if bias else tuple(_shifted(bench, model, example.dtype))
        except CallFailedError as failed:
            return Observation(example, raised=failed.raised)
        except MissingModuleError as missing:
            return Observation(example, raised=Raised("LH902", f"the loaded model has no module {missing}"))
        except TimeLimitExceeded as late:
            return Observation(example, raised=Raised("LH901", f"the loaded model does not answer: {late}"))
        except Exception as error:
            return Observation(example, raised=Raised("LH902", f"the loaded model does not run: {one_line(error)}"))
        file_changed = bytes_of(path) != written
    view = cell.view
    seen = _observe(cell, example, updates, view.gather(before), view.gather(after))
    others = (*seen.others_changed, *_other_state(bench, model, example.dtype, bias), *shifted, *left)
    return replace(seen, others_changed=tuple(dict.fromkeys(others)), file_changed=file_changed, order=order)


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
def base_offsets(bench: Bench, dtype: str) -> dict[str, Tensor]:
    """Return what the layers of the unloaded bench answer to zeros, in float64."""
    return offsets(bench.base(_dtype(dtype)), bench.layers)


def _observe(
    cell: Cell,
    example: Example,
    updates: Mapping[str, Update],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> Observation:
    fits: dict[str, tuple[Fit, ...]] = {}
    dtype = coarser(example.dtype, example.file_dtype)
    for target in example.targets:
        name, expected = target.name, example.strength * cell.variant.scale(target)
        both = before[name], after[name], updates[name], cell.view.slices(name)
        fits[name] = cell.variant.fits(*both, expected=expected, dtype=dtype)
    untouched = [name for name in cell.view.layers if name not in fits]
    changed = tuple(n for n in untouched if norm(after[n] - before[n]) > _unchanged_limit(before[n], example.dtype))
    return Observation(
        example,
        fits,
        {name: after[name] - before[name] for name in (*fits, *changed)},
        {name: update.direction.product for name, update in updates.items()},
        {name: cell.view.layers[name].kernel for name in fits},
        changed,
        tuple(name for name in cell.view.layers if not bool(after[name].isfinite().all())),
    )


def _unchanged_limit(weight: Tensor, dtype: str) -> float:
    """An untouched layer may be re-cast (one rounding), nothing more."""
    return 2 * UNIT_ROUNDOFF[dtype] * norm(weight)


def _other_state(bench: Bench, model: torch.nn.Module, dtype: str, bias: bool) -> tuple[str, ...]:
    """Return the parameters and buffers that are not measured (biases, norms) and not what they were."""
    import torch

    measured = ("weight", "bias") if bias else ("weight",)
    weights = {f"{layer}.{kind}" for layer in bench.layers for kind in measured}
    expected = {name: value for name, value in bench.base(_dtype(dtype)).state_dict().items() if name not in weights}
    state = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    found = {base: value for name, value in state if (base := _base_name(name)) in expected}
    return tuple(n for n, value in found.items() if not torch.equal(value.cpu().to(expected[n].dtype), expected[n]))


def _shifted(bench: Bench, model: torch.nn.Module, dtype: str) -> Iterator[str]:
    """Yield the layers whose answer to zeros changed: a bias is lost or scaled, or a hook adds to the output."""
    for name, value in offsets(model, bench.layers).items():
        expected = base_offsets(bench, dtype)[name]
        if norm(value - expected) > 8 * UNIT_ROUNDOFF[dtype] * norm(expected):
            yield f"{name}.bias"


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
