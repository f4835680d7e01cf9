"""The place where pictures are taken: one pipeline, one LoRA, fixed prompts and seeds, and references on demand.

`pictures` are images of a full sampling run, or with `quick` the denoiser's raw output at one recorded call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from harness.errors import UserError, one_line
from harness.images.factor import Estimate, estimate
from harness.images.pipelines import OpenPipeline
from harness.images.reference import Reference, open_lora
from harness.images.sampling import Pair, Sampler, Scaling, runtime_scaling, same_branches
from harness.images.verdict import FARTHEST
from harness.isolation.jobs import Channel
from harness.isolation.limits import alarm
from harness.isolation.subject import Answer, Asked, Part, SubjectLostError
from harness.loaders.live import quiet
from harness.loaders.protocol import Subject
from harness.text import printable

LADDER = (0.0, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0, FARTHEST)
_SHARED: dict[tuple[object, ...], dict[float, Tensor]] = {}
_THE_SAME = 1e-4  # share of a change that rounding leaves unexplained
_LIKE = 0.1  # share of a change that rungs further apart than those of the ladder may leave unexplained
_SECONDS_TO_PAINT = 3600.0  # on the slowest of devices
_KEPT_BYTES = 2**28  # of a loaded denoiser that waits for its pictures
_SHARE_BELOW = 2_000_000  # values per strength: references of small pipelines are kept for the next loader


class Studio:
    """Takes the pictures of a sweep; references are drawn once per strength and kept.

    `step` is called with a short text before every strength that is drawn; one load may take `seconds`, 0 for ever.
    `number` tells it from the other studios of its sweep. A small denoiser that was loaded at one of the strengths
    `keeps` goes to `kept`, where the next one that is asked for at that strength is taken from.
    """

    def __init__(
        self,
        opened: OpenPipeline,
        lora: Path,
        pairs: Sequence[Pair],
        *,
        quick: bool = False,
        batch: int = 24,
        step: Callable[[str], object] = lambda text: None,
        number: int = 0,
    ) -> None:
        self.opened, self.lora, self.quick, self.step, self.number = opened, lora, quick, step, number
        self.adapter = open_lora(lora, opened)
        self._reference = Reference(opened, self.adapter)
        self.sampler = Sampler(opened, pairs, batch=batch)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] | None = None
        shared = _shared(opened, lora, self.sampler.pairs, quick)
        self._drawn: dict[float, Tensor] = {} if shared is None else shared
        self._is_shared = shared is not None
        self.seconds = 0.0
        self.keeps: Collection[float] = ()
        self.kept: dict[float, nn.Module] = {}
        self._share: Callable[[Any], object] | None = None
        self._painter: Asked | None = None

    def work_for(self, channel: Channel, seconds: float) -> None:
        """Take the pictures for a job from now on: tell `channel` of each step, and limit one load to `seconds`."""
        self.step, self.seconds = lambda text: channel.send({"step": text}), seconds
        self._share = channel.send if self._is_shared else None

    def draw_apart(self, painter: Asked) -> None:
        """Have another process draw the references from now on, by `painting`; this one leaves the device alone."""
        self._painter = painter

    def keep(self, strength: float, pictures: Tensor) -> None:
        """Take over a reference that another process drew."""
        self._drawn[strength] = pictures

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Modules of the file that the denoiser does not have."""
        return self._reference.unmatched

    def reference(self, strength: float) -> Tensor:
        """Return the reference's pictures `[n, ...]` at `strength`; 0 is the base."""
        if strength not in self._drawn:
            self.step(f"reference at {strength:g}")
            self._drawn[strength] = self._painted(strength) if self._painter else self.paint(strength)
            if self._share:
                self._share(
                    {"studio": self.number, "reference": strength, "tensors": {"pictures": self._drawn[strength]}}
                )
        return self._drawn[strength]

    def paint(self, strength: float) -> Tensor:
        """Draw the reference's pictures at `strength` in this process.

        Raises:
            UserError: the pipeline cannot; no loader is to blame for that.
        """
        try:
            return self._take(self._reference.at(strength))
        except (UserError, MemoryError):
            raise
        except Exception as error:
            what = f"the pipeline fails without any loader: {one_line(error)}"
            raise UserError(f"{printable(self.opened.name)}: {what}") from error

    def _painted(self, strength: float) -> Tensor:
        assert self._painter is not None
        try:
            answer = self._painter.ask({"studio": self.number, "strength": strength}, _SECONDS_TO_PAINT)
        except SubjectLostError as lost:
            answer = {"error": f"{self.opened.device}: the reference's pictures could not be drawn: {lost.what}"}
        if "error" in answer:
            raise UserError(answer["error"])
        pictures: Tensor = answer["tensors"]["pictures"]
        return pictures

    @property
    def shares_batches(self) -> bool:
        """Whether several strengths fit into one batch; full batches of one strength are as fast (measured)."""
        return not self.quick and len(self.sampler.pairs) < self.sampler.batch

    def candidates(self, subject: Subject, strengths: Sequence[float]) -> Iterator[tuple[float, Tensor, float]]:
        """Yield each strength, the subject's pictures `[n, ...]` and the seconds; what it raises comes through.

        Every strength is loaded into a copy of its own. When only the scalings of runtime adapters differ between the
        copies, all strengths are drawn in shared batches, else one after the other.
        """
        began = time.perf_counter()
        first = self.load(subject, strengths[0])
        shared = self.shares_batches and len(strengths) > 1
        scalings = self._scalings(subject, strengths, first) if shared else None
        if scalings is None:
            for number, strength in enumerate(strengths):
                model = first if number == 0 else self.load(subject, strength)
                images = self._take(model)
                if strength in self.keeps and _size(model) <= _KEPT_BYTES:
                    self.kept[strength] = model
                yield strength, images, time.perf_counter() - began
                began = time.perf_counter()
            return
        self.step(f"{subject.title}: {len(strengths)} strengths in shared batches")
        images = self.sampler.images_at(first, scalings)
        seconds = (time.perf_counter() - began) / len(strengths)
        yield from ((strength, one, seconds) for strength, one in zip(strengths, images, strict=True))

    def _scalings(self, subject: Subject, strengths: Sequence[float], first: nn.Module) -> list[Scaling] | None:
        """Return what each strength scales the adapters by, or None when a strength changes anything else."""
        found = runtime_scaling(first)
        if found is None:
            return None
        scalings = [found]
        for strength in strengths[1:]:
            model = self.load(subject, strength)
            scaling = runtime_scaling(model)
            if scaling is None or scaling.keys() != found.keys() or not same_branches(first, model):
                return None
            scalings.append(scaling)
        return scalings

    def load(self, subject: Subject, strength: float) -> nn.Module:
        """Load the LoRA into a fresh copy of the denoiser at `strength` with the subject, unless one was kept."""
        if strength in self.kept:
            return self.kept.pop(strength)
        self.step(f"{subject.title} at {strength:g}")
        model = self.opened.fresh()
        with quiet("diffusers", "transformers"), alarm(self.seconds) if self.seconds else nullcontext():
            loaded = subject.load(model, self.lora, strength=strength)
        return model if loaded is None else loaded

    def place(self, candidate: Tensor, *, asked: float = 1.0, near: float | None = None, refine: int = 3) -> Estimate:
        """Read the strength of `candidate` off the ladder on the side of `asked`, adding rungs where it stands.

        When it should stand `near` a strength, only 0 and that are drawn if it is the very picture there, else the
        rungs around it, and the others if it is not between those. In one denoiser call a loader that is right at the
        strength that was `asked` is known by the reference that is there anyway.
        """
        alike = float(f"{near:.2g}") if near is not None else asked if self.quick else None
        if alike is not None and (found := self._at(candidate, alike)):
            return found
        rungs = _side(asked) if near is None else rungs_around(near)
        ladder = {strength: self.reference(strength) for strength in rungs}
        found = estimate(candidate, ladder)
        if near is not None and not _inside(found, rungs):
            return self.place(candidate, asked=asked, refine=refine)
        for _ in range(refine):
            if found.residual < _THE_SAME or found.at_end or abs(found.strength) > 12:
                return found
            for strength in _around(found.strength, ladder):
                ladder[strength] = self.reference(strength)
            found = estimate(candidate, ladder)
        return found

    def _at(self, candidate: Tensor, rung: float) -> Estimate | None:
        """Return the estimate of a candidate that is the reference's pictures at `rung`, but for rounding."""
        if not rung:
            return None
        found = estimate(candidate, {strength: self.reference(strength) for strength in sorted((0.0, rung))})
        return found if found.residual < _THE_SAME and abs(found.strength / rung - 1) < _THE_SAME else None

    def _take(self, denoiser: nn.Module) -> Tensor:
        if not self.quick:
            return self.sampler.images(denoiser)
        if self._calls is None:
            self._calls = self.sampler.record(self.opened.fresh())
        return self.sampler.replay(denoiser, self._calls)


