"""Known failures: what a released loader is known to get wrong, with reason and link; strict in both directions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from harness.benches import bench_names, more_benches, own_benches
from harness.checks.cell import Cell, declared_cells
from harness.checks.describe import NamedFinding, passed
from harness.checks.families.silence import KINDS, tries_silence
from harness.checks.family import LAW_FAMILIES
from harness.checks.observation import unmeasured_probes
from harness.checks.plan import Plan, examples_for, planned
from harness.checks.search import Search, observe, search
from harness.errors import UserError
from harness.example import Example
from harness.files import FORMATS
from harness.fixtures import fixtures_folder
from harness.law.diagnosis import diagnose
from harness.law.traits import TRAITS
from harness.loaders.protocol import Subject
from harness.outputs import text_of
from harness.text import printable
from harness.variants import VARIANTS
from harness.verdict.codes import CODES
from harness.verdict.verdict import Verdict

KNOWN_EXAMPLES = 40


def _code(code: str) -> str:
    if code not in CODES:
        raise ValueError(f"{code!r} is no code; see `lora-harness explain`")
    return code


def _versions(versions: str) -> str:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        SpecifierSet(versions)
    except InvalidSpecifier:
        raise ValueError(f"{versions!r} is no version specifier, such as '>=0.30,<0.33'") from None
    return versions


def _among(known: Callable[[], Iterable[str]]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in known():
            raise ValueError(f"{name!r} is none of {', '.join(known())}")
        return name

    return AfterValidator(check)


_Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class KnownFailure:
    """One line of a known-failures file.

    `trait` (a name of `harness.law.traits.TRAITS`) keeps the general search away from inputs with this known
    fault, so that it cannot hide others; those inputs are tried on their own and must still fail with `code`.
    `seconds` is the time limit of a call in that trial, for a fault that is a hang. `kinds` are what the loader drops
    without a word (a kind of thing that cannot be applied, or a variant that it does not declare): all of these, and
    nothing else.
    """

    id: _Text
    loader: _Text
    code: Annotated[str, AfterValidator(_code)]
    reason: _Text
    link: _Text
    formats: tuple[Annotated[str, _among(lambda: FORMATS)], ...] = ()
    benches: tuple[Annotated[str, _among(lambda: (*bench_names(), *more_benches(), *own_benches()))], ...] = ()
    variants: tuple[Annotated[str, _among(lambda: VARIANTS)], ...] = ()
    trait: Annotated[str, _among(lambda: TRAITS)] | None = None
    versions: Annotated[str, AfterValidator(_versions)] | None = None
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    kinds: tuple[Annotated[str, _among(lambda: KINDS)], ...] = ()

    @property
    def of_images(self) -> bool:
        """Whether this line speaks of pictures, not of weights."""
        return CODES[self.code].family == "images"

    @property
    def of_scale(self) -> bool:
        """Whether this line speaks of a law."""
        return CODES[self.code].family in LAW_FAMILIES

    def names(self, verdict: Verdict, *, short: bool) -> bool:
        """Whether the fault of a verdict is this one; a `short` check may find a law where there is none (LH209)."""
        code = verdict.code
        if self.kinds or verdict.check == "silence":
            return code == self.code and set(verdict.data.get("silent", ())) <= set(self.kinds)
        scale = code is not None and CODES[code].family in LAW_FAMILIES
        return code == self.code or (short and scale and self.code == "LH209")

    def spoken(self, heard: Mapping[str, str]) -> tuple[str, ...]:
        """Return which of its kinds were tried and are silent no more."""
        return tuple(kind for kind in self.kinds if heard.get(kind, "silent") != "silent")

    def excuse(self, verdict: Verdict) -> Verdict:
        """Return `verdict` as an expected failure, with the reason and the link."""
        return verdict.model_copy(update={"outcome": "xfailed", "reason": f"{self.reason} ({self.link})"})

    def gone(self) -> str:
        """Say that this failure is no more."""
        return f"known failure {self.id} no longer fails with {self.code}: remove its line"


_LINE = TypeAdapter(KnownFailure)


def applies(line: KnownFailure, cell: Cell) -> bool:
    """Whether a line speaks of the cell's loader, version, format and bench."""
    return (
        not line.of_images
        and line.loader in (cell.subject.spec, cell.subject.known_as)
        and (not line.formats or cell.format in line.formats)
        and (not line.benches or cell.bench_name in line.benches)
        and (not line.kinds or tries_silence(cell))
        and (not line.variants or cell.variant_name in line.variants)
        and _version_fits(line.versions, cell.subject.version)
    )


def binds(line: KnownFailure, cell: Cell) -> bool:
    """Whether a line that no longer fails turns the cell red.

    A line without `versions` is of the release that the loader's plain name runs: in another it excuses, and no more.
    """
    return line.versions is not None or line.loader == cell.subject.spec


