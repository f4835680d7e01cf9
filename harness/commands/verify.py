"""`lora-harness verify`: the scale that was really baked into a merged checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.commands import options as shared
from harness.commands.screen import print_json, progress, stdout_console
from harness.text import printable

if TYPE_CHECKING:
    from harness.doctor.verify.verify import MergeReport

_SHOWN = 20


@click.command(
    epilog="\b\nExamples:\n"
    "  lora-harness verify --base model.safetensors --merged merged.safetensors --lora my_lora.safetensors\n"
    "  lora-harness verify --base base_folder --merged merged_folder --lora my_peft_folder --strength 0.8 --full"
)
@click.option(
    "--base",
    required=True,
    multiple=True,
    type=shared.PATH,
    help="Checkpoint before the merge: file, folder, index or a pipeline with all its components. Of several the one "
    "that fits best is taken.",
)
@click.option("--merged", required=True, type=shared.PATH, help="Checkpoint after the merge.")
@click.option(
    "--lora",
    required=True,
    multiple=True,
    type=shared.PATH,
    help="LoRA file or PEFT folder; again for each that was merged.",
)
@click.option(
    "--strength",
    type=float,
    callback=lambda ctx, param, values: tuple(shared.finite(ctx, param, value) for value in values),
    multiple=True,
    default=(1.0,),
    show_default="1",
    help="Strength that the merge was asked for; with several LoRAs one for all, or one for each.",
)
@shared.lora_alpha_option
@click.option("--full", is_flag=True, help="Judge every row instead of a sample from each block of rows.")
@click.option(
    "--allow-unjudged",
    type=click.Choice(["alpha", "ambiguous", "unsupported", "quantised", "component", "hidden"]),
    multiple=True,
    metavar="KIND",
    help="Let pass what is not judged for this reason: alpha, ambiguous, unsupported, quantised, component, hidden.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Device of the products of --full, such as cuda: of files seldom quicker.",
)
@shared.json_option
def command(base: tuple[Path, ...], merged: Path, lora: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Measure the scale baked into MERGED, per module and overall, through the rounding of its dtype.

    Exit 0 when every trained weight of the file is right and nothing else changed, in the rows that were read (a sample
    of large layers, all with --full); 1 when anything is wrong, 3 when nothing is wrong but something could not be
    judged. DoRA, LoHa, LoKr, experts, whole differences, saved heads, token rows and biases are judged too, and other
    methods of PEFT by PEFT's own merge of each layer.
    """
    from harness.doctor.verify.verify import verify_merge

    with progress("verifying", quiet=shared.quiet_on(as_json)) as line:
        options["on_module"] = lambda name: line.advance(printable(name, 60))
        report = verify_merge(base, merged, lora, **options)
    print_json(report.verdicts, report.exit_code) if as_json else _print(report)
    sys.exit(report.exit_code)


def _print(report: MergeReport) -> None:
    from rich.table import Table
    from rich.text import Text

    console = stdout_console()
    console.print(Text(printable(report.overall.text().partition("\n")[0], 1000), style="bold"))
    for label, value in report.overall.rows:
        console.print(Text(f"  {label:<9}  {printable(value, 1000)}"))
    table = Table(box=None, padding=(0, 2))
    for column in ("module", "scale", "expected", "interval", "survived", "what"):
        table.add_column(column, overflow="fold")
    worst = sorted(report.modules, key=lambda verdict: verdict.ok)
    for verdict in worst[:_SHOWN]:
        cells = (_number(verdict.measured_scale), _number(verdict.expected_scale), _span(verdict.interval))
        what = " ".join(part for part in (verdict.code, verdict.title) if part)
        left = "-" if verdict.survived is None else f"{verdict.survived:.1%}"
        table.add_row(*(Text(printable(cell, 200)) for cell in (verdict.worst_module, *cells, left, what)))
    console.print(table)
    if len(worst) > _SHOWN:
        console.print(Text(f"  and {len(worst) - _SHOWN} more modules (all of them with --json)"))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _span(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"
