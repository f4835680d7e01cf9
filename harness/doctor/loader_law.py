"""The factor a loader puts on B @ A at strength 1, from its law: measured here, or from the committed table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.errors import LoaderSpecError, UserError
from harness.files import LoraModule, read_lora
from harness.law.known import ScaleLaw, known_laws

Factor = Callable[[float | None, int], float]


def _as_trained(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


@dataclass(frozen=True)
class Gain:
    """The factor at strength 1 for (alpha, rank); by default alpha / rank, and 1 without alpha."""

    at_one: Factor = _as_trained
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
    if format not in subject.formats:
        raise UserError(f"{loader} does not read {format}, it reads {', '.join(subject.formats)}")
    return _measured(loader, format)


def _measured(loader: str, format: str) -> Gain:
    from harness.checks.law import measure_law
    from harness.law.probe import Probe

    found = measure_law(loader, format=format)
    if found.raised:
        raise UserError(f"{loader}: cannot be measured: {found.raised[0]}")
    law = found.diagnosis.law
    if law is None:
        raise UserError(f"{loader}: follows no single law ({found.diagnosis.code}); no file makes it right")

    def at_one(alpha: float | None, rank: int) -> float:
        if alpha is None:
            return 1.0
        return float(law.predict([Probe("", 1.0, 0, (alpha,), (rank,), 0.0, 0.0)])[0])

    return Gain(at_one, law.formula, True)


def _from_table(law: ScaleLaw, format: str) -> Gain:
    if format not in law.formats:
        raise UserError(f"{law.name} does not read {format}, it reads {', '.join(law.formats)}")

    def at_one(alpha: float | None, rank: int) -> float:
        return law.at_one(LoraModule("", rank, 1, 1, alpha, False, "F32", {}))

    powers = f"{law.constant:g} * alpha^{law.alpha_power:g} * rank^{law.rank_power:g}"
    return Gain(at_one, powers, False, (f"{law.name} is not installed: its law is taken from the committed table",))


def measured_prescription(loader: str, path: Path, *, lora_alpha: float | None = None) -> float | None:
    """Measure the law of `loader` on the file's format and return the strength that reproduces its training.

    None when no single strength does, when no law explains the loader, or when the file carries no alpha and
    `lora_alpha` is not given either.

    Raises:
        UserError: `loader` names no loader, or it raised while being measured.
    """
    from harness.checks.law import measure_law
    from harness.loaders.registry import resolve

    adapter = read_lora(path, strict=False)
    formats = resolve(loader).formats
    measured = measure_law(loader, format=adapter.format if adapter.format in formats else None)
    if measured.raised:
        raise UserError(f"{loader}: cannot be measured: {measured.raised[0]}")
    modules = adapter.modules.values()
    alphas = [lora_alpha if module.alpha is None else module.alpha for module in modules]
    if measured.diagnosis.law is None or None in alphas:
        return None
    pairs = [(alpha, module.rank) for alpha, module in zip(alphas, modules, strict=True) if alpha is not None]
    return measured.diagnosis.law.prescription(pairs)