def _size(model: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def painting(studios: Sequence[Studio]) -> Answer:
    """Return what answers an order for a reference's pictures."""

    def answer(order: Any, on_part: Part) -> dict[str, Any]:
        try:
            return {"tensors": {"pictures": studios[order["studio"]].paint(order["strength"])}}
        except UserError as error:
            return {"error": str(error)}

    return answer


def _side(strength: float) -> tuple[float, ...]:
    """Return the rungs with the sign of a strength, and one of the other sign."""
    return (*LADDER, -1.0) if strength >= 0 else (*(-rung for rung in LADDER), 1.0)


def rungs_around(strength: float) -> tuple[float, ...]:
    """Return the rungs of the ladder from 0 to beyond a strength: 0, and the two on either side of it."""
    both = sorted({*LADDER, *_side(-1.0)})
    below = [rung for rung in both if rung < strength - 1e-9]
    above = [rung for rung in both if rung > strength + 1e-9]
    near = float(f"{strength:.2g}")
    return tuple(sorted({0.0, *below[-1:], near, *above[:1]}))


def _inside(found: Estimate, rungs: Sequence[float]) -> bool:
    """Whether a candidate stands between the rungs that were drawn, and looks like what they show."""
    low, high = min(rungs), max(rungs)
    at_ladders_end = abs(found.strength) >= LADDER[-1] and found.strength in (low, high)
    return found.residual <= _LIKE and (low < found.strength < high or at_ladders_end or found.strength == low == 0.0)


def _around(strength: float, ladder: Mapping[float, Tensor]) -> tuple[float, ...]:
    """Return a rung close to the estimate unless one is there already; rounded, so that loaders share rungs."""
    near = float(f"{strength:.2g}")
    spacing = max(0.05, 0.1 * abs(strength))
    wanted = (near, near - spacing, near + spacing)
    return tuple(round(w, 4) for w in wanted if all(abs(w - rung) > 0.4 * spacing for rung in ladder))


def _shared(opened: OpenPipeline, lora: Path, pairs: tuple[Pair, ...], quick: bool) -> dict[float, Tensor] | None:
    edge = opened.call.get("height")
    if edge is None or edge * edge * 3 * len(pairs) > _SHARE_BELOW:
        return None
    key = (opened.folder, lora.resolve(), pairs, opened.device, opened.dtype, quick, tuple(sorted(opened.call.items())))
    while len(_SHARED) > 4 and key not in _SHARED:
        _SHARED.pop(next(iter(_SHARED)))
    return _SHARED.setdefault(key, {})
