"""`lora-harness selftest`: does the harness find and name every known fault, and does it leave right loaders alone?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from harness.commands import options as shared

if TYPE_CHECKING:
    from harness.power.measure import Result

_QUICK_EXAMPLES = 30


@click.command(
    epilog="\b\nExamples:\n  lora-harness selftest --quick\n  lora-harness selftest --only subtle --max-examples 200"
)
@click.option("--quick", is_flag=True, help="Few examples, one format and one bench: some minutes.")
@click.option("--only", metavar="TEXT", help="Only loaders whose name contains TEXT.")
@click.option("--max-examples", type=click.IntRange(1), help="Random examples per format and bench.  [default: 200]")
@shared.seed_option
@shared.limit_option
@shared.workers_option
@shared.json_option
def command(
    quick: bool,
    only: str | None,
    max_examples: int | None,
    seed: int,
    time_limit: float,
    workers: int | None,
    as_json: bool,
) -> None:
    """Check the checks: loaders that are wrong in one known way must be found and named, right ones never blamed.

    One line per loader: found, named right, median number of random examples until the first failure; false alarms.
    """
    from harness.checks.run import Limits
    from harness.power.cases import broken_cases, correct_cases
    from harness.power.measure import measure
    from harness.report.environment import new_header
    from harness.report.records import RunWriter

    cases = [case for case in (*broken_cases(), *correct_cases()) if only is None or only in case.name]
    if not cases:
        raise click.UsageError(f"--only {only!r}: no fixture loader has that in its name")
    with RunWriter(None, new_header(seed=seed, planned=["power"]), echo=sys.stdout if as_json else None) as writer:

        def show(result: Result) -> None:
            writer.write(result.record())
            if not as_json:
                click.echo(_line(result))

        results = measure(
            cases,
            max_examples=max_examples or (_QUICK_EXAMPLES if quick else 200),
            base_seed=seed,
            seeds=(1,) if quick else (1, 2, 3, 4, 5),
            formats=("kohya",) if quick else (),
            benches=("qwen-image-fused",) if quick else (),
            limits=Limits(time_limit, workers=shared.worker_count(workers)),
            on_result=show,
        )
    if not as_json:
        click.echo(summary(results))
    sys.exit(0 if all(result.right for result in results) else 1)


def summary(results: Sequence[Result]) -> str:
    """Return the totals: found and named broken loaders, false alarms on right ones."""
    broken = [result for result in results if result.case.fault]
    correct = [result for result in results if not result.case.fault]
    found, named = sum(result.found for result in broken), sum(result.named for result in broken)
    alarms, examples = sum(len(result.violations) for result in correct), sum(result.examples for result in correct)
    return (
        f"\nbroken loaders: {found} of {len(broken)} found, {named} named right\n"
        f"right loaders:  {alarms} false alarms on {len(correct)} loaders in {examples} examples"
    )


def _line(result: Result) -> str:
    codes = ", ".join(dict.fromkeys(verdict.code or "?" for verdict in result.violations))
    name, fault = f"{result.case.name:<40}", result.case.fault
    if fault is None:
        return f"{name} {'FALSE ALARM ' + codes if codes else f'right, {result.examples} examples'}"
    verdict = "named" if result.named else "NAMED WRONG" if result.found else "MISSED"
    when = f", after {result.median:g} examples" if result.median else ""
    return f"{name} {verdict} {codes or '-'} ({fault.codes[0]}: {fault.what}){when}"
