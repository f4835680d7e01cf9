"""From pictures to observations and rows: one strength after the other, kept as soon as it is measured."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.errors import UserError
from harness.images import metrics
from harness.images.report import crashed_verdict, lora_facts, sweep_verdict
from harness.images.studio import Studio
from harness.images.verdict import FARTHEST, Judgement, Look, StrengthResult, judge, look_of
from harness.isolation.calls import CallFailedError, Raised, lost_raised, raised_by
from harness.isolation.limits import TimeLimitExceeded
from harness.isolation.subject import Answer, Asked, Part, SubjectLostError
from harness.loaders.protocol import Subject
from harness.outputs import replacing
from harness.verdict.verdict import Verdict


def to_bytes(image: Tensor) -> Any:
    """Return a picture `[3, height, width]` in 0..1 as a uint8 array `[height, width, 3]`; NaN becomes magenta."""
    shown = torch.where(image.isfinite(), image, torch.tensor([1.0, 0.0, 1.0])[:, None, None])
    return (shown.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def save_image(image: Tensor, path: Path) -> Path:
    """Write one picture `[3, height, width]` as PNG."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=False) as stream:
        Image.fromarray(to_bytes(image)).save(stream, "PNG", optimize=True)
    return path


_MEDIANS = ("total_variation_ratio", "noise_sigma_ratio", "content")
_PATIENCE = 20.0  # times as long as the reference took may the subject's pictures of one strength take
_SHARP = 2.5  # a strength up to which pictures follow it closely


@dataclass
class SweepResult:
    """What a sweep found; `records` has one JSON-able row per strength (kind "sweep"), in the order drawn."""

    verdicts: list[Verdict] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    observations: list[StrengthResult] = field(default_factory=list)
    judgement: Judgement | None = None
    environment: dict[str, Any] = field(default_factory=dict)


class Recorder:
    """Turns the pictures of one subject into observations and rows.

    `near` says which strength the pictures at a strength should look like, where that is known.
    """

    def __init__(
        self,
        studio: Studio,
        subject: Subject,
        out: Path | None,
        on_record: Callable[[dict[str, Any]], object],
        asked: Asked,
        near: Mapping[float, float] | None = None,
    ) -> None:
        self.studio, self.subject, self.out, self.on_record, self.asked = studio, subject, out, on_record, asked
        self._near = near or {}
        self.result = SweepResult()
        self._own_noise, self._at = 0.0, ""

    def run(self, alphas: Sequence[float], started: float) -> SweepResult:
        """Draw all strengths and judge; a crash of the subject becomes an errored verdict, what was drawn is kept.

        `started` is when the sweep began, by `time.perf_counter`.
        """
        found = self.result
        try:
            self.draw_all(alphas)
        except CallFailedError as failed:
            found.verdicts.append(crashed_verdict(self.subject, self.studio, failed.raised))
        else:
            found.judgement = judge(found.observations)
            seconds = round(time.perf_counter() - started, 3)
            found.verdicts.append(
                sweep_verdict(self.subject, self.studio, found.observations, found.judgement, seconds)
            )
        return found

    def draw_all(self, strengths: Sequence[float], keep: Collection[float] = ()) -> None:
        """Have the subject draw, and once more where that tells a factor far off; `keep` as for `draw`.

        Raises:
            UserError: the pictures do not fit the device's memory.
            CallFailedError: the subject raised, or its process ended or sent something else.
        """
        self.draw(strengths, keep)
        if (strength := self._pin()) is not None:
            self.draw([strength])

    def draw(self, strengths: Sequence[float], keep: Collection[float] = ()) -> None:
        """Have the subject draw, and record each strength as soon as it is there.

        What was loaded at the strengths `keep` may be drawn again by the next order.

        Raises:
            UserError: the pictures do not fit the device's memory.
            CallFailedError: the subject raised, or its process ended or sent something else.
        """
        began = time.monotonic()
        shape = self.studio.reference(0.0).shape  # drawn before the subject's process starts, which inherits it
        patience = self.studio.seconds + _PATIENCE * (time.monotonic() - began + 1.0) * len(strengths)
        waiting = list(strengths)

        def take(part: Any) -> None:
            if "step" in part:
                self._at = str(part["step"])
                self.studio.step(self._at)
                return
            images = part["tensors"]["images"]
            if part["strength"] not in waiting or images.shape != shape:
                raise CallFailedError(Raised("LH901", "its process sent pictures that nobody asked for"))
            waiting.remove(part["strength"])
            cost = {"seconds": round(float(part["seconds"]), 4), "peak_memory": _number(part["peak_memory"])}
            self._record(part["strength"], images, cost)

        order = {"studio": self.studio.number, "strengths": waiting.copy(), "keep": list(keep)}
        try:
            end = self.asked.ask(order, patience, take, parts=3 * len(strengths) + 5)
        except SubjectLostError as lost:
            raise CallFailedError(lost_raised(lost, f" ({self._at})" if self._at else "")) from lost
        if "error" in end:
            raise UserError(str(end["error"]))
        if "raised" in end:
            raise CallFailedError(Raised(**end["raised"]))

    def _pin(self) -> float | None:
        """Return the strength at which this loader should look as trained, when no strength was near it yet.

        Far off, pictures tell only the order of magnitude; one more strength near 1 / factor tells the factor. Beyond
        the farthest they tell nothing, and 1 is tried.
        """
        asked = [o.strength for o in self.result.observations if o.strength]
        if asked and min(map(abs, asked)) > FARTHEST:
            return 1.0
        seen = [(o.strength, o.factor) for o in self.result.observations if o.strength and o.factor]
        if not seen or any(abs(strength * factor) < _SHARP for strength, factor in seen):
            return None
        factor = min(seen, key=lambda pair: abs(pair[0] * pair[1]))[1]
        return float(f"{1 / factor:.3g}")

    def _record(self, strength: float, images: Tensor, cost: dict[str, Any]) -> None:
        observation, values = self._observe(strength, images)
        row = self._row(images, observation, values) | cost
        self.result.observations.append(observation)
        self.result.records.append(row)
        self.on_record(row)

    def _observe(self, strength: float, images: Tensor) -> tuple[StrengthResult, dict[str, float]]:
        base, reference = self.studio.reference(0.0), self.studio.reference(strength)
        if self.studio.quick:
            values, look = _raw_values(images, base, reference)
        else:
            values, look = _picture_values(images, base, reference, self.studio.reference(1.0))
            if strength == 0:
                self._own_noise = 1 - values["ssim_base"]
        estimate = (
            None
            if look in ("broken", "black", "one colour")
            else self.studio.place(images, asked=strength, near=self._near.get(strength))
        )
        return StrengthResult(strength, estimate, values["effect"], self._own_noise, look), values

    def _row(self, images: Tensor, observation: StrengthResult, values: dict[str, float]) -> dict[str, Any]:
        opened, placed = self.studio.opened, observation.estimate
        shown: dict[str, float | None] = {**values, "factor": observation.factor}
        shown |= {"looks_like": placed.strength, "residual": placed.residual} if placed else {}
        return {
            "kind": "sweep",
            "loader": self.subject.title,
            "lora": lora_facts(self.studio.adapter),
            "strength": observation.strength,
            "metrics": {name: None if value is None else round(float(value), 6) for name, value in shown.items()},
            "images": self._save(observation.strength, images) if self.out and not self.studio.quick else [],
            "device": str(opened.device),
            "dtype": str(opened.dtype).removeprefix("torch."),
            "pipeline": opened.name,
            "label": observation.look,
        }

    def _save(self, strength: float, images: Tensor) -> list[dict[str, Any]]:
        roles = {"candidate": images, "reference": self.studio.reference(strength)}
        if strength == 0:
            roles["base"] = self.studio.reference(0.0)
        saved = []
        for role, pictures in roles.items():
            for number, (pair, picture) in enumerate(zip(self.studio.sampler.pairs, pictures, strict=True)):
                name = f"images/{_slug(self.subject.title)}/{role}_{strength:g}_{number:02d}.png"
                save_image(picture, (self.out or Path()) / name)
                saved.append({"path": name, "prompt": pair.prompt, "seed": pair.seed, "role": role})
        return saved


