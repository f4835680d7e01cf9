"""The sweep: a loader at many strengths beside the reference, and one verdict from the pictures alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from harness.errors import UserError
from harness.images.fixture import base_pipeline, lora_for
from harness.images.pipelines import Offload, OpenPipeline, open_pipeline
from harness.images.recorder import Recorder, SweepResult
from harness.images.report import sweep_verdict
from harness.images.sampling import Pair, determinism
from harness.images.studio import Studio
from harness.loaders.protocol import Subject

ALPHAS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_BATCH = {True: 24, False: 1}  # pictures per call: the tiny pipeline (measured: benchmarks/results.md), anything else


def run_sweep(
    subject: Subject,
    *,
    alphas: Sequence[float] = ALPHAS,
    pipeline: Path | str | OpenPipeline | None = None,
    lora: Path | None = None,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1),
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    quick: bool = False,
    out: Path | None = None,
    progress: bool = True,
    on_record: Callable[[dict[str, Any]], object] = lambda record: None,
    batch: int | None = None,
    steps: int | None = None,
    size: int | None = None,
    offload: Offload = "none",
    allow_download: bool = False,
    time_limit: float = 300.0,
) -> SweepResult:
    """Draw `subject` at every strength in `alphas` and judge its pictures against the reference's.

    `pipeline` is a saved diffusers pipeline (default: the tiny trained one), `lora` what the loader gets (default:
    rank 8, alpha 16, in a format the loader declares). Every prompt is drawn with every seed. `quick` compares one
    denoiser call instead of pictures. Pictures are saved as PNG under `out`/images. `on_record` gets each row as soon
    as it is measured, so that they survive an error later on. An open pipeline brings its own device, dtype, steps.
    `time_limit` is in seconds, for one load of the subject, which runs in this process.

    Raises:
        UserError: the pipeline, the LoRA or the prompts cannot be used, or the device has not enough memory.
    """
    started = time.perf_counter()
    strengths = _ordered(alphas)
    opened = pipeline if isinstance(pipeline, OpenPipeline) else None
    if opened is None:
        folder = pipeline if isinstance(pipeline, (str, Path)) else base_pipeline()
        more: dict[str, Any] = {"offload": offload, "allow_download": allow_download, "size": size, "steps": steps}
        opened = open_pipeline(folder, device=device, dtype=dtype, **more)
    pairs = [Pair(prompt, seed) for prompt in (opened.prompts if prompts is None else prompts) for seed in seeds]
    lora = lora or _default_lora(subject, opened)
    with determinism() as flags, _progress(progress, 2 * len(strengths) + 10) as step:
        size_of_batch = batch or _BATCH[opened.words is not None]
        studio = Studio(opened, lora, pairs, quick=quick, batch=size_of_batch, seconds=time_limit, step=step)
        environment = flags | {"torch": torch.__version__, "device": str(opened.device), "batch": studio.sampler.batch}
        result = Recorder(studio, subject, out, on_record, environment).run(strengths)
    if result.judgement is not None:
        seconds = round(time.perf_counter() - started, 3)
        result.verdicts.append(sweep_verdict(subject, studio, result.observations, result.judgement, seconds))
    return result


def _ordered(alphas: Sequence[float]) -> list[float]:
    unique = sorted({float(alpha) for alpha in alphas}, key=lambda alpha: (alpha != 0, abs(alpha), alpha))
    if not unique:
        raise UserError("alphas is empty: give at least one strength")
    return unique


def _default_lora(subject: Subject, opened: OpenPipeline) -> Path:
    if opened.words is None:
        raise UserError(f"no LoRA given: the committed ones were not trained on {opened.name}; name one (--lora)")
    return lora_for(subject.cells)


@contextmanager
def _progress(wanted: bool, total: int) -> Iterator[Callable[[str], object]]:
    """Show on stderr what is being drawn; `total` is the expected number of steps."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not wanted) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)
