"""From a finding to a verdict: the rows of a failure, in the field's own words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from harness.checks.cell import Cell
from harness.checks.families.silence import silence_title
from harness.checks.family import LAW_FAMILIES, Sighting
from harness.example import Example, Target
from harness.law.diagnosis import Diagnosis, law_record
from harness.law.law import Law
from harness.law.probe import Probe
from harness.measure.compare import Fit
from harness.text import count
from harness.variants import Variant
from harness.verdict.codes import CODES
from harness.verdict.verdict import Outcome, Verdict

_SHOWN_MODULES = 4
_SHOWS = 1e-3  # of a scale: a smaller error than that need not be said to be hidden
_AGREE = 0.01  # a strength that is further off would be harmful
_PLAIN = "strength * alpha / rank"  # what the sentences of codes say, which are those of plain LoRA
_NO_EFFECT = ("LH101", "LH102")
_COMPUTED = (
    "the weight of these layers is computed from other parameters (a parametrization): what is written to it is lost",
    "write to the parameters behind it, remove the parametrization first, or keep the update beside the layer",
)


def passed(cell: Cell, family: str, examples: int, diagnosis: Diagnosis | None = None) -> Verdict:
    """Return the verdict of a family in which nothing was found."""
    law = law_record(diagnosis.law) if diagnosis and diagnosis.law else None
    heard = {"heard": dict(cell.heard)} if family == "silence" else {}
    title = silence_title(cell.heard) if heard else f"{family} right"
    return cell.verdict(family, "passed", title=title, examples=examples, law=law, data=heard)


def through_codes(cell: Cell, verdict: Verdict, probes: Sequence[Probe]) -> Verdict:
    """Return the verdict on the scale with how far off one may be that the codes of the cell's layers hide."""
    codes = {layer.codes for name, layer in cell.view.layers.items() if name in cell.targets and layer.codes}
    if verdict.check != "scale" or not codes:
        return verdict
    kinds, seen = ", ".join(sorted(codes)), [p for p in probes if p.expected and cell.view.layers[p.module].codes]
    if not seen:
        reason = f"the steps of {kinds} are larger than what these files add"
        return verdict.model_copy(update={"outcome": "skipped", "title": "not judged", "reason": reason})
    share = min(probe.tolerance / abs(probe.expected) for probe in seen)
    if share < _SHOWS:
        return verdict
    title = f"{verdict.title}; a scale that is less than {share:.1%} off is not judged: {kinds} hides it"
    return verdict.model_copy(update={"title": title, "data": verdict.data | {"hidden": share}})


