"""`lora-harness check`: conformance checks and the scaling law of one or more loaders."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from harness.commands import options as shared

if TYPE_CHECKING:
    from harness.checks.plan import Pins
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
    loaders: tuple[str, ...],
    formats: tuple[str, ...],
    benches: Sequence[str],
    variants: tuple[str, ...],
    names: tuple[str, ...],
    max_examples: int | None,
    seed: int,
    known_failures: str | None,
    pins: Pins | None,
    time_limit: float | None,
    workers: int | None,
    first: bool,
    statistics: bool,
    install: bool,
    as_json: bool,
) -> None:
    """Check that each LOADER adds strength * alpha / rank * B @ A, and name the law it has instead.

    LOADER is a registered name (see `lora-harness loaders`), one in another release (peft==0.12.0),
    package.module:callable, path/to/file.py:callable, or
    "cmd:tool --base {base} --lora {lora} --strength {strength} --out {out}", or "serve:COMMAND" (docs/serve.md).
    """
    from harness.checks.cell import cells_of
    from harness.checks.known import known_failures as read_known
    from harness.checks.plan import Plan
    from harness.checks.run import check_cells
    from harness.commands.early import FirstAnswers, reached
    from harness.isolation.limits import Limits
    from harness.loaders.registry import resolve
    from harness.report.environment import new_header
    from harness.report.records import RunWriter, counts_of, exit_code_of
    from harness.report.terminal import print_verdicts

    places = [names or None for names in (formats, benches, variants)]
    limits = Limits(time_limit, workers=shared.worker_count(workers))
    plan = Plan(max_examples, seed, pins, read_known(known_failures))
    shared.fetch(loaders, install)
    subjects = [resolve(spec, name=name) for spec, name in shared.named(loaders, names)]
    work = [cells_of(subject, *places) for subject in subjects]
    header = new_header(seed=seed, planned=[f"checks:{subject.title}" for subject in subjects])
    verdicts: list[Verdict] = []
    labels: Counter[str] = Counter()
    sure = FirstAnswers(stops=first)
    cells = [cell for found, _ in work for cell in found]
    shared.say_what_is_measured(cells, as_json=as_json)
    with (
        RunWriter(None, header, echo=sys.stdout if as_json else None) as writer,
        shared.cell_progress(cells, plan, limits.workers, quiet=shared.quiet_on(as_json), silent=as_json) as pace,
    ):
        for found, skipped in work:
            writer.write(*skipped)
            verdicts += skipped + check_cells(
                found,
                plan,
                limits,
                on_verdict=writer.write,
                on_cell=pace.cell,
                on_examples=pace.examples,
                on_measured=lambda _, measured: labels.update(measured.labels),
                on_sure=None if as_json else sure.tell,
                first=first,
            )
        verdicts += shared.ask_reference(writer, reached(cells, verdicts), limits.workers)
    if not as_json:
        print_verdicts(verdicts, reference=writer.reference)
        for line in sure.taken_back(verdicts):
            click.echo(line)
    if statistics:
        for label, number in sorted(labels.items()):
            click.echo(f"{number:>7}  {label}", err=as_json)
    codes = {exit_code_of(counts_of(v for v in verdicts if v.loader == subject.title)) for subject in subjects}
    sys.exit(exit_code_of(counts_of(verdicts)) or max(codes))  # 2: one of them was not measured
