"""`lora-harness run`: every installed loader through every check, the founding table, images, the report."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.commands import options as shared
from harness.commands.since import Place, carry_over, earlier_run, fingerprints, note

if TYPE_CHECKING:
    from harness.checks.cell import Cell
    from harness.checks.known import KnownFailure
    from harness.checks.plan import Plan
    from harness.errors import UserError
    from harness.images import SweepResult
    from harness.isolation.limits import Limits
    from harness.report.records import RunWriter
    from harness.verdict.verdict import Verdict

# The report this project began with: rank = alpha = 32 on merged QKV, and its sister file with alpha = 16.
FOUNDING = ((32, 32.0, (1.0, 4.0, 32.0)), (32, 16.0, (0.5, 1.0)))


@click.command(epilog="\b\nExample:\n  lora-harness run --out reports/out")
@click.option("--out", type=shared.FOLDER, default=Path("reports/out"), show_default=True)
@click.option("--loader", "only", multiple=True, help="Only this loader; repeat for more.  [default: all installed]")
@click.option("--quick", is_flag=True, help="Fewer examples and the one-forward image probe instead of pictures.")
@click.option(
    "--max-examples",
    type=click.IntRange(1),
    help="Random examples per format and bench.  [default: 200, quick 30; cmd: 10]",
)
@shared.seed_option
@click.option(
    "--known-failures", metavar="FILE", default="shipped", show_default=True, help="TOML file of known failures."
)
@click.option("--baseline", type=shared.FILE, help="Earlier run.jsonl; fail on what got worse.")
@click.option(
    "--since",
    type=shared.FILE,
    metavar="RUN.jsonl",
    help="Carry over the verdicts of an earlier run where loader, versions, bench and harness are the same; not with "
    "--baseline, since a gate needs all measured.",
)
@click.option("--rule", "rules", multiple=True, help="Gate rule for --baseline, FIELD:DIRECTION:THRESHOLD.")
@click.option(
    "--all-benches",
    is_flag=True,
    help="Every architecture of `lora-harness benches` too that a loader takes: one format each, plain LoRA.",
)
@click.option("--images/--no-images", default=True, help="Sweep pictures with the tiny pipeline.  [default: images]")
@click.option("--device", default="cpu", show_default=True, help="Device of the image sweep.")
@shared.limit_option
@shared.workers_option
@shared.install_option
@shared.json_option
def command(out: Path, only: tuple[str, ...], quick: bool, seed: int, as_json: bool, **options: Any) -> None:
    """Check every installed loader, print what was found and write OUT/run.jsonl and OUT/index.html."""
    from harness.checks.known import known_failures
    from harness.loaders.registry import available
    from harness.report.environment import new_header
    from harness.report.records import RunWriter

    if options["since"] and options["baseline"]:
        raise click.UsageError("--since carries verdicts over, and a gate needs all measured: leave out --baseline")
    shared.fetch(only, options.pop("install"))
    loaders = list(only) or available()
    planned = [f"checks:{name}" for name in loaders]
    drawn = _drawn(loaders) if options["images"] else []
    planned += [f"sweep:{name}" for name in drawn]
    header = new_header(seed=seed, planned=planned, profile="quick" if quick else "full")
    options["known"] = known_failures(options["known_failures"])
    baseline = shared.Baseline.read(options["baseline"], options["rules"], out)
    options["since"] = earlier_run(options["since"])
    with RunWriter(out / "run.jsonl", header, echo=sys.stdout if as_json else None) as writer:
        writer.gate = baseline.lines if baseline else None
        _check(writer, loaders, quick, seed, as_json, options)
        if options["images"]:
            writer.write(*(_not_drawn(name) for name in loaders if name not in drawn))
            _sweep(writer, drawn, out, quick, as_json, options)
    sys.exit(shared.finish(out, baseline=baseline, as_json=as_json))


def _drawn(loaders: Sequence[str]) -> list[str]:
    """Return the loaders that take one of the committed LoRAs of the tiny pipeline."""
    from harness.images.fixture import has_lora_for
    from harness.loaders.registry import resolve

    return [name for name in loaders if has_lora_for(resolve(name).cells)]


def _not_drawn(loader: str) -> Verdict:
    from harness.verdict.verdict import Verdict

    reason = "the tiny pipeline is a Qwen-Image one, and this loader takes none of its LoRAs"
    return Verdict(loader=loader, check="images", outcome="skipped", title="no picture", reason=reason)


def _check(
    writer: RunWriter, loaders: Sequence[str], quick: bool, seed: int, as_json: bool, options: dict[str, Any]
) -> None:
    from harness.checks.plan import Plan
    from harness.isolation.limits import Limits

    plan = Plan(options["max_examples"], seed, known=options["known"], share=1 / 20, quick=quick)
    limits = Limits(options["time_limit"], workers=shared.worker_count(options["workers"]))
    cells = _cells(writer, loaders, all_benches=options["all_benches"])
    prints = fingerprints(cells, plan, limits)
    anew = carry_over(writer, options["since"], cells, prints, quiet=as_json)
    _measure(writer, anew, plan, limits, prints, beside=cells, as_json=as_json)
    shared.ask_reference(writer, cells, limits.workers)
    writer.write(*_founding(cells))


def _cells(writer: RunWriter, loaders: Sequence[str], *, all_benches: bool) -> list[Cell]:
    """Return the cells of all loaders, and write why others are none."""
    from harness.checks.cell import cells_beside, cells_of
    from harness.loaders.registry import resolve

    cells: list[Cell] = []
    for name in loaders:
        found, skipped = cells_of(resolve(name))
        cells += [*found, *(cells_beside(resolve(name)) if all_benches else ())]
        writer.write(*skipped)
    return cells


def _measure(
    writer: RunWriter,
    cells: Sequence[Cell],
    plan: Plan,
    limits: Limits,
    prints: Mapping[Place, str | None],
    *,
    beside: Sequence[Cell],
    as_json: bool,
) -> None:
    from harness.checks.run import check_cells

    quiet = shared.quiet_on(as_json)
    with shared.cell_progress(cells, plan, limits.workers, quiet=quiet, silent=as_json) as pace:

        def done(cell: Cell) -> None:
            note(writer, cell, prints)
            pace.cell(cell)

        check_cells(
            cells,
            plan,
            limits,
            on_verdict=writer.write,
            on_cell=done,
            on_examples=pace.examples,
            on_measured=shared.probe_writer(writer),
            beside=beside,
        )


def _founding(cells: Sequence[Cell]) -> Iterator[Verdict]:
    """Yield the founding table for every loader that takes alpha from the file on the merged bench."""
    from harness.checks.strength_table import strength_table, table_verdicts

    for cell in cells:
        if cell.subject.spec.startswith("diffsynth") and cell.bench_name == "qwen-image-fused":
            for rank, alpha, strengths in FOUNDING:
                rows = strength_table(cell, rank=rank, alpha=alpha, strengths=strengths)
                yield from table_verdicts(cell, rank, alpha, rows)


def _sweep(
    writer: RunWriter, loaders: Sequence[str], out: Path, quick: bool, as_json: bool, options: dict[str, Any]
) -> None:
    from harness.images import SweepOptions
    from harness.images.sweep import run_sweeps
    from harness.loaders.registry import resolve

    wanted = SweepOptions(
        out=out,
        quick=quick,
        sequential=True,
        device=options["device"],
        progress=not shared.quiet_on(as_json),
        workers=shared.worker_count(options["workers"]),
    )
    run_sweeps([resolve(name) for name in loaders], wanted, _Written(writer, loaders, options["known"]))


@dataclass(frozen=True)
class _Written:
    """Writes what is heard of the sweeps of loaders."""

    writer: RunWriter
    loaders: Sequence[str]
    known: Sequence[KnownFailure]

    def record(self, index: int, record: dict[str, Any]) -> None:
        """Write a row."""
        from harness.report.models import SweepRecord

        self.writer.write(SweepRecord.model_validate(record))

    def ended(self, index: int, result: SweepResult | UserError) -> None:
        """Write the verdicts of a loader, or why it could not be drawn with: the others still are."""
        from harness.checks.known import lines_of_images
        from harness.commands.sweep import verdicts_of
        from harness.errors import UserError
        from harness.loaders.registry import resolve
        from harness.report.models import PartRecord

        if isinstance(result, UserError):
            self.writer.write(PartRecord(name=f"sweep:{self.loaders[index]}", measured=False, reason=str(result)))
        else:
            known = lines_of_images(resolve(self.loaders[index]), self.known)
            self.writer.write(*verdicts_of(result, known))