@dataclass(frozen=True)
class NamedFinding:
    """A finding under the name that the law behind all scales of its cell gives it.

    `only_where` says what the examples with it have in common.
    """

    cell: Cell
    finding: Sighting
    diagnosis: Diagnosis
    only_where: str = ""

    @property
    def place(self) -> Cell:
        """The cell that it was seen in: of a variant that is not declared, another than `cell`."""
        return self.finding.place or self.cell

    @property
    def code(self) -> str:
        """The code of the law where the finding is that some law must be wrong (LH209), else its own."""
        own = self.finding.code
        return self.diagnosis.code or own if self._unnamed else own

    @property
    def _unnamed(self) -> bool:
        """Whether the finding only says that some law is wrong."""
        return self.finding.code == "LH209" and not self.finding.check

    @property
    def family(self) -> str:
        """The family of `code`."""
        return self.diagnosis.family if self._unnamed else self.finding.family

    @cached_property
    def law(self) -> Law | None:
        """The wrong law, where one is at fault."""
        law = self.diagnosis.law if self.family in LAW_FAMILIES else None
        return law if law and not law.is_trained else None

    @property
    def outcome(self) -> Outcome:
        """What the fault makes of its check."""
        if self.code == "LH903":
            return "refused"
        return "errored" if self.family == "smoke" else "failed"

    @property
    def example(self) -> Example:
        """The counterexample."""
        return self.finding.observation.example

    @property
    def worst(self) -> str | None:
        """The module that fails most."""
        return next(iter(self.finding.modules), None)

    @cached_property
    def fit(self) -> Fit | None:
        """What was measured of the worst module, or of the slice of it that is furthest off."""
        fits = self.finding.observation.fits.get(self.worst or "", ())
        return max(fits, key=lambda f: abs(f.scale - f.expected) + f.residual / (f.product or 1.0), default=None)

    @cached_property
    def use(self) -> float | None:
        """The strength that makes up for what was measured: by the law, where the law agrees with the measurement."""
        if not self.law or not self._unnamed or self.cell.subject.strength_argument is None:
            return None
        pairs = [(t.alpha if t.alpha is not None else float(t.rank), t.rank) for t in self.example.targets]
        by_law, measured = self.law.prescription(pairs), self._measured_use(self.law)
        if not self.example.strength or not self.law.strength.apply(self.example.strength):
            return by_law  # loaded at strength 0: what was measured says nothing
        agree = by_law is not None and measured is not None and math.isclose(by_law, measured, rel_tol=_AGREE)
        return by_law if agree else measured

    def _measured_use(self, law: Law) -> float | None:
        """Return the strength that turns what the counterexample's modules got into what they should have got."""
        here, one = law.strength.apply(self.example.strength), law.strength.apply(1.0)
        fits = [fit for t in self.example.targets for fit in self.finding.observation.fits.get(t.name, ())]
        if not here or not all(fit.finite and fit.direction_right for fit in fits):
            return None
        wanted = [fit.expected / (self.example.strength or 1.0) for fit in fits]
        each = [law.strength_for([f.scale / here * one], [scale]) for f, scale in zip(fits, wanted, strict=True)]
        needed = [strength for strength in each if strength is not None]
        alike = len(needed) == len(fits) and all(math.isclose(needed[0], other, rel_tol=_AGREE) for other in needed)
        return float(f"{needed[0]:.3g}") if needed and alike else None

    def verdict(self, examples: int) -> Verdict:
        """Return the verdict, with the rows a person reads; it took `examples` to find it."""
        finding, fit = self.finding, self.fit
        return self.cell.verdict(
            self.family,
            self.outcome,
            code=self.code,
            title=self._title(),
            worst_module=self.worst,
            modules_failed=len(finding.modules) or None,
            modules_total=len(finding.observation.fits) or None,
            law=law_record(self.law) if self.law else None,
            prescription=self.use,
            counterexample=self.example.as_json(),
            reproduce=self.place.reproduce(self.example),
            rows=tuple(self._rows()),
            examples=examples,
            measured_scale=fit.scale if fit else None,
            expected_scale=fit.expected if fit else None,
            ratio=fit.scale / fit.expected if fit and fit.expected else None,
            data=dict(finding.data),
        )

    def _title(self) -> str:
        trait = self.diagnosis.trait if self.family in LAW_FAMILIES else self.only_where
        when = f" only where: {trait}" if trait else ""
        return f"{CODES[self.code].title}{when}: {self.finding.fact}".removesuffix(": ")

    def _rows(self) -> Iterator[tuple[str, str]]:
        subject, code = self.cell.subject, CODES[self.code]
        yield "loader", f"{subject.title} {subject.version or ''}".rstrip()
        yield "file", self.place.place
        yield "lora", _lora(self.example, self.place.variant)
        if self.worst and self.fit:
            yield from self._measured(self.worst, self.fit)
        if self.finding.observation.raised:
            yield from self.finding.observation.raised.rows()
        if self.law:
            doubt = f" (ambiguous: also {', '.join(self.law.alternatives)})" if self.law.ambiguous else ""
            says = f"{self.law.formula}{doubt}; expected {self.place.variant.factor}"
            yield "law", says if subject.strength_argument else _without_strength(says)
            if self._unnamed:  # what follows a load has measured another thing than the law
                yield "use", _use(subject.strength_argument, self.use)
        if self.diagnosis.trait and self.family in LAW_FAMILIES and self.law is None and self.fit:
            yield "only where", self.diagnosis.trait.text
        why = _COMPUTED if self._is_lost else (code.cause, code.fix)
        cause, fix = (each.replace(_PLAIN, self.place.variant.factor) for each in why)
        yield "cause", cause
        yield "fix", f"{fix}   (lora-harness explain {self.code})"
        yield "reproduce", self.place.reproduce(self.example)

    @property
    def _is_lost(self) -> bool:
        """Whether what did nothing are layers that keep no weight of their own, which a write does not change."""
        layers, modules = self.place.view.layers, self.finding.modules
        return self.code in _NO_EFFECT and bool(modules) and all(layers[name].computed for name in modules)

    def _measured(self, worst: str, fit: Fit) -> Iterator[tuple[str, str]]:
        layers = self.place.view.layers
        yield "worst", f"{worst} [{'x'.join(map(str, layers[worst].shape)) if worst in layers else ''}]"
        yield "measured", _measured(fit)
        yield "expected", _expected(self.example, worst, fit, self.place.variant)
        yield "tolerance", f"+-{fit.tolerance.scale:.1e}: {fit.tolerance.why()}"


