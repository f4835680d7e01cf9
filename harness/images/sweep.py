"""The sweep: a loader at many strengths beside the reference, and one verdict from the pictures alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import TypeAdapter

from harness.errors import UserError
from harness.images.fixture import base_pipeline, lora_for
from harness.images.pipelines import Offload, OpenPipeline, open_pipeline
from harness.images.recorder import Recorder, SweepResult, drawing
from harness.images.report import died_verdict
from harness.images.sampling import Pair, determinism
from harness.images.sequential import InTurn, studios_of
from harness.images.studio import Studio, painting
from harness.isolation.jobs import Channel, JobEnd, run_jobs
from harness.isolation.limits import GIB
from harness.isolation.processes import can_fork
from harness.isolation.subject import Asked, subject_process
from harness.loaders.protocol import Subject

_RESULT = TypeAdapter(SweepResult)
ALPHAS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
_BATCH = {True: 24, False: 1}  # pictures per call: the tiny pipeline (measured: benchmarks/results.md), anything else


@dataclass(frozen=True)
class SweepOptions:
    """What to draw, with what, and where to.

    `pipeline` is a saved diffusers pipeline (default: the tiny trained one), `lora` what the loader gets (default:
    rank 8, alpha 16, in a format the loader declares). Every prompt is drawn with every seed at every strength in
    `alphas`. `quick` compares one denoiser call instead of pictures. Pictures are saved as PNG under `out`/images. An
    open pipeline brings its own device, dtype, size and steps. With `sequential` one denoiser call is compared at every
    strength, and pictures are drawn only until both say the same for sure. `time_limit` is in seconds, for one load of
    the subject. `workers=0` draws in this process, on all its threads; a child has one.
    """

    alphas: Sequence[float] = ALPHAS
    pipeline: Path | str | OpenPipeline | None = None
    lora: Path | None = None
    prompts: Sequence[str] | None = None
    seeds: Sequence[int] = (0, 1)
    device: str = "cpu"
    dtype: torch.dtype | None = None
    quick: bool = False
    sequential: bool = False
    out: Path | None = None
    progress: bool = True
    batch: int | None = None
    steps: int | None = None
    size: int | None = None
    offload: Offload = "none"
    allow_download: bool = False
    time_limit: float = 300.0
    workers: int = 1

    @property
    def strengths(self) -> list[float]:
        """The strengths to draw, 0 first, then from the smallest to the largest.

        Raises:
            UserError: there is none, or one is not finite.
        """
        if not self.alphas:
            raise UserError("alphas is empty: give at least one strength")
        if odd := [alpha for alpha in self.alphas if not math.isfinite(alpha)]:
            raise UserError(f"alphas has {odd[0]}: strengths are finite numbers")
        return sorted({float(alpha) for alpha in self.alphas}, key=lambda alpha: (alpha != 0, abs(alpha), alpha))

    @property
    def in_turns(self) -> bool:
        """Whether pictures are drawn in turns, until they are sure."""
        return self.sequential and not self.quick

    def opened(self) -> OpenPipeline:
        """Open the pipeline.

        Raises:
            UserError: it cannot be opened.
        """
        if isinstance(self.pipeline, OpenPipeline):
            return self.pipeline
        return open_pipeline(
            self.pipeline or base_pipeline(),
            device=self.device,
            dtype=self.dtype,
            offload=self.offload,
            allow_download=self.allow_download,
            size=self.size,
            steps=self.steps,
        )


def run_sweep(
    subject: Subject,
    options: SweepOptions = SweepOptions(),
    *,
    on_record: Callable[[dict[str, Any]], object] = lambda record: None,
    **changes: Any,
) -> SweepResult:
    """Draw `subject` at every strength and judge its pictures against the reference's.

    `changes` are fields of `options` by name. `on_record` gets each row as soon as it is measured. The subject loads
    and draws in a child process: one that hangs or dies is an errored verdict, and what it drew before is kept. On
    CUDA another child draws the references, since what is forked from a process that has opened the driver cannot use
    it. On other devices, or where this process has initialised CUDA itself, the subject runs here: a process that ends
    then takes this one with it, and only Python code can be interrupted.

    Raises:
        UserError: the pipeline, the LoRA or the prompts cannot be used, or the device has not enough memory.
    """
    heard = _OneSweep(lambda _, record: on_record(record))
    run_sweeps([subject], replace(options, **changes), heard)
    return heard.result


class Hearer(Protocol):
    """Who hears of the sweeps of several subjects; `index` is the subject's place among them."""

    def record(self, index: int, record: dict[str, Any]) -> object:
        """Hear of a row, as soon as it is measured."""

    def ended(self, index: int, result: SweepResult | UserError) -> object:
        """Hear of a whole sweep, as soon as it is over, or why it could not be made."""


