"""A verdict: the outcome of one check, with the measured fact, the cause, the fix and a reproduce command."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from harness.text import on_one_line

REFERENCE = "reference"
"""Whose verdict it is where PEFT's own merge is not what the closed form says."""

Outcome = Literal["passed", "failed", "errored", "refused", "skipped", "xfailed", "xpassed"]
"""refused: the loader said on purpose that it does not take what it declares."""


class Record(BaseModel):
    """A line of a run record: immutable, and closed to unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class LawRecord(Record):
    """The scaling law that was measured; `formula` reads `0.5 * strength * alpha / rank`."""

    formula: str
    name: str
    exponents: dict[Literal["strength", "alpha", "rank"], float | None] = Field(default_factory=dict)
    constant: float | None = None
    residual: float | None = None
    ambiguous: bool = False
    alternatives: tuple[str, ...] = ()


class Carried(Record):
    """Where a verdict comes from that was not measured again: the run's id, and when that began (ISO 8601)."""

    run: str
    measured: str


class Verdict(Record):
    """The outcome of one check of one loader in one cell (format x bench).

    `measured_scale` is the factor found on B@A, `expected_scale` = strength * alpha / rank, `ratio` = measured /
    expected, all of `worst_module`. `rows` are the labelled rows of the failure text, in print order.
    """

    kind: Literal["verdict"] = "verdict"
    loader: str
    check: str
    outcome: Outcome
    format: str | None = None
    bench: str | None = None
    variant: str = "lora"
    code: str | None = None
    title: str = ""
    loader_version: str | None = None
    measured_scale: float | None = None
    expected_scale: float | None = None
    ratio: float | None = None
    worst_module: str | None = None
    modules_failed: int | None = None
    modules_total: int | None = None
    law: LawRecord | None = None
    prescription: float | None = None
    counterexample: dict[str, Any] | None = None
    reproduce: str | None = None
    rows: tuple[tuple[str, str], ...] = ()
    reason: str | None = None
    examples: int | None = None
    seconds: float | None = None
    estimated_factor: float | None = None
    interval: tuple[float, float] | None = None
    survived: float | None = None
    carried: Carried | None = Field(default=None, description="the earlier run that measured it; this one did not")
    data: dict[str, Any] = Field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True when this verdict leaves a run green."""
        return self.outcome in ("passed", "skipped", "xfailed")

    def text(self) -> str:
        """Return the failure as printed: a first line that stands alone, then one labelled row per line."""
        head = " ".join(part for part in (self.code, self.title or f"{self.check}: {self.outcome}") if part)
        width = max((len(label) for label, _ in self.rows), default=0)
        rows = (f"  {label:<{width}}  {value}" for label, value in self.rows)
        return "\n".join(map(on_one_line, [head, *rows]))