def _lora(example: Example, variant: Variant) -> str:
    text = _modules(example.targets) if variant.alpha else _unranked(example.targets, variant)
    return (
        f"{text}; strength {example.strength:g}, {example.file_dtype} into {example.dtype}, seed {example.value_seed}"
    )


def _modules(targets: Sequence[Target]) -> str:
    shapes = {(t.rank, t.alpha) for t in targets}
    if len(shapes) > 1:
        return _listed([f"{_short(t.name)} r{t.rank} alpha {_alpha(t.alpha)}" for t in targets])
    rank, alpha = shapes.pop()
    return f"{count(len(targets), 'module')}, rank {rank}, alpha {_alpha(alpha)}"


def _unranked(targets: Sequence[Target], variant: Variant) -> str:
    beside = f", {variant.beside}" if variant.beside else ""
    return f"{count(len(targets), 'module')} without a rank{beside}"


def _listed(shown: Sequence[str]) -> str:
    more = len(shown) - _SHOWN_MODULES
    return ", ".join(shown[:_SHOWN_MODULES]) + (f" and {more} more" if more > 0 else "")


def _short(name: str) -> str:
    return ".".join(name.split(".")[-2:])  # the last part alone is often a number


def _alpha(alpha: float | None) -> str:
    return "absent" if alpha is None else f"{alpha:g}"


def _measured(fit: Fit) -> str:
    if fit.unchanged:
        return "nothing changed"
    direction = "direction right" if fit.direction_right else f"{fit.relative_residual:.0%} of the change unexplained"
    return f"scale {fit.scale:.4f}, {direction}"


def _expected(example: Example, worst: str, fit: Fit, variant: Variant) -> str:
    target = next(t for t in example.targets if t.name == worst)
    rank = f"sqrt({target.rank})" if variant.root else str(target.rank)
    formula = f"{example.strength:g} * {_alpha(target.alpha)} / {rank}" if target.alpha is not None else "strength"
    trained = f"   (PEFT: {variant.factor})" if variant.alpha else ""
    return f"scale {fit.expected:.4f} = {formula}{trained}"


def _without_strength(law: str) -> str:
    """Return a law of a loader that takes none: strength is 1 there."""
    return re.sub(r"\bstrength\b", "1", re.sub(r"\bstrength \* | \* strength\b", "", law))


def _use(argument: str | None, use: float | None) -> str:
    if argument is None:
        return "it takes no strength; the loader must be fixed"
    if use is None:
        return f"no single {argument} makes this file right; the loader must be fixed"
    return f"{argument} = {use:g} for this file as trained, until it is fixed"
