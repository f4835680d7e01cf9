"""Which LoRA files another release of a loader makes look different, and by what factor: a gate for dependants."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from harness.checks.law import MeasuredLaw, measure_law
from harness.checks.releases import unloads
from harness.doctor.traits import Traits
from harness.errors import UserError
from harness.files import LoraAdapter, LoraModule, read_lora
from harness.law.known import file_probes
from harness.law.law import Law
from harness.loaders.protocol import Subject

Outcome = Literal["same", "changes", "not judged"]
_SUFFIXES = (".safetensors", ".gguf")
_MEASURED = frozenset({"lora", "conv", "embedding"})
_SAME = 1e-6  # of the factor


@dataclass(frozen=True)
class FileChange:
    """What becomes of one file: `factors` are the smallest and the largest that its modules are multiplied by."""

    path: str
    outcome: Outcome
    what: str
    factors: tuple[float, float] | None = None


@dataclass(frozen=True)
class Kind:
    """What a law is measured for: a format on a bench, files with alpha or without, rank-stabilised or not."""

    format: str
    bench: str
    alpha: bool
    variant: str


class UnmeasuredError(Exception):
    """Nothing that was measured says what becomes of a file; the message says why."""


@dataclass
class MeasuredRelease:
    """A release of the loader, whose laws are measured when a file asks for them."""

    subject: Subject
    laws: dict[Kind, MeasuredLaw] = field(default_factory=dict)

    def law(self, kind: Kind) -> MeasuredLaw:
        """Return the law for a kind of file."""
        if kind not in self.laws:
            where = {"format": kind.format, "bench": kind.bench, "variant": kind.variant}
            self.laws[kind] = measure_law(self.subject, alpha=kind.alpha, **where)
        return self.laws[kind]

    def gains(self, kind: Kind, modules: Sequence[LoraModule], chosen: Sequence[int]) -> list[float] | str:
        """Return the factor at strength 1 of the `chosen` modules of a file, or why there is none.

        Raises:
            UnjudgedError: no law explains what was measured, or several that differ for this file do.
        """
        measured = self.law(kind)
        if measured.raised and measured.probes:
            raise UnmeasuredError(f"{self.subject.spec} raises on some {kind.format} files: {measured.raised[0]}")
        if measured.raised:
            return f"raises ({measured.raised[0]})"
        if unloads(measured.probes):
            return "loads nothing"
        law = measured.diagnosis.law
        if law is None or law.factors:
            raise UnmeasuredError(f"{self.subject.spec} follows no single law on {kind.format} files of {kind.bench}")
        found = [_gains(each, modules, chosen) for each in (law, *law.others)]
        if any(not _alike(found[0], other) for other in found[1:]):
            raise UnmeasuredError(f"several laws explain what {self.subject.spec} does, and differ for this file")
        return found[0]


def _gains(law: Law, modules: Sequence[LoraModule], chosen: Sequence[int]) -> list[float]:
    probes = file_probes(modules)
    return [law.scale(probes[index]) for index in chosen]


def _alike(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=_SAME, abs_tol=1e-12) for a, b in zip(one, other, strict=True))


def files_below(path: Path) -> list[Path]:
    """Return the LoRA files at or below a path, PEFT folders as one each.

    Raises:
        UserError: there is nothing there.
    """
    if path.is_file() or (path / "adapter_config.json").is_file():
        return [path]
    folders = {config.parent for config in path.rglob("adapter_config.json")}
    loose = [file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.parent not in folders]
    if not folders and not loose:
        raise UserError(f"{path}: there is no LoRA file there")
    return sorted([*folders, *loose])


def compare_files(paths: Sequence[Path], before: Subject, after: Subject) -> Iterator[FileChange]:
    """Yield, for each file, what is different with the release `after` from what it is with `before`, at strength 1.

    The laws are measured on the bench of the file's own architecture; what is not measured there is not judged.
    """
    releases = MeasuredRelease(before), MeasuredRelease(after)
    for path in paths:
        try:
            yield _compared(path, *releases)
        except (UnmeasuredError, UserError) as error:
            yield FileChange(str(path), "not judged", str(error))


def _compared(path: Path, before: MeasuredRelease, after: MeasuredRelease) -> FileChange:
    adapter = read_lora(path, strict=False)
    bench = _bench(adapter, before.subject)
    modules = [module for module in adapter.modules.values() if module.rank]
    factors: list[float] = []
    for kind, chosen in _kinds(adapter.format, bench, modules).items():
        old, new = (release.gains(kind, modules, chosen) for release in (before, after))
        if isinstance(old, str) or isinstance(new, str):
            return _told(path, before, after, old, new)
        factors += [_factor(a, b) for a, b in zip(old, new, strict=True)]
    low, high = min(factors), max(factors)
    if max(abs(low - 1), abs(high - 1)) <= _SAME:
        return FileChange(
            str(path), "same", f"the same scale in all {len(factors)} modules (bench {bench})", (low, high)
        )
    span = f"{low:.4g}" if math.isclose(low, high, rel_tol=_SAME) else f"{low:.4g} to {high:.4g}, module by module"
    return FileChange(str(path), "changes", f"times {span} (bench {bench})", (low, high))


def _told(
    path: Path, before: MeasuredRelease, after: MeasuredRelease, old: list[float] | str, new: list[float] | str
) -> FileChange:
    if isinstance(old, str) and isinstance(new, str):
        same = old.partition(" (")[0] == new.partition(" (")[0]
        return FileChange(str(path), "same" if same else "changes", old if same else f"{old}, then {new}")
    was, now = (each if isinstance(each, str) else "loads it" for each in (old, new))
    return FileChange(str(path), "changes", f"{before.subject.spec} {was}; {after.subject.spec} {now}")


def _factor(before: float, after: float) -> float:
    if before == after:
        return 1.0
    return after / before if before else math.inf


def _bench(adapter: LoraAdapter, subject: Subject) -> str:
    """Return the bench on which the laws of a file are measured.

    Raises:
        UnjudgedError: nothing that is measured is like this file.
    """
    others = sorted({module.variant for module in adapter.modules.values()} - _MEASURED)
    if others or not adapter.modules:
        raise UnmeasuredError(f"it holds {', '.join(others) or 'no module'}, which no law is measured for")
    if adapter.format not in subject.formats:
        raise UnmeasuredError(
            f"{subject.spec} is measured on {', '.join(subject.formats)} files, this is {adapter.format}"
        )
    groups = Traits(adapter).groups
    families = [dict.fromkeys(family for family, _ in group.places) for group in groups]
    if len(groups) != 1:
        raise UnmeasuredError("it has parts for several models of a pipeline, which are measured one at a time")
    found = next((f for f in families[0] if subject.unsupported(adapter.format, f) is None), None)
    if found is None or (adapter.format, found) not in subject.cells:
        raise UnmeasuredError("there is no bench of its architecture on which the loader is measured")
    return found


def _kinds(form: str, bench: str, modules: Sequence[LoraModule]) -> dict[Kind, list[int]]:
    """Return the modules of a file, by their place in it, under what their law is measured for."""
    kinds: dict[Kind, list[int]] = {}
    for index, module in enumerate(modules):
        variant = "rslora" if module.rslora else "lora"
        kinds.setdefault(Kind(form, bench, module.alpha is not None, variant), []).append(index)
    return kinds
