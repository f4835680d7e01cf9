"""Known failures: what a released loader is known to get wrong, with reason and link; strict in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from harness.checks.cell import Cell, declared_cells
from harness.checks.describe import NamedFinding, passed
from harness.checks.family import LAW_FAMILIES
from harness.checks.observation import unmeasured_probes
from harness.checks.plan import Plan, examples_for, planned
from harness.checks.search import Search, observe, search
from harness.errors import UserError
from harness.example import Example
from harness.fixtures import fixtures_folder
from harness.law.diagnosis import diagnose
from harness.law.traits import TRAITS
from harness.verdict.codes import CODES
from harness.verdict.verdict import Verdict

_KNOWN_EXAMPLES = 40


@dataclass(frozen=True)
class KnownFailure:
    """One line of a known-failures file.

    `trait` (a name of `harness.law.traits.TRAITS`) keeps the general search away from inputs with this known
    fault, so that it cannot hide others; those inputs are tried on their own and must still fail with `code`.
    `seconds` is the time limit of a call in that trial, for a fault that is a hang.
    """

    id: str
    loader: str
    code: str
    reason: str
    link: str
    formats: tuple[str, ...] = ()
    benches: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    trait: str | None = None
    versions: str | None = None
    seconds: float | None = None

    @property
    def of_images(self) -> bool:
        """Whether this line speaks of pictures, not of weights."""
        return CODES[self.code].family == "images"

    @property
    def of_scale(self) -> bool:
        """Whether this line speaks of a law."""
        return CODES[self.code].family in LAW_FAMILIES

    def names(self, code: str | None, *, short: bool) -> bool:
        """Whether a fault with `code` is this one; a `short` check may find a law where there is none (LH209)."""
        scale = code is not None and CODES[code].family in LAW_FAMILIES
        return code == self.code or (short and scale and self.code == "LH209")

    def excuse(self, verdict: Verdict) -> Verdict:
        """Return `verdict` as an expected failure, with the reason and the link."""
        return verdict.model_copy(update={"outcome": "xfailed", "reason": f"{self.reason} ({self.link})"})

    def gone(self) -> str:
        """Say that this failure is no more."""
        return f"known failure {self.id} no longer fails with {self.code}: remove its line"


def applies(line: KnownFailure, cell: Cell) -> bool:
    """Whether a line speaks of the cell's loader, version, format and bench."""
    return (
        not line.of_images
        and cell.subject.spec == line.loader
        and (not line.formats or cell.format in line.formats)
        and (not line.benches or cell.bench_name in line.benches)
        and (not line.variants or cell.variant_name in line.variants)
        and _version_fits(line.versions, cell.subject.version)
    )


def _version_fits(versions: str | None, version: str | None) -> bool:
    if versions is None or version is None:
        return True
    from packaging.specifiers import SpecifierSet

    return version in SpecifierSet(versions, prereleases=True)


def covers(line: KnownFailure, cell: Cell, example: Example) -> bool:
    """Whether some module of `example` has the trait of a line."""
    return line.trait is not None and any(map(TRAITS[line.trait], unmeasured_probes(example, cell.view)))


def read_known_failures(path: Path) -> list[KnownFailure]:
    """Read a TOML file of `[[failure]]` tables.

    Raises:
        UserError: unreadable file, unknown field, code or trait, or a line without reason and link.
    """
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib  # type: ignore[no-redef]
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("failure", [])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: cannot read known failures: {error}") from None
    return [_parse(path, table) for table in tables]


