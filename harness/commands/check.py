"""`lora-harness check`: conformance checks and the scaling law of one or more loaders."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from harness.commands import options as shared

if TYPE_CHECKING:
    from harness.checks.cell import Cell
    from harness.checks.plan import Plan
    from harness.isolation.limits import Limits
    from harness.loaders.protocol import Subject
    from harness.report.records import RunWriter
    from harness.verdict.verdict import Verdict


@click.command(
    epilog="\b\nExamples:\n"
    "  lora-harness check peft\n"
    "  lora-harness check examples/raw_alpha.py:load --format kohya\n"
    "  lora-harness check mypackage.lora:load --rank 4 --alpha 8\n"
    "  lora-harness check lycoris --variant loha --bench sd-unet\n"
    "  lora-harness check my_loader.py:load --model my_model.py:make"
)
@click.argument("loaders", nargs=-1, required=True, metavar="LOADER...")
@click.option("--format", "formats", multiple=True, help="Only this file format; repeat for more.")
@shared.bench_options
@click.option("--variant", "variants", multiple=True, help="Only this variant of LoRA; repeat for more.")
@shared.name_option
@shared.examples_option
@shared.seed_option
@click.option("--known-failures", metavar="FILE", help="TOML file of known failures, or `shipped`.")
@shared.pin_options
@shared.limit_option
@shared.workers_option
@click.option("-x", "first", is_flag=True, help="Stop a loader at the first sure answer that it is wrong.")
@click.option("--statistics", is_flag=True, help="Print what the examples were: how many of each dtype, pattern, ...")
@shared.install_option
@shared.json_option
def command(
    loaders: tuple[str, ...], seed: int, first: bool, statistics: bool, install: bool, as_json: bool, **options: Any
) -> None:
    """Check that each LOADER adds strength * alpha / rank * B @ A, and name the law it has instead.

    LOADER is a registered name (see `lora-harness loaders`), one in another release (peft==0.12.0),
    package.module:callable, path/to/file.py:callable, or
    "cmd:tool --base {base} --lora {lora} --strength {strength} --out {out}", or "serve:COMMAND" (docs/serve.md).
    """
    from harness.checks.cell import cells_of
    from harness.checks.known import known_failures
    from harness.checks.plan import Plan
    from harness.isolation.limits import Limits
    from harness.loaders.registry import resolve
    from harness.report.environment import new_header
    from harness.report.records import RunWriter

    places = [options[name] or None for name in ("formats", "benches", "variants")]
    limits = Limits(options["time_limit"], workers=shared.worker_count(options["workers"]))
    plan = Plan(options["max_examples"], seed, options["pins"], known_failures(options["known_failures"]))
    shared.fetch(loaders, install)
    subjects = [resolve(spec, name=name) for spec, name in shared.named(loaders, options["names"])]
    work = [cells_of(subject, *places) for subject in subjects]
    shared.say_what_is_measured([cell for found, _ in work for cell in found], as_json=as_json)
    header = new_header(seed=seed, planned=[f"checks:{subject.title}" for subject in subjects])
    told = _Told(first, statistics, as_json)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end it with what was measured, as Ctrl-C does
    with RunWriter(None, header, echo=sys.stdout if as_json else None) as writer:
        try:
            verdicts = _checked(work, plan, limits, writer, told)
        except KeyboardInterrupt:
            told.print(told.seen, "")
            raise
    told.print(verdicts, writer.reference)
    sys.exit(_exit_code(subjects, verdicts))


class _Told:
    """What is said of a check beside its records: the first sure answers, the verdicts, what the examples were."""

    def __init__(self, first: bool, statistics: bool, as_json: bool) -> None:
        from harness.commands.early import FirstAnswers

        self.first, self.as_json, self._statistics = first, as_json, statistics
        self.labels: Counter[str] = Counter()
        self.seen: list[Verdict] = []
        self.sure = FirstAnswers(stops=first)

    def print(self, verdicts: Sequence[Verdict], reference: str) -> None:
        from harness.report.terminal import print_verdicts

        if not self.as_json:
            print_verdicts(verdicts, reference=reference)
            for line in self.sure.taken_back(verdicts):
                click.echo(line)
        if self._statistics:
            for label, number in sorted(self.labels.items()):
                click.echo(f"{number:>7}  {label}", err=self.as_json)


def _checked(
    work: Sequence[tuple[list[Cell], list[Verdict]]], plan: Plan, limits: Limits, writer: RunWriter, told: _Told
) -> list[Verdict]:
    """Check the cells of each loader, and ask the reference about those that were reached."""
    from harness.checks.run import check_cells
    from harness.commands.early import reached

    verdicts: list[Verdict] = []
    cells = [cell for found, _ in work for cell in found]
    quiet = shared.quiet_on(told.as_json)

    def keep(verdict: Verdict) -> None:
        writer.write(verdict)
        told.seen.append(verdict)

    with shared.cell_progress(cells, plan, limits.workers, quiet=quiet, silent=told.as_json) as pace:
        for found, skipped in work:
            writer.write(*skipped)
            verdicts += skipped + check_cells(
                found,
                plan,
                limits,
                on_verdict=keep,
                on_cell=pace.cell,
                on_examples=pace.examples,
                on_measured=lambda _, measured: told.labels.update(measured.labels),
                on_sure=None if told.as_json else told.sure.tell,
                first=told.first,
            )
        return verdicts + shared.ask_reference(writer, reached(cells, verdicts), limits.workers)


def _exit_code(subjects: Sequence[Subject], verdicts: Sequence[Verdict]) -> int:
    """Return the code of all verdicts, 2 where one of the loaders was not measured."""
    from harness.report.records import counts_of, exit_code_of

    codes = {exit_code_of(counts_of(v for v in verdicts if v.loader == subject.title)) for subject in subjects}
    return exit_code_of(counts_of(verdicts)) or max(codes)
