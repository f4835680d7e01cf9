"""From a finding to a verdict: the rows of a failure, in the field's own words."""

from __future__ import annotations

from harness.checks.cell import Cell
from harness.checks.family import LAW_FAMILIES, Finding
from harness.example import Example
from harness.law.diagnosis import Diagnosis, law_record
from harness.law.law import Law
from harness.measure.compare import Fit
from harness.verdict.codes import CODES
from harness.verdict.verdict import Outcome, Verdict

_SHOWN_MODULES = 4
_TRAINED = {False: "strength * alpha / rank", True: "strength * alpha / sqrt(rank)"}


def passed(cell: Cell, family: str, examples: int, diagnosis: Diagnosis | None = None) -> Verdict:
    """Return the verdict of a family in which nothing was found."""
    law = law_record(diagnosis.law) if diagnosis and diagnosis.law else None
    return cell.verdict(family, "passed", title=f"{family} right", examples=examples, law=law)


def failed(cell: Cell, finding: Finding, diagnosis: Diagnosis, *, code: str, family: str, examples: int) -> Verdict:
    """Return the verdict of one fault, with the rows a person reads."""
    worst = finding.modules[0] if finding.modules else None
    fit = _worst_fit(finding, worst)
    example = finding.observation.example
    law = diagnosis.law if family in LAW_FAMILIES and diagnosis.law and not diagnosis.law.is_trained else None
    use = _prescription(law, example)
    outcome: Outcome = "errored" if family == "smoke" else "failed"
    numbers = {"measured_scale": fit.scale, "expected_scale": fit.expected, "ratio": _ratio(fit)} if fit else {}
    return cell.verdict(
        family,
        outcome,
        code=code,
        title=_title(code, finding, diagnosis, family),
        worst_module=worst,
        modules_failed=len(finding.modules) or None,
        modules_total=len(finding.observation.fits) or None,
        law=law_record(law) if law else None,
        prescription=use,
        counterexample=example.as_json(),
        reproduce=cell.reproduce(example),
        rows=tuple(_rows(cell, finding, fit, worst, law, diagnosis, use, code)),
        examples=examples,
        **numbers,
    )


def _title(code: str, finding: Finding, diagnosis: Diagnosis, family: str) -> str:
    when = f" only where: {diagnosis.trait}" if diagnosis.trait and family in LAW_FAMILIES else ""
    return f"{CODES[code].title}{when}: {finding.fact}" if finding.fact else f"{CODES[code].title}{when}"


def _rows(
    cell: Cell,
    finding: Finding,
    fit: Fit | None,
    worst: str | None,
    law: Law | None,
    diagnosis: Diagnosis,
    use: float | None,
    code: str,
) -> list[tuple[str, str]]:
    subject, example = cell.subject, finding.observation.example
    version = f" {subject.version}" if subject.version else ""
    rows = [("loader", f"{subject.spec}{version}"), ("file", cell.place)]
    rows += [("lora", _lora(example))]
    if worst and fit:
        shape = "x".join(map(str, cell.view.layers[worst].shape)) if worst in cell.view.layers else ""
        rows += [
            ("worst", f"{worst} [{shape}]"),
            ("measured", _measured(fit)),
            ("expected", _expected(example, worst, fit, cell.variant.root)),
        ]
        rows += [("tolerance", f"+-{fit.tolerance.scale:.1e}: {fit.tolerance.why()}")]
    if law:
        doubt = f" (ambiguous: also {', '.join(law.alternatives)})" if law.ambiguous else ""
        rows += [("law", f"{law.formula}{doubt}; expected {_TRAINED[law.root]}")]
        rows += [("use", _use(subject.strength_argument, use))]
    if diagnosis.trait and law is None and fit:
        rows += [("only where", diagnosis.trait)]
    known = CODES[code]
    rows += [("cause", known.cause), ("fix", f"{known.fix}   (lora-harness explain {code})")]
    return [*rows, ("reproduce", cell.reproduce(example))]


def _lora(example: Example) -> str:
    shown = [f"{_short(t.name)} r{t.rank} alpha {_alpha(t.alpha)}" for t in example.targets[:_SHOWN_MODULES]]
    shapes = {(t.rank, t.alpha) for t in example.targets}
    more = len(example.targets) - _SHOWN_MODULES
    if len(shapes) == 1:
        rank, alpha = shapes.pop()
        shown, more = [f"{len(example.targets)} modules, rank {rank}, alpha {_alpha(alpha)}"], 0
    text = ", ".join(shown) + (f" and {more} more" if more > 0 else "")
    return (
        f"{text}; strength {example.strength:g}, {example.file_dtype} into {example.dtype}, seed {example.value_seed}"
    )


def _short(name: str) -> str:
    return ".".join(name.split(".")[-2:])  # the last part alone is often a number


def _alpha(alpha: float | None) -> str:
    return "absent" if alpha is None else f"{alpha:g}"


def _measured(fit: Fit) -> str:
    if fit.unchanged:
        return "nothing changed"
    direction = "direction right" if fit.direction_right else f"{fit.relative_residual:.0%} of the change unexplained"
    return f"scale {fit.scale:.4f}, {direction}"


def _expected(example: Example, worst: str, fit: Fit, root: bool) -> str:
    target = next(t for t in example.targets if t.name == worst)
    rank = f"sqrt({target.rank})" if root else str(target.rank)
    formula = f"{example.strength:g} * {_alpha(target.alpha)} / {rank}" if target.alpha is not None else "strength"
    return f"scale {fit.expected:.4f} = {formula}   (PEFT: {_TRAINED[root]})"


def _use(argument: str, use: float | None) -> str:
    if use is None:
        return f"no single {argument} makes this file right; the loader must be fixed"
    return f"{argument} = {use:g} for this file until it is fixed"


def _prescription(law: Law | None, example: Example) -> float | None:
    pairs = [(t.alpha if t.alpha is not None else float(t.rank), t.rank) for t in example.targets]
    return law.prescription(pairs) if law else None


def _worst_fit(finding: Finding, worst: str | None) -> Fit | None:
    fits = finding.observation.fits.get(worst or "")
    return max(fits, key=lambda f: abs(f.scale - f.expected) + f.residual / (f.product or 1.0)) if fits else None


def _ratio(fit: Fit) -> float | None:
    return fit.scale / fit.expected if fit.expected else None