def _parse(path: Path, table: dict[str, object]) -> KnownFailure:
    where = f"{path}: failure {table.get('id', '?')!r}"
    unknown = set(table) - {field.name for field in fields(KnownFailure)}
    missing = {"id", "loader", "code", "reason", "link"} - set(table)
    if unknown or missing:
        raise UserError(f"{where}: unknown fields {sorted(unknown)}, missing fields {sorted(missing)}")
    if table["code"] not in CODES:
        raise UserError(f"{where}: code={table['code']!r} is no code; see `lora-harness explain`")
    if table.get("trait") is not None and table["trait"] not in TRAITS:
        raise UserError(f"{where}: trait={table['trait']!r} is none of {', '.join(TRAITS)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    return KnownFailure(**values)  # type: ignore[arg-type]


def known_failures(source: str | None) -> tuple[KnownFailure, ...]:
    """Return the known failures of the file `source`, the shipped ones when it is `shipped`, none without it."""
    if source is None:
        return ()
    return tuple(shipped_known_failures() if source == "shipped" else read_known_failures(Path(source)))


def shipped_known_failures() -> list[KnownFailure]:
    """Return the known failures of the loaders this package tests, from `fixtures/known_failures/`."""
    paths = sorted((fixtures_folder() / "known_failures").glob("*.toml"))
    return [known for path in paths for known in read_known_failures(path)]


def unmatched(known: Sequence[KnownFailure], cells: Sequence[Cell]) -> list[KnownFailure]:
    """Return the lines that name a loader under test and none of the cells it declares: stale lines are errors."""
    subjects = {cell.subject.spec: cell.subject for cell in cells}
    lines = [k for k in known if k.loader in subjects and not k.of_images]
    declared = {spec: declared_cells(subject) for spec, subject in subjects.items()}
    return [k for k in lines if not any(applies(k, cell) for cell in declared[k.loader])]


def tried_alone(cell: Cell, plan: Plan, known: KnownFailure) -> Verdict:
    """Try the inputs with a known fault on their own: they must still fail with the recorded code.

    A line without a trait speaks of all inputs; it is tried when the search, perhaps a short one, did not show it.
    """

    def tried(example: Example) -> bool:
        return known.trait is None or covers(known, cell, example)

    limited = replace(cell, seconds=known.seconds or cell.seconds)
    until = None if known.of_scale else known.code  # a law takes more than one example
    found = Search()
    for example in filter(tried, planned(cell, plan.layers_in(cell))):
        if until not in found.counts:
            found.add(*observe(limited, example))
    if (verdict := _shown(limited, known, found)) is not None:
        return verdict
    strategy = examples_for(cell, plan).filter(tried)
    found.join(search(limited, strategy, max_examples=_KNOWN_EXAMPLES, base_seed=plan.seed, until=until))
    return _shown(limited, known, found) or _unexpected_pass(limited, known, found.examples)


def _shown(cell: Cell, known: KnownFailure, found: Search) -> Verdict | None:
    """Return the excused verdict when the recorded fault is among what was found."""
    diagnosis = diagnose(found.probes)
    faults = (NamedFinding(cell, finding, diagnosis) for finding in found.findings.values())
    return next((known.excuse(fault.verdict(found.examples)) for fault in faults if fault.code == known.code), None)


def _unexpected_pass(cell: Cell, known: KnownFailure, examples: int) -> Verdict:
    verdict = passed(cell, "known_failures", examples)
    return verdict.model_copy(
        update={"outcome": "xpassed", "code": known.code, "title": known.gone(), "reason": known.reason}
    )


def excuse_images(verdicts: Sequence[Verdict], known: Sequence[KnownFailure]) -> list[Verdict]:
    """Return the verdicts of a sweep with known failures marked; a line that excuses nothing turns red here too."""
    lines = [k for k in known if k.of_images and any(v.loader == k.loader for v in verdicts)]
    by_place = {(k.loader, k.code): k for k in lines}
    excused = [by_place[k].excuse(v) if (k := (v.loader, v.code or "")) in by_place else v for v in verdicts]
    codes = {(v.loader, v.code) for v in verdicts}
    fixed = [k for k in lines if (k.loader, k.code) not in codes]
    return excused + [
        Verdict(loader=k.loader, check="images", outcome="xpassed", code=k.code, title=k.gone()) for k in fixed
    ]
