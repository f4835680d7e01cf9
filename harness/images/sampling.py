"""Draw pictures with a pipeline: same initial noise for every denoiser, batches that shrink when memory runs out.

One batch may hold many strengths: a runtime adapter multiplies its branch by one scale per sample.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.images.pipelines import OpenPipeline
from harness.loaders.live import quiet

T = TypeVar("T")
Scaling = dict[str, dict[str, float]]  # layer path -> adapter name -> the factor PEFT multiplies B @ A with


@dataclass(frozen=True)
class Pair:
    """One picture to draw: a prompt and the seed of its initial noise."""

    prompt: str
    seed: int


class Sampler:
    """Draws the same `pairs` with one denoiser after another.

    `batch` is the number of pictures per pipeline call; it is halved for good when the device runs out of memory.
    """

    def __init__(self, opened: OpenPipeline, pairs: Sequence[Pair], *, batch: int = 24) -> None:
        if not pairs:
            raise UserError("nothing to draw: no prompt or no seed was given")
        self.opened, self.pairs, self.batch = opened, tuple(pairs), batch

    def images(self, denoiser: nn.Module) -> Tensor:
        """Return one picture per pair, float32 `[n, 3, height, width]` on the CPU, in 0..1 (or NaN)."""
        self.opened.install(denoiser)
        return torch.cat(list(self._in_batches(self.pairs, self._draw)))

    def images_at(self, denoiser: nn.Module, scalings: Sequence[Scaling]) -> Tensor:
        """Draw every pair under every scaling in shared batches: `[scalings, n, 3, height, width]`."""
        self.opened.install(denoiser)
        jobs = [(pair, scaling) for scaling in scalings for pair in self.pairs]

        def draw(some: Sequence[tuple[Pair, Scaling]]) -> Tensor:
            with per_sample(denoiser, [scaling for _, scaling in some]):
                return self._draw([pair for pair, _ in some])

        images = torch.cat(list(self._in_batches(jobs, draw)))
        return images.reshape(len(scalings), len(self.pairs), *images.shape[1:])

    def record(self, denoiser: nn.Module, *, share: float = 0.3) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Draw until `share` of the steps are done; return the arguments of the denoiser's next call, per batch."""
        self.opened.install(denoiser)
        skip = int(share * self.opened.call["num_inference_steps"])
        return list(self._in_batches(self.pairs, lambda some: self._record(denoiser, some, skip)))

    def replay(self, denoiser: nn.Module, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Tensor:
        """Answer recorded calls with another denoiser: its raw output, float32 `[n, ...]` on the CPU."""
        self.opened.install(denoiser)
        with torch.no_grad():
            return torch.cat([_first(denoiser(*args, **kwargs)).float().cpu() for args, kwargs in calls])

    def _draw(self, pairs: Sequence[Pair]) -> Tensor:
        call = self.opened.call | self.opened.conditioning([pair.prompt for pair in pairs])
        generators = [torch.Generator("cpu").manual_seed(pair.seed) for pair in pairs]
        with quiet("diffusers", "transformers"), torch.no_grad():
            drawn = self.opened.pipe(**call, generator=generators, output_type="pt")
        images: Tensor = drawn.images if hasattr(drawn, "images") else drawn.frames[:, 0]  # a video of one frame
        return images.float().cpu()

    def _record(self, denoiser: nn.Module, pairs: Sequence[Pair], skip: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args, kwargs))
            if len(seen) > skip:
                raise _Enough

        handle = denoiser.register_forward_pre_hook(watch, with_kwargs=True)
        try:
            with contextlib.suppress(_Enough):
                self._draw(pairs)
        finally:
            handle.remove()
        return seen[-1]

    def _in_batches(self, jobs: Sequence[T], draw: Callable[[Sequence[T]], Any]) -> Iterator[Any]:
        done = 0
        while done < len(jobs):
            try:
                yield draw(jobs[done : done + self.batch])
                done += self.batch
            except torch.OutOfMemoryError as error:
                self._shrink(error)

    def _shrink(self, error: torch.OutOfMemoryError) -> None:
        if self.batch == 1:
            first = str(error).partition("\n")[0]
            raise UserError(
                f"{self.opened.device}: out of memory with one picture at a time; use offload, a smaller size or half "
                f"precision ({first})"
            ) from error
        self.batch = self.batch // 2
        torch.cuda.empty_cache()


class _Enough(BaseException):
    """Raised inside the denoiser to stop a pipeline that has come as far as was wanted."""


@contextlib.contextmanager
def determinism() -> Iterator[dict[str, str]]:
    """Ask torch for repeatable results meanwhile; yields the flags as they were set, for the record."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    saved = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    flags = (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = False, True, False, False
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield {"deterministic_algorithms": "where there are any", "cudnn": "deterministic", "tf32": "off"}
    finally:
        torch.use_deterministic_algorithms(saved[0], warn_only=saved[1])
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = flags


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


class PerSample:
    """A factor per sample of the batch, which multiplies a tensor of any rank from the right.

    A batch that is a multiple as long (classifier-free guidance runs both halves at once) repeats the factors.
    """

    def __init__(self, values: Sequence[float]) -> None:
        self.values = torch.tensor(values)

    def __rmul__(self, branch: Tensor) -> Tensor:
        repeats, rest = divmod(len(branch), len(self.values))
        if rest:
            raise ValueError(f"a batch of {len(branch)} cannot be scaled by {len(self.values)} factors")
        factors = self.values.to(branch).repeat(repeats)
        return branch * factors.view(-1, *[1] * (branch.ndim - 1))


def runtime_scaling(model: nn.Module) -> Scaling | None:
    """Return the scalings of the PEFT layers that are active in `model`, or None when it has none or they are merged.

    Only plain LoRA branches qualify: variants (DoRA, ...) do not multiply a branch by the scaling alone.
    """
    found: Scaling = {}
    for name, layer in model.named_modules():
        if not (
            hasattr(layer, "lora_A")
            and hasattr(layer, "active_adapters")
            and isinstance(getattr(layer, "scaling", None), dict)
        ):
            continue
        if layer.merged or getattr(layer, "disable_adapters", False) or getattr(layer, "lora_variant", None):
            return None
        active = [adapter for adapter in layer.active_adapters if adapter in layer.scaling]
        if not all(isinstance(layer.scaling[adapter], (int, float)) for adapter in active):
            return None
        found[name] = {adapter: float(layer.scaling[adapter]) for adapter in active}
    return found or None


def same_branches(one: nn.Module, other: nn.Module) -> bool:
    """Tell whether two models hold the same weights and adapters, so that only scalings differ between them."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@contextlib.contextmanager
def per_sample(model: nn.Module, scalings: Sequence[Scaling]) -> Iterator[None]:
    """Give sample i of the next forwards the scalings `scalings[i]`; restored afterwards, whatever happens.

    PEFT keeps the factor in the layer's `scaling` dictionary and multiplies by it, so an object that knows how to
    multiply can stand in for the number.
    """
    layers = dict(model.named_modules())
    saved: Mapping[str, dict[str, float]] = {name: dict(layers[name].scaling) for name in scalings[0]}
    try:
        for name, adapters in scalings[0].items():
            for adapter in adapters:
                layers[name].scaling[adapter] = PerSample([s[name][adapter] for s in scalings])
        yield
    finally:
        for name, values in saved.items():
            layers[name].scaling.update(values)
