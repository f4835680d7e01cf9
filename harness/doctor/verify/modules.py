"""From what was measured in each layer of a merge to verdicts: one per module, one overall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from harness.doctor.verify.measurement import MergeMeasurement, State
from harness.doctor.verify.rows import rows_of
from harness.law.probe import Probe
from harness.text import count, first_of, printable
from harness.verdict.verdict import Outcome, Verdict

CHECK = "verify"
BLENDED = "the strength blends W with its DoRA weight, as ComfyUI does; PEFT multiplies inside the norm"
LOST = ("missing layer", "missing tensor")
_SHOWN = 4
_WEAK = 0.95  # share of the effect below which the advice is to merge in higher precision
_APART = 0.01  # relative; scales that differ by more must be told apart, or the verdict says that they are not
_PARTS = (("qkv", ("q", "k", "v")), ("kv", ("k", "v")), ("gate_up", ("gate", "up")))


Unjudged = Literal["alpha", "ambiguous", "unsupported", "quantised", "component", "hidden"]
"""Why something is not judged: its alpha is unknown, its place; its kind or storage is not read; rounding hides it."""
UNJUDGED: tuple[Unjudged, ...] = get_args(Unjudged)


@dataclass(frozen=True)
class NotMeasured:
    """Why one tensor has no measurement: nothing in the base has its name, it does not fit, or it cannot be judged."""

    kind: Literal["missing layer", "missing tensor", "misfit"] | Unjudged
    what: str


@dataclass(frozen=True)
class Module:
    """One tensor that a module of the LoRA changes: what it should be, and what was measured or why not.

    `fault` is the code and the sentence of what is wrong beside the scale: DoRA's magnitude, NaN in the LoRA. `note`
    says what a reader of the scale should know. `alpha_unknown`: the file has no alpha, or 0; no scale is then right.
    `expert_rows`: the rows of each expert, where the tensor holds several. `holds`: the module whose update is in it in
    place of its own.
    """

    found: Probe
    tensor: str | None
    measured: MergeMeasurement | None
    problem: NotMeasured | None = None
    dtype: str = ""
    fault: tuple[str, str] | None = None
    note: str | None = None
    alpha_unknown: bool = False
    expert_rows: int = 0
    holds: str = ""

    @property
    def name(self) -> str:
        """The name in the LoRA file."""
        return self.found.module

    @property
    def state(self) -> State | None:
        """What was done to it, None when it could not be measured."""
        return self.measured.state if self.measured else None

    @property
    def tells_scale(self) -> bool:
        """True when the scale is known."""
        if self.measured is None or self.measured.replaces:
            return False
        return self.state in ("merged", "partly", "damaged", "twice", "two roundings")

    @property
    def fits(self) -> tuple[float, float]:
        """The expected scales that would pass: what the rounding of W', of the delta and of the scale leaves open."""
        return self.found.measured - self.found.tolerance, self.found.measured + self.found.tolerance

    @property
    def vague(self) -> str:
        """What a merge that passes cannot tell apart although it must be; empty when it can."""
        expected, (low, high) = self.found.expected, self.fits
        told_apart = not 0 < _APART * abs(expected) < self.found.tolerance
        if told_apart or not (self.tells_scale and self.found.right):
            return ""
        other = max(low, high, key=lambda end: abs(end - expected))
        return f"cannot tell {expected:.4g} from {other:.4g} here: {low:.4g} to {high:.4g} all fit"

    @property
    def obstacle(self) -> str | None:
        """The kind of the problem, None when it was measured."""
        return self.problem.kind if self.problem else None

    @property
    def unjudged(self) -> Unjudged | None:
        """Why nothing is said of it, None when it is right or wrong."""
        if self.problem and self.problem.kind in UNJUDGED:
            return self.problem.kind
        if self.alpha_unknown and self.state in ("merged", "two roundings", "hidden", "not merged") and not self.fault:
            return "alpha" if self.state != "not merged" or self.found.alpha is not None else None
        return "hidden" if self.state == "hidden" else None

    @property
    def why_unjudged(self) -> str:
        """Say it in a few words."""
        if self.problem:
            return self.problem.what
        if not self.alpha_unknown:
            return f"the update is below half a step of {self.dtype} everywhere, merged or not cannot be told"
        scale = f"{self.measured.scale:.4g}" if self.measured else "?"
        what = "the file tells no sure alpha" if self.found.alpha is None else f"alpha {self.found.alpha:g} in the file"
        return f"alpha unknown, scale {scale} measured: {what}, --lora-alpha decides"

    @property
    def skipped(self) -> bool:
        """True when nothing can be said."""
        return self.unjudged is not None


def module_verdict(module: Module, law_code: str | None, frame: dict[str, Any]) -> Verdict:
    """Return the verdict of one module; `law_code` names the law of the whole merge."""
    code, fact = (None, f"not judged: {module.why_unjudged}") if module.skipped else _judged(module, law_code)
    outcome: Outcome = "skipped" if module.skipped else "failed" if code else "passed"
    numbers = _numbers(module) if module.measured else {}
    return Verdict(
        **frame,
        check=CHECK,
        outcome=outcome,
        code=code,
        title=fact,
        worst_module=module.name,
        reason=fact if outcome == "skipped" else None,
        rows=tuple(_rows(module)) if module.measured else (),
        **numbers,
    )