def _version_fits(versions: str | None, version: str | None) -> bool:
    if versions is None or version is None:
        return True
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version) in SpecifierSet(versions, prereleases=True)
    except InvalidVersion:  # a commit
        return True


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
        content = tomllib.loads(text_of(path))
    except OSError as error:
        raise UserError(f"{path}: cannot read known failures: {error.strerror or error}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path}: no TOML file of known failures: {error}") from None
    tables = content.pop("failure", [])
    if content or not isinstance(tables, list):
        other = printable(next(iter(content), "failure"))
        raise UserError(f"{path}: {other}: known failures are `[[failure]]` tables and nothing else")
    return _unique(path, [_parse(path, number, table) for number, table in enumerate(tables, 1)])


def _unique(path: Path, lines: list[KnownFailure]) -> list[KnownFailure]:
    seen = Counter(line.id for line in lines)
    if twice := next((name for name, number in seen.items() if number > 1), None):
        raise UserError(f"{path}: id={printable(twice)!r} stands {seen[twice]} times: every failure has its own")
    return lines


def _parse(path: Path, number: int, table: object) -> KnownFailure:
    name = table.get("id") if isinstance(table, dict) else None
    where = f"{path}: failure {number} ({printable(name or 'without id')})"
    try:
        return _LINE.validate_python(table)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(part for part in first["loc"] if isinstance(part, str)) or "the table"
        raise UserError(f"{where}: {field}: {first['msg'].removeprefix('Value error, ')}") from None


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
    """Return the lines that name a loader under test and none of the cells it declares: stale lines are errors.

    A line for other releases than the one under test is none of them, nor one for a bench that is checked when it is
    asked for.
    """
    subjects = {cell.subject.spec: cell.subject for cell in cells}
    named = [k for k in known if k.loader in subjects and not k.of_images]
    lines = [k for k in named if _version_fits(k.versions, subjects[k.loader].version)]
    lines = [k for k in lines if not subjects[k.loader].declaration.also.intersection(k.benches)]
    declared = {spec: declared_cells(subject) for spec, subject in subjects.items()}
    return [k for k in lines if not any(applies(k, cell) for cell in declared[k.loader])]


def tried_alone(cell: Cell, plan: Plan, known: KnownFailure) -> Iterator[Verdict]:
    """Try the inputs with a known fault on their own: they must still fail with the recorded code.

    A line without a trait speaks of all inputs; it is tried when the search, perhaps a short one, did not show it.
    Where a line does not bind, what these inputs show instead is told: the search kept away from them.
    """
    if not binds(known, cell) and known.trait is None:
        return

    def tried(example: Example) -> bool:
        return known.trait is None or covers(known, cell, example)

    limited = replace(cell, seconds=known.seconds or cell.seconds)
    until = None if known.of_scale else known.code  # a law takes more than one example
    found = Search()
    for example in filter(tried, planned(cell, plan.layers_in(cell))):
        if until not in found.counts:
            found.add(*observe(limited, example))
    if known.code not in _named(limited, found):
        strategy = examples_for(cell, plan).filter(tried)
        found.join(search(limited, strategy, max_examples=KNOWN_EXAMPLES, base_seed=plan.seed, until=until))
    shown = _named(limited, found)
    if known.code in shown:
        yield known.excuse(shown[known.code].verdict(found.examples))
    elif binds(known, cell):
        yield _unexpected_pass(limited, known, found.examples)
    else:
        elsewhere = {line.code for line in plan.known if applies(line, cell)}
        yield from (fault.verdict(found.examples) for code, fault in shown.items() if code not in elsewhere)


def _named(cell: Cell, found: Search) -> dict[str, NamedFinding]:
    """Return what was found, by code."""
    diagnosis = diagnose(found.probes)
    faults = [NamedFinding(cell, finding, diagnosis) for finding in found.findings.values()]
    return {fault.code: fault for fault in reversed(faults)}


def _unexpected_pass(cell: Cell, known: KnownFailure, examples: int) -> Verdict:
    verdict = passed(cell, "known_failures", examples)
    return verdict.model_copy(
        update={"outcome": "xpassed", "code": known.code, "title": known.gone(), "reason": known.reason}
    )


def no_longer_silent(cell: Cell, known: KnownFailure, examples: int) -> Verdict:
    """Return that a loader now says, refuses or applies what it is known to drop."""
    title = f"{known.gone()}, or what it says no longer of it: {', '.join(known.spoken(cell.heard))}"
    return _unexpected_pass(cell, known, examples).model_copy(update={"title": title})


def lines_of_images(subject: Subject, known: Sequence[KnownFailure]) -> list[KnownFailure]:
    """Return the lines with those of the live loader that `subject` is a release of under its own name."""
    return [replace(k, loader=subject.title) if k.loader == subject.known_as else k for k in known]


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
