"""The factor a loader puts on B @ A, from its law: measured here, or from the committed table; the strength to pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from harness.doctor.traits import Traits
from harness.errors import LoaderSpecError, UserError
from harness.files import LoraModule
from harness.law.known import ScaleLaw, file_probes, known_laws, tools, wanted_scale
from harness.law.law import Law
from harness.law.scale import trained_scale

if TYPE_CHECKING:
    from harness.loaders.protocol import Subject


@dataclass(frozen=True)
class Gain:
    """The factor at strength 1 for (alpha, rank); by default alpha / rank, and 1 without alpha."""

    at_one: Callable[[float | None, int], float] = trained_scale
    formula: str | None = None
    measured: bool = False
    notes: tuple[str, ...] = ()


def gain_of(loader: str, format: str) -> Gain:
    """Measure the law of `loader` on files of `format`; take it from the table when the loader is not installed.

    Raises:
        UserError: nobody knows the loader, it does not read the format, raises, or follows no law.
    """
    from harness.loaders.registry import resolve

    known = known_laws().get(loader)
    try:
        subject = resolve(loader)
    except LoaderSpecError:
        if known is None:
            raise
        return _from_table(known, format)
    _require(loader, subject.formats, format)
    measured = MeasuredLoader(subject, format)
    return Gain(lambda alpha, rank: measured.gains([_module(alpha, rank)])[0], measured.law.formula, True)


def _from_table(law: ScaleLaw, format: str) -> Gain:
    _require(law.name, law.formats, format)
    note = f"{law.name} is not installed: its law is taken from the committed table"
    return Gain(lambda alpha, rank: law.at_one(_module(alpha, rank)), law.law.formula, False, (note,))


def _require(loader: str, formats: Iterable[str], format: str) -> None:
    if format not in formats:
        raise UserError(f"{loader} does not read {format}, it reads {', '.join(formats)}")


def _module(alpha: float | None, rank: int) -> LoraModule:
    return LoraModule("", rank, 1, 1, alpha, False, "F32", {})


@dataclass(frozen=True)
class MeasuredLoader:
    """A loader whose law is measured when it is asked for, on files of `format`: with alpha, without, rank-stabilised.

    Raises:
        UserError: the loader raised, or follows no law.
    """

    subject: Subject
    format: str | None
    bench: str | None = None

    @cached_property
    def law(self) -> Law:
        """The law on files whose modules carry alpha."""
        return self._measured()

    @cached_property
    def without_alpha(self) -> Law:
        """The law on files that carry no alpha."""
        return self._measured(alpha=False)

    @cached_property
    def stabilised(self) -> Law:
        """The law on files that say alpha was divided by sqrt(rank)."""
        return self._measured(variant="rslora")

    def _measured(self, *, alpha: bool = True, variant: str = "lora") -> Law:
        from harness.checks.law import measure_law

        name = self.subject.spec
        found = measure_law(self.subject, format=self.format, bench=self.bench, alpha=alpha, variant=variant)
        if found.raised:
            raise UserError(f"{name}: cannot be measured: {found.raised[0]}")
        if found.diagnosis.law is None:
            raise UserError(f"{name}: follows no single law ({found.diagnosis.code}); no file makes it right")
        return found.diagnosis.law

    def gains(self, modules: Iterable[LoraModule]) -> list[float]:
        """Return the factor on B @ A of every module of one file, in its order, at strength 1.

        A whole difference (rank 0) has the strength alone.
        """
        every = list(modules)
        probes = iter(file_probes([module for module in every if module.rank]))
        return [self._law_of(m).scale(next(probes)) if m.rank else self.law.strength.apply(1.0) for m in every]

    def _law_of(self, module: LoraModule) -> Law:
        if module.alpha is None:
            return self.without_alpha
        return self.stabilised if module.rslora else self.law


_MEASURED = frozenset({"lora", "conv", "embedding", "lora_diff", "diff"})
_REPLACING = frozenset({"set", "tokens", "copy"})


def measured_prescription(loader: str, traits: Traits, *, lora_alpha: float | None = None) -> float | None:
    """Measure the law of `loader` on the file's format and return the strength that reproduces its training.

    It is measured on the bench of the file's own architecture (`own_bench`), else on the first that the loader
    declares. None when no single strength does, when no law explains the loader, when it declares formats and this is
    none of them, when the file carries no alpha and `lora_alpha` is not given either, or when the file holds other
    kinds than those on which the law is measured.

    Raises:
        UserError: `loader` names no loader, or it raised while being measured.
    """
    from harness.loaders.registry import resolve

    adapter, subject = traits.adapter, resolve(loader)
    modules = [module for module in adapter.modules.values() if module.variant not in _REPLACING]
    if not {module.variant for module in modules} <= _MEASURED:
        return None
    wanted = [wanted_scale(module, lora_alpha) for module in modules]
    known = [scale for scale in wanted if scale is not None]
    reads = adapter.format in subject.formats
    if len(known) < len(wanted) or not modules or not (reads or subject.declaration.formats is None):
        return None
    measured = MeasuredLoader(subject, adapter.format if reads else None, own_bench(loader, traits))
    return measured.law.strength_for(measured.gains(modules), known)


def known_obstacle(loader: str, traits: Traits, *, lora_alpha: float | None = None) -> str:
    """Say why no strength is right in a tool that is known to lose or break such files; empty where none is known."""
    from harness.doctor.answer import Question
    from harness.doctor.answers import answer, why_not

    tool, asked = tools().get(loader), Question(lora_alpha=lora_alpha)
    if tool is None or traits.adapter.format not in tool.formats:
        return ""
    given = answer(tool, traits, asked)
    if given.strength is not None or given.effect in ("law", "unknown"):
        return ""
    return why_not(given, traits, asked)


def own_bench(loader: str, traits: Traits) -> str | None:
    """Return the bench of the file's architecture, where the loader declares it for this format; else None."""
    from harness.loaders.registry import resolve

    subject = resolve(loader)
    families = [family for group in traits.groups for family, _ in group.places]
    able = [bench for form, bench in subject.cells if form == traits.adapter.format]
    return next((family for family in families if family in able), None)
