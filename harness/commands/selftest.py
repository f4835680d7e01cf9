"""`lora-harness selftest`: does the harness find and name every known fault, and does it leave right loaders alone?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.commands import options as shared

if TYPE_CHECKING:
    from harness.report.models import PowerRecord
    from harness.report.power import Family
    from harness.report.records import RunWriter
    from harness.selftest.cases import Case
    from harness.selftest.measure import Result

_HEAD = "| loaders | number | found | named right | examples until found (median) | false alarms |"
_QUICK: dict[str, Any] = {"seeds": (1,), "formats": ("kohya",), "benches": ("qwen-image-fused",)}
_EPILOG = """\b
Examples:
  lora-harness selftest --quick
  lora-harness selftest --only subtle --max-examples 200 --out reports/out/subtle
  lora-harness selftest --kind right --right-examples 10000 --out reports/out/right
  lora-harness selftest --from reports/out/subtle/run.jsonl --markdown"""


@click.command(epilog=_EPILOG)
@click.option("--quick", is_flag=True, help="Few examples, one format and one bench: some minutes.")
@click.option("--only", metavar="TEXT", help="Only loaders whose name contains TEXT.")
@click.option("--except", "left_out", metavar="TEXT", help="Leave out loaders whose name contains TEXT.")
@click.option("--kind", type=click.Choice(["wrong", "right"]), help="Only loaders that are wrong, or only right ones.")
@click.option("--max-examples", type=click.IntRange(1), help="Random examples per format and bench.  [default: 200]")
@click.option(
    "--right-examples",
    type=click.IntRange(1),
    help="Random examples per right loader instead, shared by its formats and benches.",
)
@click.option("--out", type=shared.FOLDER, help="Write OUT/run.jsonl and the report OUT/index.html.")
@click.option("--markdown", is_flag=True, help="Print a table per family of faults instead of a line per loader.")
@click.option(
    "--from",
    "runs",
    multiple=True,
    type=shared.FILE,
    metavar="RUN.jsonl",
    help="With --markdown: the table of earlier runs, and nothing is measured; repeat for more.",
)
@shared.seed_option
@shared.limit_option
@shared.workers_option
@shared.json_option
def command(out: Path | None, markdown: bool, runs: tuple[Path, ...], seed: int, as_json: bool, **options: Any) -> None:
    """Check the checks: loaders that are wrong in one known way must be found and named, right ones never blamed.

    One line per loader: found, named right, median number of random examples until the first failure; false alarms.
    """
    from harness.report.environment import new_header
    from harness.report.records import RunWriter
    from harness.report.summary import power_sentence

    if runs:
        click.echo(power_markdown(_recorded(runs)), nl=False)
        return
    cases, quiet = _cases(options["only"], options["left_out"], options["kind"]), as_json or markdown
    header, echo = new_header(seed=seed, planned=["power"]), sys.stdout if as_json else None
    with RunWriter(out / "run.jsonl" if out else None, header, echo=echo) as writer:
        results = _measured(cases, writer, seed, quiet, options)
        writer.exit_code = 0 if all(result.right for result in results) else 1
    if out:
        shared.show(out, as_json=True)
    records = [result.record() for result in results]
    if markdown and not as_json:
        click.echo(power_markdown(records), nl=False)
    if not quiet:
        click.echo(f"\n{power_sentence(records)}")
    sys.exit(writer.exit_code)


def _measured(
    cases: Sequence[Case], writer: RunWriter, seed: int, quiet: bool, options: dict[str, Any]
) -> list[Result]:
    from harness.isolation.limits import Limits
    from harness.selftest.measure import measure

    def show(result: Result) -> None:
        writer.write(result.record())
        if not quiet:
            click.echo(_line(result))

    return measure(
        cases,
        max_examples=options["max_examples"],
        quick=options["quick"],
        right_examples=options["right_examples"],
        base_seed=seed,
        limits=Limits(options["time_limit"], workers=shared.worker_count(options["workers"])),
        on_result=show,
        **(_QUICK if options["quick"] else {}),
    )


def _cases(only: str | None, left_out: str | None, kind: str | None) -> list[Case]:
    from harness.selftest.cases import broken_cases, correct_cases

    every = (*(broken_cases() if kind != "right" else ()), *(correct_cases() if kind != "wrong" else ()))
    cases = [case for case in every if (only or "") in case.name and not (left_out and left_out in case.name)]
    if not cases:
        raise click.UsageError(f"--only {only!r}: no fixture loader that is not left out has that in its name")
    return cases


def _recorded(runs: Sequence[Path]) -> list[PowerRecord]:
    from harness.report.models import PowerRecord
    from harness.report.records import read_run

    return [record for path in runs for record in read_run(path).of(PowerRecord)]


def _line(result: Result) -> str:
    codes = ", ".join(dict.fromkeys(verdict.code or "?" for verdict in result.violations))
    name, fault = f"{result.case.name:<40}", result.case.fault
    if fault is None:
        blamed = "".join(f"\n\n{verdict.text()}" for verdict in result.violations)
        return f"{name} {f'FALSE ALARM {codes}{blamed}' if codes else f'right, {result.examples} examples'}"
    verdict = "named" if result.named else "NAMED WRONG" if result.found else "MISSED"
    when = f", after {result.median:g} examples" if result.median else ""
    return f"{name} {verdict} {codes or '-'} ({fault.codes[0]}: {fault.what}){when}"


def power_markdown(records: Sequence[PowerRecord]) -> str:
    """Return one row per family of broken loaders, one for all of them, and one for the right loaders.

    The median is over the loaders that random examples show; the others are found by loading twice, unloading and the
    like. Records of the checks of pictures are left out.
    """
    from harness.report.power import Family, families, of_weights

    found = families(records)
    broken = tuple(record for family in found for record in family.records)
    right = [record for record in of_weights(records) if not record.fault]
    rows = [_broken_row(family) for family in found]
    rows += [_broken_row(Family("**all that are wrong**", broken))] if broken else []
    rows += [_right_row(right)] if right else []
    return "\n".join([_HEAD, "| --- | --- | --- | --- | --- | --- |", *rows]) + "\n"


def _broken_row(family: Family) -> str:
    needed = "–" if family.examples is None else f"{family.examples:g}"
    return f"| {family.name} | {len(family.records)} | {family.found} | {family.named} | {needed} | |"


def _right_row(records: Sequence[PowerRecord]) -> str:
    alarms, examples = sum(r.detected for r in records), sum(r.trials for r in records)
    return f"| **all that are right** | {len(records)} | | | | {alarms} in {examples} examples |"