@dataclass
class _OneSweep:
    """Hears of one sweep."""

    on_record: Callable[[int, dict[str, Any]], object]
    result: SweepResult = field(default_factory=SweepResult)

    def record(self, index: int, record: dict[str, Any]) -> None:
        self.on_record(index, record)

    def ended(self, index: int, result: SweepResult | UserError) -> None:
        if isinstance(result, UserError):
            raise result
        self.result = result


def run_sweeps(subjects: Sequence[Subject], options: SweepOptions, hearer: Hearer) -> None:
    """Draw each of `subjects` as `run_sweep` does, as many at once as `options.workers` says: on CUDA one by one."""
    drawn = list(_all_begun(subjects, options, hearer))
    if not drawn:
        return
    at_once = options.workers
    if drawn[0].on_cuda:
        at_once = 1 if can_fork(gpu=True) else 0
    total = sum(2 * len(each.strengths) + 10 for each in drawn)
    with determinism() as flags, _progress(options.progress, total) as step:
        for each in drawn:
            each.step, each.flags = step, flags
        jobs, workers = [each.draw for each in drawn], at_once if drawn[0].apart else 0
        ends = run_jobs(jobs, workers=workers, on_event=lambda index, event: drawn[index].take(event))
    for each, end in zip(drawn, ends, strict=True):
        each.end(end)


def _all_begun(subjects: Sequence[Subject], options: SweepOptions, hearer: Hearer) -> Iterator[_Drawn]:
    """Yield a sweep for every subject that can be drawn with; they share the pipeline."""
    for index, subject in enumerate(subjects):
        try:
            drawn = _Drawn.of(index, subject, options, hearer)
        except UserError as error:
            hearer.ended(index, error)
            continue
        options = replace(options, pipeline=drawn.studios[0].opened)
        yield drawn


