"""From what was measured in each layer of a merge to verdicts: one per module, one overall."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from harness.doctor.verify.merged_layer import Baked
from harness.law.probe import Probe
from harness.text import count, printable
from harness.verdict.verdict import Outcome, Verdict

CHECK = "verify"
BLENDED = "the strength blends W with its DoRA weight, as ComfyUI does; PEFT multiplies inside the norm"
NO_TENSOR = "the layer has no such tensor in the base"
_SHOWN = 4
_WEAK = 0.95  # share of the effect below which the advice is to merge in higher precision
_APART = 0.01  # relative; scales that differ by more must be told apart, or the verdict says that they are not
_PARTS = (("qkv", ("q", "k", "v")), ("kv", ("k", "v")), ("gate_up", ("gate", "up")))


@dataclass(frozen=True)
class Module:
    """One tensor that a module of the LoRA changes: what it should be, and what was measured or why not.

    `fault` is the code and the sentence of what is wrong beside the scale: DoRA's magnitude, NaN in the LoRA. `note`
    says what a reader of the scale should know.
    """

    found: Probe
    tensor: str | None
    baked: Baked | None
    problem: str | None = None
    dtype: str = ""
    fault: tuple[str, str] | None = None
    note: str | None = None

    @property
    def name(self) -> str:
        """The name in the LoRA file."""
        return self.found.module

    @property
    def state(self) -> str:
        """What was done to it, empty when it could not be measured."""
        return self.baked.state if self.baked else ""

    @property
    def tells_scale(self) -> bool:
        """True when the scale is known."""
        return self.state in ("merged", "partly", "twice", "two roundings")

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
    def lost(self) -> bool:
        """True when the base has no tensor for it."""
        return not self.skipped and bool(self.problem) and (self.tensor is None or self.problem == NO_TENSOR)

    @property
    def skipped(self) -> bool:
        """True when nothing can be said: the kind is not read, or rounding hides the update."""
        if self.baked is None:
            return bool(self.problem and self.problem.startswith("skipped"))
        return self.state == "hidden"


def module_verdict(module: Module, law_code: str | None, frame: dict[str, Any]) -> Verdict:
    """Return the verdict of one module; `law_code` names the law of the whole merge."""
    code, fact = _judged(module, law_code)
    outcome: Outcome = "skipped" if module.skipped else "failed" if code else "passed"
    numbers = _numbers(module) if module.baked else {}
    return Verdict(
        **frame,
        check=CHECK,
        outcome=outcome,
        code=None if outcome == "skipped" else code,
        title=fact,
        worst_module=module.name,
        reason=fact if outcome == "skipped" else None,
        rows=tuple(_rows(module)) if module.baked else (),
        **numbers,
    )


def _judged(module: Module, law_code: str | None) -> tuple[str | None, str]:
    """Return the code a module deserves, None when it is right, and one sentence."""
    baked, found = module.baked, module.found
    if baked is None:
        return ("LH103" if module.lost else "LH902"), module.problem or ""
    if baked.state == "not finite":
        return module.fault or ("LH502", "NaN or infinite values in the merged or the base weight")
    if baked.state == "hidden":
        return None, f"the update is below half a step of {module.dtype} everywhere: merged or not cannot be told"
    if baked.state == "not merged":
        return "LH102", "not merged: the weight is the base's"
    if baked.state == "unexplained":
        return "LH101", "changed, but not by this LoRA"
    if baked.state == "twice":
        return "LH206", f"merged twice at {baked.scale / 2:.4g}"
    scale = "; ".join(filter(None, (f"scale {baked.scale:.4g}, expected {found.expected:.4g}", module.vague)))
    if baked.state == "partly":
        return "LH102", f"not merged in {where(module)}; elsewhere {scale}"
    if module.fault:
        return module.fault[0], f"{module.fault[1]}; {scale}"
    if baked.state == "mixed":
        return "LH401", f"other changes besides this LoRA; {scale}"
    return (None, scale) if found.right else (law_code or "LH209", scale)


def where(module: Module) -> str:
    """Name the rows in which nothing happened, as q, k, v where the layer's name says so."""
    assert module.baked is not None
    parts = next((parts for word, parts in _PARTS if word in module.name.rpartition(".")[2]), ())
    rows = module.baked.rows
    names = [
        part
        for index, part in enumerate(parts)
        if any(
            start <= rows * index // len(parts) and stop >= rows * (index + 1) // len(parts)
            for start, stop in module.baked.unmerged
        )
    ]
    return " and ".join(names) or ", ".join(
        f"rows {start} to {stop - 1}" for start, stop in module.baked.unmerged[:_SHOWN]
    )


def _numbers(module: Module) -> dict[str, Any]:
    assert module.baked is not None
    baked, expected = module.baked, module.found.expected
    return {
        "measured_scale": baked.scale,
        "expected_scale": expected,
        "ratio": baked.scale / expected if expected else None,
        "interval": baked.interval if all(map(math.isfinite, baked.interval)) else None,
        "survived": baked.survived,
        "data": {
            "state": baked.state,
            "fits": module.fits if module.tells_scale and math.isfinite(module.found.tolerance) else None,
            "tensor": module.tensor,
            "coverage": round(baked.coverage, 5),
            "explained": round(baked.explained, 5),
            "changed": round(baked.changed, 5),
            "elements": baked.elements,
            "unmerged_rows": [list(pair) for pair in baked.unmerged],
        },
    }


def _rows(module: Module) -> list[tuple[str, str]]:
    baked, found = module.baked, module.found
    assert baked is not None
    alpha = "no alpha" if found.alpha is None else f"alpha {found.alpha:g}"
    low, high = baked.interval
    rows = [
        ("module", f"{printable(found.module)}, rank {found.rank}, {alpha}, {module.dtype}"),
        ("measured", f"scale {baked.scale:.5g} in [{low:.5g}, {high:.5g}]"),
        ("expected", f"scale {found.expected:.5g}"),
        ("explains", f"{baked.coverage:.1%} of {count(baked.elements, 'element')} to the last bit; {_how(baked)}"),
    ]
    rows += [("note", module.note)] if module.note else []
    return [*rows, ("survived", survival(baked.survived))] if baked.survived is not None else rows


def _how(baked: Baked) -> str:
    if baked.state == "two roundings":
        return "rounded twice: merged from a more precise base, or in two steps"
    if baked.state in ("mixed", "unexplained", "twice"):
        return f"{baked.changed:.0%} of them changed"
    return "merged in full precision and rounded once" if baked.coverage >= 0.999 else "the delta was rounded too"


def survival(share: float) -> str:
    """Say how much of the effect rounding left, and what to do when it is little."""
    advice = "" if share >= _WEAK else "; the rest was rounded away: merge in float32, or keep the adapter apart"
    return f"{share:.1%} of the effect is left after rounding{advice}"