def _picture_values(images: Tensor, base: Tensor, reference: Tensor, trained: Tensor) -> tuple[dict[str, float], Look]:
    measured = metrics.measure(images, base, trained)
    values = {name: _middle(name, value.double()) for name, value in measured.items()}
    shown = metrics.finite(images)
    values["ssim_trained"] = values.pop("ssim_reference")
    values["ssim_reference"] = float(metrics.ssim(shown, reference).mean())
    values["effect"] = float(1 - metrics.ssim(base, reference).mean())
    for name, look in (("broken", "broken"), ("black", "black"), ("collapsed", "one colour")):
        if not measured[name].any() or getattr(metrics, name)(reference).any():
            continue
        if name == "broken" or not _is_noise(reference, base, trained):
            return values, look  # type: ignore[return-value]
    return values, look_of(values["total_variation_ratio"], values["noise_sigma_ratio"], values["content"])


def _is_noise(reference: Tensor, base: Tensor, trained: Tensor) -> bool:
    """Whether the reference itself shows no picture any more: rounding then decides whether one is black."""
    measured = metrics.measure(reference, base, trained)
    names = ("total_variation_ratio", "noise_sigma_ratio", "content")
    return look_of(*(_middle(name, measured[name].double()) for name in names)) == "noise"


def _raw_values(output: Tensor, base: Tensor, reference: Tensor) -> tuple[dict[str, float], Look]:
    change = float((reference - base).norm() / base.norm())
    values = {
        "gain": float(metrics.gain(metrics.finite(output), base, reference).mean()),
        "effect": change,
        "broken": float(metrics.broken(output).double().mean()),
    }
    return values, "broken" if values["broken"] and not metrics.broken(reference).any() else "one denoiser call"


def _middle(name: str, values: Tensor) -> float:
    return float(values.median() if name in _MEDIANS else values.mean())


def _peak(studio: Studio) -> int | None:
    return torch.cuda.max_memory_allocated() if studio.opened.device.type == "cuda" else None


def _number(said: Any) -> int | None:
    return None if said is None else int(said)


def _slug(spec: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", spec).strip("_.") or "loader"


def drawing(studios: Sequence[Studio], subject: Subject) -> Answer:
    """Return what answers an order for pictures where the subject's code runs."""
    kept: dict[float, torch.nn.Module] = {}

    def answer(order: Any, on_part: Part) -> dict[str, Any]:
        own = copy(studios[order["studio"]])  # where both run in one process, the steps of the other are not this one's
        own.kept, own.keeps = kept, order["keep"]
        own.step = lambda text: on_part({"step": text})
        drawn = own.candidates(subject, order["strengths"])
        while True:
            try:
                strength, images, seconds = next(drawn)
            except StopIteration:
                return {}
            except UserError as error:
                return {"error": str(error)}
            except TimeLimitExceeded as late:
                return {"raised": asdict(Raised("LH901", str(late), timed_out=True))}
            except Exception as error:  # a crash of the subject is data
                return {"raised": asdict(raised_by(error))}
            cost = {"seconds": seconds, "peak_memory": _peak(own)}
            on_part({"strength": strength, **cost, "tensors": {"images": images}})

    return answer