def _judged(module: Module, law_code: str | None) -> tuple[str | None, str]:
    """Return the code a module deserves, None when it is right, and one sentence."""
    measured = module.measured
    if measured is None:
        what = module.problem.what if module.problem else ""
        return ("LH103" if module.obstacle in LOST else "LH902"), what
    if measured.state == "not finite":
        rows = f" in {damage_of(module)}" if measured.damaged else ""
        return module.fault or ("LH502", f"NaN or infinite values in the merged or the base weight{rows}")
    plain: dict[str, tuple[str | None, str]] = {
        "replaced": (None, measured.replaces),
        "not merged": ("LH102", "not merged: the weight is the base's"),
        "unexplained": ("LH104", f"holds the update of {printable(module.holds)}")
        if module.holds
        else ("LH101", "changed, but not by this LoRA"),
        "twice": ("LH206", f"merged twice at {measured.scale / 2:.4g}"),
    }
    return plain.get(measured.state) or _judged_scale(module, law_code)


def _judged_scale(module: Module, law_code: str | None) -> tuple[str | None, str]:
    measured, found = module.measured, module.found
    assert measured is not None
    scale = "; ".join(filter(None, (f"scale {measured.scale:.4g}, expected {found.expected:.4g}", module.vague)))
    scale = measured.replaces or (f"scale {measured.scale:.4g}" if module.alpha_unknown else scale)
    if measured.state == "partly":
        return "LH102", f"not merged in {where(module)}; elsewhere {scale}"
    if measured.state == "damaged":
        still = f"; not merged in {where(module)}" if measured.unmerged else ""
        return "LH401", f"not what the merge gives in {damage_of(module)}{still}; elsewhere {scale}"
    if module.fault:
        return module.fault[0], f"{module.fault[1]}; {scale}"
    if measured.state == "mixed":
        return "LH401", f"other changes besides this LoRA; {scale}"
    return (None, scale) if found.right or module.alpha_unknown else (law_code or "LH209", scale)


def where(module: Module) -> str:
    """Name the rows in which nothing happened, as q, k, v where the layer's name says so."""
    assert module.measured is not None
    if height := module.expert_rows:
        experts = {row // height for start, stop in module.measured.unmerged for row in range(start, stop, height)}
        return f"{count(len(experts), 'expert')} ({first_of([str(expert) for expert in sorted(experts)])})"
    parts = next((parts for word, parts in _PARTS if word in module.name.rpartition(".")[2]), ())
    rows = module.measured.rows
    names = [
        part
        for index, part in enumerate(parts)
        if any(
            start <= rows * index // len(parts) and stop >= rows * (index + 1) // len(parts)
            for start, stop in module.measured.unmerged
        )
    ]
    about = "" if module.measured.seen == 1 else "about "  # the end lies between two rows that were read
    return " and ".join(names) or few([f"{about}{rows_of(*run)}" for run in module.measured.unmerged], "run")


def damage_of(module: Module) -> str:
    """Name the rows that are not what the merge gives, and how they differ."""
    return few([damage.text() for damage in module.measured.damaged] if module.measured else [], "run")


def few(said: Sequence[str], what: str) -> str:
    """List the first of them, and say how many more there are."""
    rest = f" and {count(len(said) - _SHOWN, f'more {what}')}" if len(said) > _SHOWN else ""
    return ", ".join(said[:_SHOWN]) + rest


def _numbers(module: Module) -> dict[str, Any]:
    assert module.measured is not None
    measured, expected = module.measured, module.found.expected
    if measured.replaces:
        return {"data": _data(module)}
    return {
        "measured_scale": measured.scale,
        "expected_scale": None if module.alpha_unknown else expected,
        "ratio": measured.scale / expected if expected and not module.alpha_unknown else None,
        "interval": measured.interval if all(map(math.isfinite, measured.interval)) else None,
        "survived": measured.survived,
        "data": _data(module),
    }


def _data(module: Module) -> dict[str, Any]:
    measured = module.measured
    assert measured is not None
    return {
        "state": measured.state,
        "fits": module.fits if module.tells_scale and math.isfinite(module.found.tolerance) else None,
        "tensor": module.tensor,
        "coverage": round(measured.coverage, 5),
        "explained": round(measured.explained, 5),
        "changed": round(measured.changed, 5),
        "elements": measured.elements,
        "unmerged_rows": [list(pair) for pair in measured.unmerged],
        "damaged_rows": [damage.text() for damage in measured.damaged[:_SHOWN]],
    }


def _rows(module: Module) -> list[tuple[str, str]]:
    measured, found = module.measured, module.found
    assert measured is not None
    if measured.replaces:
        return [("module", f"{printable(found.module)}, {module.dtype}"), ("compared", measured.replaces)]
    alpha = "no alpha" if found.alpha is None else f"alpha {found.alpha:g}"
    low, high = measured.interval
    rows = [
        ("module", f"{printable(found.module)}, rank {found.rank}, {alpha}, {module.dtype}"),
        ("measured", f"scale {measured.scale:.5g} in [{low:.5g}, {high:.5g}]"),
        ("expected", "unknown without alpha" if module.alpha_unknown else f"scale {found.expected:.5g}"),
        (
            "explains",
            f"{measured.coverage:.1%} of {count(measured.elements, 'element')} to the last bit; {_how(measured)}",
        ),
    ]
    rows += [("note", module.note)] if module.note else []
    return [*rows, ("survived", survival(measured.survived))] if measured.survived is not None else rows


def _how(measured: MergeMeasurement) -> str:
    if measured.state == "two roundings":
        return "rounded twice: merged from a more precise base, or in two steps"
    if measured.state in ("mixed", "unexplained", "twice"):
        return f"{measured.changed:.0%} of them changed"
    return "merged in full precision and rounded once" if measured.coverage >= 0.999 else "the delta was rounded too"


def survival(share: float) -> str:
    """Say how much of the effect rounding left, and what to do when it is little."""
    advice = "" if share >= _WEAK else "; the rest was rounded away: merge in float32, or keep the adapter apart"
    return f"{share:.1%} of the effect is left after rounding{advice}"
