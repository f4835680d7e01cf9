"""A file record as a person reads it: one fact per line, plain text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from harness.doctor.prescribe import known_laws
from harness.doctor.record import FileRecord, ModuleEnergy
from harness.files.text import count, printable

_METADATA_LINES = 8
_STRONGEST = 5


def text(record: FileRecord) -> str:
    """Return the record as text: the path, then labelled rows."""
    rows = [(label, line) for label, lines in _sections(record) for label, line in _labelled(label, lines)]
    width = max((len(label) for label, _ in rows), default=0)
    return "\n".join([printable(record.path, 500), *(f"  {label:<{width}}  {line}".rstrip() for label, line in rows)])


def _sections(record: FileRecord) -> Iterator[tuple[str, Iterable[str]]]:
    if record.readable:
        yield "format", [f"{record.format}, {count(record.modules, 'module')}, {record.size:,} bytes"]
        yield "trainer", [record.trainer] if record.trainer else []
        yield "rank", [_counts(record.ranks)]
        yield "alpha", [f"{_counts(record.alphas)} (from: {record.alpha_source})"]
        yield "variant", [_counts(record.variants)] if set(record.variants) != {"lora"} else []
        yield "trained", [f"scale {_range(record.trained)} on B @ A" if record.trained else "scale unknown: no alpha"]
        yield "read as", ["; ".join(f"{name}: {_range(found)}" for name, found in record.scales.items())]
        yield "coverage", [f"{record.coverage:.0%} of the keys understood"] if record.coverage is not None else []
    yield "hazard", [f"{hazard.code} {hazard.what}" for hazard in record.hazards] or ["none"]
    yield "note", record.notes
    yield "use", _uses(record.prescription)
    yield "energy", _energies(record.energies or {})
    yield "verdict", [f"{record.advice.outlook}: {record.advice.reason}"] if record.advice else []
    yield "advice", record.advice.advice if record.advice else []
    yield "metadata", [f"{key} = {value}" for key, value in list(record.metadata.items())[:_METADATA_LINES]]


def _labelled(label: str, lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    for place, line in enumerate(lines):
        yield (label if place == 0 else ""), line


def _uses(prescription: Mapping[str, float | None]) -> Iterator[str]:
    laws = known_laws()
    for name, strength in prescription.items():
        argument = laws[name].argument if name in laws else "strength"
        said = f"{argument} = {strength:g}" if strength is not None else "no single value can be given"
        yield f"{name}: {said}"


def _energies(energies: Mapping[str, ModuleEnergy]) -> Iterator[str]:
    ordered = sorted(energies.items(), key=lambda item: -(item[1].relative or item[1].norm))
    for name, energy in ordered[:_STRONGEST]:
        share = "" if energy.relative is None else f", {energy.relative:.2g} of ||W||"
        facts = f"||ΔW|| {energy.norm:.4g}{share}, largest singular value {energy.spectral:.4g}"
        yield f"{printable(name, 80)}: {facts}, effective rank {energy.effective_rank:.3g}"
    if len(energies) > _STRONGEST:
        yield f"and {count(len(energies) - _STRONGEST, 'weaker module')}"


def _counts(values: Mapping[str, int]) -> str:
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} in {times}" for value, times in values.items()) or "none"


def _range(found: tuple[float, float]) -> str:
    low, high = found
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