@dataclass
class _Drawn:
    """A sweep under way: what is drawn in the child that `draw` runs in, and what `take` has of it here."""

    index: int
    subject: Subject
    options: SweepOptions
    strengths: Sequence[float]
    studios: Sequence[Studio]
    hearer: Hearer
    step: Callable[[str], object] = lambda text: None
    flags: Mapping[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    over: bool = False

    @classmethod
    def of(cls, index: int, subject: Subject, options: SweepOptions, hearer: Hearer) -> _Drawn:
        """Return the sweep of a subject, nothing of it drawn yet."""
        strengths, opened = options.strengths, options.opened()
        prompts = opened.prompts if options.prompts is None else options.prompts
        pairs = [Pair(prompt, seed) for prompt in prompts for seed in options.seeds]
        batch = options.batch or _BATCH[opened.words is not None]
        lora = options.lora or _default_lora(subject, opened)
        studio = Studio(opened, lora, pairs, quick=options.quick, batch=batch)
        studios = studios_of(studio) if options.in_turns else [studio]
        return cls(index, subject, options, strengths, studios, hearer)

    @property
    def on_cuda(self) -> bool:
        """Whether the pictures are drawn on CUDA."""
        return self.studios[0].opened.device.type == "cuda"

    @property
    def apart(self) -> bool:
        """Whether the subject runs in a child."""
        return self.options.workers > 0 and (self.on_cuda or self.studios[0].opened.device.type == "cpu")

    def draw(self, channel: Channel) -> None:
        """Draw, and send each row, each reference and the result."""
        started = time.perf_counter()
        for studio in self.studios:
            studio.work_for(channel, self.options.time_limit)
        apart, subject, memory = self.apart and channel.apart, self.subject, _memory(self.studios[0].opened)
        work = drawing(self.studios, subject)
        try:
            with (
                _painter(self.studios, apart),
                subject_process(
                    work,
                    prepare=subject.prepare,
                    is_over=subject.is_over,
                    apart=apart,
                    memory_limit=memory,
                    gpu=self.on_cuda,
                ) as asked,
            ):
                result = self._recorder(channel, asked).run(self.strengths, started)
                channel.send({"result": _RESULT.dump_python(result)})
        except UserError as error:
            channel.send({"error": str(error)})

    def _recorder(self, channel: Channel, asked: Asked) -> Recorder | InTurn:
        place = self.subject, self.options.out, lambda row: channel.send({"record": row}), asked
        if self.options.in_turns:
            return InTurn(self.studios, *place)
        return Recorder(self.studios[0], *place)

    def take(self, event: dict[str, Any]) -> None:
        """Keep what `draw` sent, and hand it on."""
        if "error" in event:
            self._is_over(UserError(event["error"]))
        elif "result" in event:
            self._is_over(_RESULT.validate_python(event["result"]))
        elif "record" in event:
            self.records.append(event["record"])
            self.hearer.record(self.index, event["record"])
        elif "reference" in event:
            self.studios[event["studio"]].keep(event["reference"], event["tensors"]["pictures"])
        else:
            self.step(event["step"])

    def end(self, end: JobEnd) -> None:
        """Say how it ended, where it could not say so itself: what it drew before is kept."""
        if not self.over:
            died = died_verdict(self.subject, self.studios[-1], end)
            self._is_over(end.trouble or SweepResult(records=self.records, verdicts=[died]))

    def _is_over(self, result: SweepResult | UserError) -> None:
        self.over = True
        if isinstance(result, SweepResult):
            opened, batch = self.studios[-1].opened, self.studios[-1].sampler.batch
            device = {"torch": torch.__version__, "device": str(opened.device), "batch": batch}
            result.environment = dict(self.flags) | device
        self.hearer.ended(self.index, result)


@contextmanager
def _painter(studios: Sequence[Studio], apart: bool) -> Iterator[None]:
    """On CUDA, have a process of its own draw the references: a subject is forked from this one."""
    if not apart or studios[0].opened.device.type != "cuda":
        yield
        return
    with subject_process(painting(studios), apart=True, gpu=True) as asked:
        for studio in studios:
            studio.draw_apart(asked)
        yield


def _memory(opened: OpenPipeline) -> int | None:
    """Return the bytes that drawing may take over what is there: copies of the denoiser, room for activations.

    None on CUDA, whose driver reserves addresses for all memory of the machine and the device.
    """
    if opened.device.type == "cuda":
        return None
    return 4 * GIB + 8 * sum(weight.nbytes for weight in opened.base.parameters())


def _default_lora(subject: Subject, opened: OpenPipeline) -> Path:
    if opened.words is None:
        raise UserError(f"no LoRA given: the committed ones were not trained on {opened.name}; name one (--lora)")
    return lora_for(subject.cells)


@contextmanager
def _progress(wanted: bool, total: int) -> Iterator[Callable[[str], object]]:
    """Show on stderr what is being drawn; `total` is the expected number of steps.

    The bar is redrawn by hand: a refreshing thread must not run while a child is forked.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=not wanted) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text, refresh=True)
