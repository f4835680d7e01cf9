"""`lora-harness releases`: what each release of a loader does, which one changed it, and which files that changes."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.commands import options as shared
from harness.isolation.limits import Limits
from harness.text import on_one_line

if TYPE_CHECKING:
    from harness.checks.releases import Place, ReleaseLaw
    from harness.loaders.live import LiveLoader
    from harness.loaders.protocol import Subject
    from harness.report.kept_releases import KeptReleases
    from harness.report.releases import ReleaseTable


@click.command(
    epilog="\b\nExamples:\n"
    "  lora-harness releases diffusers --from 0.31.0 --format kohya --bench sd-unet --install\n"
    "  lora-harness releases diffsynth --bisect --install\n"
    "  lora-harness releases diffusers --from 0.31.0 --to 0.34.0 --files ~/loras --install\n"
    "  lora-harness releases --newest --install --history reports/out/history.jsonl"
)
@click.argument("loaders", nargs=-1, metavar="[LOADER...]")
@click.option("--from", "low", metavar="VERSION", help="The oldest release.")
@click.option("--to", "high", metavar="VERSION", help="The newest release.")
@click.option("--every", is_flag=True, help="Every release, not only the last of each minor series.")
@click.option("--newest", is_flag=True, help="Only the newest; exit 1 if it does something else than the history has.")
@click.option("--format", "formats", multiple=True, help="Only this file format; repeat for more.")
@click.option("--bench", "benches", multiple=True, help="Only this bench; repeat for more.")
@click.option("--bisect", is_flag=True, help="Halve between releases that differ instead of measuring all.")
@click.option("--files", type=shared.PATH, help="LoRA files: say which change between the two ends, by what factor.")
@click.option("--out", type=shared.FOLDER, default=Path("reports/out/releases"), show_default=True)
@click.option(
    "--resume", is_flag=True,
    help="Take over what OUT has of these releases, also of a run that was cut, measured beside the same packages.",
)  # fmt: skip
@click.option("--history", type=shared.FILE, help="History to add to.  [default: OUT/history.jsonl]")
@shared.limit_option
@click.option("-j", "--workers", type=click.IntRange(1), default=1, show_default=True, help="Releases at once.")
@shared.install_option
@shared.json_option
def command(
    loaders: tuple[str, ...],
    low: str | None,
    high: str | None,
    every: bool,
    newest: bool,
    files: Path | None,
    out: Path,
    resume: bool,
    history: Path | None,
    as_json: bool,
    formats: tuple[str, ...],
    benches: tuple[str, ...],
    bisect: bool,
    time_limit: float | None,
    workers: int,
    install: bool,
) -> None:
    """Say what each release of LOADER does with a LoRA: its scaling law, or that it raises or loads nothing.

    Each runs in a process of its own that finds that release first. Without --install only releases that are here
    are measured, and nothing is asked for. With --files, what changes for these files between the two ends.
    """
    from harness.loaders.between import loader_with_releases, with_releases
    from harness.report.releases import lines, write_tables

    names = list(loaders) or (with_releases() if newest else [])
    if not names:
        raise click.UsageError("name a LOADER, or give --newest for all of them")
    if files is not None:
        sys.exit(_gate(names, low, high, files, install, as_json))
    limits = Limits(time_limit, workers=workers)
    with _keeping(out, resume) as kept:
        how = _How(low, high, every or bisect, newest, install, bisect, limits, as_json, kept)
        tables = [how.table(*loader_with_releases(name), formats, benches) for name in names]
        flips = _remember(history or out / "history.jsonl", tables)
        page = write_tables(tables, out)
    for table in tables:
        for line in [json.dumps(table.as_dict())] if as_json else lines(table):
            click.echo(line)
    if not as_json:
        click.echo(f"report: {page}")
    for flip in flips if newest else ():
        click.echo(f"changed: {flip}", err=as_json)
    sys.exit(_exit_code(tables, bool(newest and flips)))


@contextmanager
def _keeping(out: Path, resume: bool) -> Iterator[KeptReleases]:
    """Keep releases as they are measured, until the tables of all of them are written."""
    from harness.outputs import only_writer
    from harness.report.kept_releases import TABLES, KeptReleases

    written = False
    with only_writer(out / TABLES):
        kept = KeptReleases(out, resume=resume)
        try:
            yield kept
            written = True
        finally:
            kept.close(written=written)


def _gate(names: Sequence[str], low: str | None, high: str | None, files: Path, install: bool, as_json: bool) -> int:
    """Print what becomes of each file between two releases; 1 when one changes, 2 when none could be judged."""
    from harness.doctor.upgrade import compare_files, files_below
    from harness.loaders.between import loader_with_releases
    from harness.loaders.registry import resolve

    if len(names) != 1 or low is None or high is None:
        raise click.UsageError("--files compares two releases of one LOADER: give --from and --to")
    live, _ = loader_with_releases(names[0])
    specs = [f"{live.name}=={version}" for version in (low, high)]
    paths = files_below(files)
    shared.fetch(specs, install)
    seen: Counter[str] = Counter()
    for change in compare_files(paths, *map(resolve, specs)):
        seen[change.outcome] += 1
        line = f"{change.outcome:<10}  {change.path}: {change.what}"
        click.echo(json.dumps({"kind": "file change", **asdict(change)}) if as_json else on_one_line(line))
    if not as_json:
        click.echo(f"{specs[0]} → {specs[1]}: " + ", ".join(f"{number} {outcome}" for outcome, number in seen.items()))
    return 1 if seen["changes"] else 0 if seen["same"] else 2


def _exit_code(tables: Sequence[ReleaseTable], flipped: bool) -> int:
    measured = all(any(release.cells for release in table.releases) for table in tables)
    return 2 if not measured else int(flipped)


def _remember(history: Path, tables: Sequence[ReleaseTable]) -> list[str]:
    """Add the tables to the history; return what of it is another thing than the release before did."""
    from harness.report.history import append_records, flips, read_history
    from harness.report.releases import history_records

    history.parent.mkdir(parents=True, exist_ok=True)
    known = {record.run_id for record in read_history(history)} if history.exists() else set()
    new = [record for table in tables for record in history_records(table) if record.run_id not in known]
    append_records(history, new)
    ids = {record.run_id for record in new}
    return [flip.text() for flip in flips(read_history(history)) if flip.run_id in ids] if new else []


@dataclass(frozen=True)
class _How:
    """How the releases of a loader are chosen, fetched and measured."""

    low: str | None
    high: str | None
    every: bool
    newest: bool
    install: bool
    bisect: bool
    limits: Limits
    silent: bool
    kept: KeptReleases

    def table(self, live: LiveLoader, package: str, formats: Sequence[str], benches: Sequence[str]) -> ReleaseTable:
        """Return the table of one loader.

        Raises:
            UserError: there is no release, no such format or bench, or the index cannot be reached.
        """
        from harness.checks.releases import bisected, places_of
        from harness.loaders.between import releases_between
        from harness.report.releases import ReleaseTable

        days = dict(releases_between(live, self.low, self.high, every=self.every, ask_index=self.install))
        versions = list(days)[-1:] if self.newest else list(days)
        places = places_of(live, formats, benches)
        if self.bisect:
            found = bisected(versions, lambda version: self._measured(live, [version], places)[0])
        else:
            found = self._measured(live, versions, places)
        dated = tuple(replace(release, day=days[release.version]) for release in found)
        return ReleaseTable(live.name, package, dated, among=len(versions))

    def _measured(self, live: LiveLoader, versions: Sequence[str], places: Sequence[Place]) -> list[ReleaseLaw]:
        """Return what each release does; one that cannot be had says so in its row."""
        from harness.checks.releases import ReleaseLaw, measure_releases

        by_version = self.kept.measured(live.name, versions, places)
        for release in by_version.values():
            self._tell(release, "measured before")
        left = [version for version in versions if version not in by_version]
        self._say_size(live, left)
        had = {version: self._had(live, version) for version in left}
        subjects = {version: subject for version, subject in had.items() if not isinstance(subject, str)}

        def keep(release: ReleaseLaw) -> None:
            self.kept.add(live.name, release)
            self._tell(release, f"{release.seconds:g} s")

        measured = measure_releases(subjects, places, limits=self.limits, on_release=keep)
        by_version |= {release.version: release for release in measured}
        by_version |= {v: ReleaseLaw(live.name, v, problem=why) for v, why in had.items() if isinstance(why, str)}
        return [by_version[version] for version in versions]

    def _say_size(self, live: LiveLoader, versions: Sequence[str]) -> None:
        """Say in one line how much is going to be fetched."""
        from harness.loaders.pinned import size_of_named

        if self.install and (size := size_of_named([f"{live.name}=={version}" for version in versions])):
            click.echo(f"install: {size}", err=True)

    def _had(self, live: LiveLoader, version: str) -> Subject | str:
        """Return a release as a subject, or why it cannot be had."""
        from harness.errors import UserError
        from harness.loaders.pinned import install_named
        from harness.loaders.registry import resolve

        spec = f"{live.name}=={version}"
        try:
            if self.install:
                install_named([spec], lambda line: None)
            return resolve(spec)
        except UserError as error:
            return str(error)

    def _tell(self, release: ReleaseLaw, when: str) -> None:
        if not self.silent:
            states = ", ".join(dict.fromkeys(release.states.values())) or release.problem
            click.echo(on_one_line(f"{release.loader}: {states} ({when})", 160), err=True)
