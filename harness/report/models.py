"""Run records: what one run measured, as JSON lines between a header and a footer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import Field, TypeAdapter

from harness.verdict.file_record import FileRecord
from harness.verdict.verdict import LawRecord, Record, Verdict

if TYPE_CHECKING:
    from harness.law.probe import Probe

SCHEMA_VERSION = 1
T = TypeVar("T")


class Header(Record):
    """The first line of a run: what is needed to repeat it.

    `planned` names the parts that the run set out to measure (`checks:peft`, `law:peft`, `sweep:peft@cuda`, `files`,
    `power`); a planned part without a record is shown as not measured and keeps the run from being green.
    """

    kind: Literal["header"] = "header"
    schema_version: int = SCHEMA_VERSION
    run_id: str
    created: str = Field(description="ISO 8601 with time zone")
    command: str
    seed: int | None = None
    profile: str = "dev"
    machine: str = ""
    platform: str = ""
    device: str = "cpu"
    commit: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    planned: tuple[str, ...] = ()


class Footer(Record):
    """The last line of a run: verdicts by outcome, seconds of wall time, exit code. A run without one was cut."""

    kind: Literal["footer"] = "footer"
    counts: dict[str, int]
    seconds: float
    exit_code: int
    gate: tuple[str, ...] = Field(default=(), description="what got worse than in the baseline: the gate is red")
    reference: str = Field(default="", description="how closely PEFT's own merge agrees with the closed form here")


class PartRecord(Record):
    """What became of one planned part; `reason` says why it was not measured."""

    kind: Literal["part"] = "part"
    name: str
    measured: bool
    reason: str = ""


class CellRecord(Record):
    """A cell that was judged to its end; `fingerprint` stands for all that its verdicts depend on, where that is known.

    With the same fingerprint a later run may carry them over: loader, versions, bench, harness and plan are the same.
    """

    kind: Literal["cell"] = "cell"
    loader: str
    format: str
    bench: str
    variant: str = "lora"
    fingerprint: str | None = None


class LoraFacts(Record):
    """The LoRA file behind a measurement."""

    name: str
    rank: int | None = None
    alpha: float | None = None
    format: str | None = None


class SweepImage(Record):
    """One picture of a sweep; `path` and `thumbnail` are relative to the folder of the run file."""

    path: str
    thumbnail: str | None = None
    prompt: str = ""
    seed: int | None = None
    role: Literal["candidate", "reference", "base"] = "candidate"


class SweepRecord(Record):
    """One loader at one strength: its pictures and what was measured on them.

    `seconds` is wall time, `peak_memory` bytes on the device.
    """

    kind: Literal["sweep"] = "sweep"
    loader: str
    lora: LoraFacts
    strength: float
    metrics: dict[str, float | None] = Field(default_factory=dict)
    images: tuple[SweepImage, ...] = ()
    device: str = "cpu"
    dtype: str = "float32"
    pipeline: str | None = None
    label: str | None = Field(default=None, description="what the pictures show: as trained, artifacts, noise, ...")
    seconds: float | None = None
    peak_memory: int | None = None


class ProbePoint(Record):
    """The scale found on B @ A of one module, beside the scale expected there."""

    module: str
    strength: float
    alpha: float | None
    rank: int
    measured: float
    expected: float


class ProbeRecord(Record):
    """The probes behind one fitted law, so that the fit can be drawn."""

    kind: Literal["law"] = "law"
    loader: str
    format: str | None = None
    bench: str | None = None
    variant: str = "lora"
    law: LawRecord | None = None
    points: tuple[ProbePoint, ...] = ()


def probe_record(
    loader: str,
    format: str,
    bench: str,
    law: LawRecord | None,
    probes: Sequence[Probe],
    *,
    variant: str = "lora",
    most: int = 240,
) -> ProbeRecord:
    """Return a cell's probes as a record, at most `most` of them, those that are wrong before the others."""
    wrong = [probe for probe in probes if not probe.right]
    right = [probe for probe in probes if probe.right]
    kept = [*thinned(wrong, most), *thinned(right, max(most - len(wrong), most // 4))][:most]
    points = tuple(ProbePoint.model_validate(probe, from_attributes=True) for probe in kept)
    return ProbeRecord(loader=loader, format=format, bench=bench, variant=variant, law=law, points=points)


def thinned(items: Sequence[T], most: int) -> Sequence[T]:
    """Return about `most` of the items, evenly spaced."""
    return items[:: max(-(-len(items) // most), 1)]


class PowerRecord(Record):
    """How often a fault is found: `detected` of `trials`, `named` of them with the right code.

    `factor` is the true error of the scale (1.0: no fault, so `detected` counts false alarms); `images` how many
    pictures were seen.
    """

    kind: Literal["power"] = "power"
    subject: str
    fault: str = ""
    expected_code: str | None = None
    trials: int
    detected: int
    named: int | None = None
    examples: float | None = Field(default=None, description="median number of examples until it was found")
    factor: float | None = None
    images: int | None = None
    dtype: str | None = None
    source: str = "weights"

    @property
    def fine(self) -> bool:
        """Whether every fault was found and named, or none was seen where there is none."""
        if self.factor == 1:
            return self.detected == 0
        return self.detected == self.trials and self.named in (None, self.trials)


AnyRecord = Annotated[
    Header | Verdict | ProbeRecord | SweepRecord | FileRecord | PowerRecord | PartRecord | CellRecord | Footer,
    Field(discriminator="kind"),
]
ADAPTER: TypeAdapter[AnyRecord] = TypeAdapter(AnyRecord)
