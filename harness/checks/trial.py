"""One trial: write the example as a file, let the loader load it, and measure every layer of the model afterwards."""

from __future__ import annotations

import shlex
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from harness.benches import Bench, View, get_bench
from harness.example import Example
from harness.files import FORMATS, LoraParts, LoraWeights, match_modules, read_lora, write_lora
from harness.loaders.isolation import TimeLimitExceeded
from harness.loaders.protocol import Subject
from harness.measure.compare import Fit, norm
from harness.measure.effective import MissingModuleError, effective_weights, weights_while_running
from harness.measure.tolerance import UNIT_ROUNDOFF, coarser
from harness.variants import Update, Variant, get_variant

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Limit = Callable[[str, "float | None"], AbstractContextManager[None]]  # label, seconds (None: the default)


@dataclass(frozen=True)
class Cell:
    """One place of the matrix: a loader, a file format, a bench and a variant of LoRA."""

    subject: Subject
    format: str
    bench_name: str
    variant_name: str = "lora"
    limit: Limit = field(default=lambda label, seconds: nullcontext(), compare=False)
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
        return tuple(name for name in self.variant.targets(self.view) if _writable(self.format, name))

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
class Raised:
    """The loader raised, answered with rubbish or left a model that cannot be measured: `code` is LH901 or LH902."""

    code: str
    what: str


@dataclass(frozen=True)
class Observation:
    """What one trial showed: a fit per target (whole layer first, then its slices), and what else changed.

    `order` lists the targets as the keys of the file stand.
    """

    example: Example
    fits: Mapping[str, tuple[Fit, ...]] = field(default_factory=dict)
    changes: Mapping[str, Tensor] = field(default_factory=dict)
    products: Mapping[str, Tensor] = field(default_factory=dict)
    others_changed: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()
    file_changed: bool = False
    order: tuple[str, ...] = ()
    raised: Raised | None = None


def run_trial(cell: Cell, example: Example, *, loads: int = 1, unload: bool = False) -> Observation:
    """Load `example` with the cell's loader into a fresh model, `loads` times over, and measure it.

    With `unload` the loader's declared unload runs before measuring.
    """
    import torch

    bench, bias = cell.bench, cell.variant.bias
    before = base_weights(bench, example.dtype, bias)
    updates = cell.variant.updates(example, cell.view, cell.view.gather(before))
    model = bench.build(_dtype(example.dtype))
    with tempfile.TemporaryDirectory(prefix="lora-harness-") as folder:
        path = write_example(cell, example, updates, Path(folder))
        written, order = _bytes(path), file_order(path, cell.view)
        try:
            for _ in range(loads):
                model = _call(cell, model, path, example)
            if unload:
                model = _guarded(cell, example, model, cell.subject.declaration.unload or (lambda _: None))
            with cell.limit(cell.reproduce(example), cell.seconds):  # a loader may do its work at the first forward
                after = effective_weights(model, bench.layers, bias=bias)
                if all(torch.equal(before[name], after[name]) for name in bench.layers):
                    after = weights_while_running(model, bench.layers, bench.forward, bias=bias)
        except _CallFailedError as failed:
            return Observation(example, raised=failed.raised)
        except MissingModuleError as missing:
            return Observation(example, raised=Raised("LH902", f"the loaded model has no module {missing}"))
        except TimeLimitExceeded as late:
            return Observation(example, raised=Raised("LH901", f"the loaded model does not answer: {late}"))
        except Exception as error:
            return Observation(example, raised=Raised("LH902", f"the loaded model does not run: {describe(error)}"))
        file_changed = _bytes(path) != written
    view = cell.view
    seen = _observe(cell, example, updates, view.gather(before), view.gather(after))
    others = seen.others_changed + _other_state(bench, model, example.dtype, bias)
    return replace(seen, others_changed=others, file_changed=file_changed, order=order)


def file_order(path: Path, view: View) -> tuple[str, ...]:
    """Return the targets of a written file, by their name in `view`, in the order of the file's keys."""
    adapter = read_lora(path)
    names, _ = match_modules(adapter, view.layers)
    return tuple(names[name] for name in adapter.modules)


def write_example(cell: Cell, example: Example, updates: Mapping[str, Update], folder: Path) -> Path:
    """Write the example's LoRA below `folder` as the cell's format says it and return what a loader gets."""
    modules = {t.name: _weights(updates[t.name].parts, t.alpha) for t in example.targets}
    name = "adapter" if FORMATS[cell.format].folder else "adapter.safetensors"
    order, prefix = example.key_order(), _prefix(cell.format, cell.bench.component)
    root = cell.variant.root
    return write_lora(folder / name, cell.format, modules, rslora=root, key_order=order, prefix=prefix)


def _weights(parts: Mapping[str, Tensor], alpha: float | None) -> LoraWeights | LoraParts:
    return LoraWeights(parts["A"], parts["B"], alpha) if set(parts) == {"A", "B"} else LoraParts(parts, alpha)


def _writable(format_name: str, layer: str) -> bool:
    naming = FORMATS[format_name].naming
    return naming is None or naming.write(layer) is not None


_OTHER_WORDS = {"text_encoder": ("te", "text_encoders")}  # what kohya and ComfyUI call the part


def _prefix(format_name: str, component: str) -> str | None:
    """Return how keys of `component` begin where that is not the format's own way."""
    row = FORMATS[format_name]
    words = {component, *_OTHER_WORDS.get(component, ())}
    if component == "transformer" or row.prefixes.get(row.write_prefix) in words:
        return None
    return next((prefix for prefix, part in row.prefixes.items() if part in words), None)


@cache
def base_weights(bench: Bench, dtype: str, bias: bool = False) -> dict[str, Tensor]:
    """Return the effective weights of the unloaded bench, in float64, with their biases when asked."""
    return effective_weights(bench.base(_dtype(dtype)), bench.layers, bias=bias)


def describe(error: BaseException) -> str:
    """Return `Type: first line` of an error, at most 300 characters."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"[:300].rstrip(": ")


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
    expected = bench.base(_dtype(dtype)).state_dict()
    found = {_base_name(name): value for name, value in model.state_dict().items()}
    return tuple(
        name
        for name, value in expected.items()
        if name not in weights and name in found and not torch.equal(found[name].cpu().to(value.dtype), value)
    )


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


class _CallFailedError(Exception):
    def __init__(self, raised: Raised) -> None:
        self.raised = raised


def _call(cell: Cell, model: torch.nn.Module, path: Path, example: Example) -> torch.nn.Module:
    return _guarded(cell, example, model, lambda m: cell.subject.load(m, path, strength=example.strength))


def _guarded(
    cell: Cell, example: Example, model: torch.nn.Module, call: Callable[[torch.nn.Module], object]
) -> torch.nn.Module:
    """Run one call of the subject under the time limit, its warnings and default dtype kept to itself."""
    import torch

    try:
        with cell.limit(cell.reproduce(example), cell.seconds), _contained():
            result = call(model)
    except TimeLimitExceeded as late:
        raise _CallFailedError(Raised("LH901", str(late))) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a subject that raises SystemExit is data, not the end of the run
        raise _CallFailedError(Raised("LH901", describe(error))) from error
    if result is not None and not isinstance(result, torch.nn.Module):
        what = f"load returned {type(result).__name__}, but should return the model or None"
        raise _CallFailedError(Raised("LH902", what))
    return (model if result is None else result).eval()


@contextmanager
def _contained() -> Iterator[None]:
    import torch

    dtype = torch.get_default_dtype()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(dtype)


def _bytes(path: Path) -> dict[str, bytes]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
