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

from harness.benches import Bench, get_bench
from harness.example import Example
from harness.files import LoraWeights, match_modules, read_lora, write_lora
from harness.loaders.isolation import TimeLimitExceeded
from harness.loaders.protocol import Subject
from harness.measure.compare import Fit, fit, fit_slices, norm
from harness.measure.effective import MissingModuleError, effective_weights, weights_while_running

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Limit = Callable[[str, "float | None"], AbstractContextManager[None]]  # label, seconds (None: the default)


@dataclass(frozen=True)
class Cell:
    """One place of the matrix: a loader, a file format and a bench."""

    subject: Subject
    format: str
    bench_name: str
    limit: Limit = field(default=lambda label, seconds: nullcontext(), compare=False)
    seconds: float | None = None

    @property
    def bench(self) -> Bench:
        """The bench itself."""
        return get_bench(self.bench_name)

    def reproduce(self, example: Example) -> str:
        """Return the command that repeats `example` in this cell."""
        where = f"{shlex.quote(self.subject.spec)} --format {self.format} --bench {self.bench_name}"
        everything = {t.name for t in example.targets} == set(self.bench.lora_layers)
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
    bench = cell.bench
    before = base_weights(bench, example.dtype)
    factors = example.factors(before)
    model = bench.build(_dtype(example.dtype))
    with tempfile.TemporaryDirectory(prefix="lora-harness-") as folder:
        path = write_example(cell.format, example, factors, Path(folder))
        written, order = _bytes(path), file_order(path, bench)
        try:
            for _ in range(loads):
                model = _call(cell, model, path, example)
            if unload:
                model = _guarded(cell, example, model, cell.subject.declaration.unload or (lambda _: None))
            with cell.limit(cell.reproduce(example), cell.seconds):  # a loader may do its work at the first forward
                after = effective_weights(model, bench.layers)
                if not any(_differs(before, after, t.name) for t in example.targets):
                    after = weights_while_running(model, bench.layers, bench.forward)
        except _CallFailedError as failed:
            return Observation(example, raised=failed.raised)
        except MissingModuleError as missing:
            return Observation(example, raised=Raised("LH902", f"the loaded model has no module {missing}"))
        except TimeLimitExceeded as late:
            return Observation(example, raised=Raised("LH901", f"the loaded model does not answer: {late}"))
        except Exception as error:
            return Observation(example, raised=Raised("LH902", f"the loaded model does not run: {describe(error)}"))
        file_changed = _bytes(path) != written
    others = _other_state(bench, model, example.dtype)
    return replace(_observe(bench, example, factors, before, after, others), file_changed=file_changed, order=order)


def _differs(before: Mapping[str, Tensor], after: Mapping[str, Tensor], name: str) -> bool:
    return not bool((before[name] == after[name]).all())


def file_order(path: Path, bench: Bench) -> tuple[str, ...]:
    """Return the targets of a written file, by their path in the model, in the order of the file's keys."""
    adapter = read_lora(path)
    names, _ = match_modules(adapter, bench.layers)
    return tuple(names[name] for name in adapter.modules)


def write_example(
    format_name: str, example: Example, factors: Mapping[str, tuple[Tensor, Tensor]], folder: Path
) -> Path:
    """Write the example's LoRA in `format_name` below `folder` and return what a loader gets."""
    modules = {t.name: LoraWeights(*factors[t.name], t.alpha) for t in example.targets}
    name = "adapter" if format_name == "peft" else "adapter.safetensors"
    return write_lora(folder / name, format_name, modules, key_order=example.key_order())


@cache
def base_weights(bench: Bench, dtype: str) -> dict[str, Tensor]:
    """Return the effective weights of the unloaded bench, in float64."""
    return effective_weights(bench.base(_dtype(dtype)), bench.layers)


def describe(error: BaseException) -> str:
    """Return `Type: first line` of an error, at most 300 characters."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"[:300].rstrip(": ")


def _observe(
    bench: Bench,
    example: Example,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    others: tuple[str, ...],
) -> Observation:
    from harness.measure.tolerance import coarser

    fits: dict[str, tuple[Fit, ...]] = {}
    for target in example.targets:
        a, b = factors[target.name]
        expected, dtype = example.strength * target.scale, coarser(example.dtype, example.file_dtype)
        pair = before[target.name], after[target.name], a, b
        slices = bench.slices(target.name)
        parts = fit_slices(*pair, slices, expected=expected, dtype=dtype) if len(slices) > 1 else ()
        fits[target.name] = (fit(*pair, expected=expected, dtype=dtype), *parts)
    untouched = [name for name in bench.layers if name not in fits]
    changed = tuple(n for n in untouched if norm(after[n] - before[n]) > _unchanged_limit(before[n], example.dtype))
    return Observation(
        example,
        fits,
        {name: after[name] - before[name] for name in (*fits, *changed)},
        {name: b.double() @ a.double() for name, (a, b) in factors.items()},
        changed + others,
        tuple(name for name in bench.layers if not bool(after[name].isfinite().all())),
    )


def _unchanged_limit(weight: Tensor, dtype: str) -> float:
    """An untouched layer may be re-cast (one rounding), nothing more."""
    from harness.measure.tolerance import UNIT_ROUNDOFF

    return 2 * UNIT_ROUNDOFF[dtype] * norm(weight)


def _other_state(bench: Bench, model: torch.nn.Module, dtype: str) -> tuple[str, ...]:
    """Return the parameters and buffers outside the measured layers (biases, norms) that are not what they were."""
    import torch

    weights = {f"{layer}.weight" for layer in bench.layers}
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
