"""`lora-harness verify`: the scale that was really baked into a merged checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.commands import options as shared
from harness.commands.inspect import finite

if TYPE_CHECKING:
    from harness.doctor.verify.verify import MergeReport

_PATH = click.Path(path_type=Path)
_SHOWN = 20
_WIDTH = 180  # of what is piped into a file


@click.command(
    epilog="\b\nExamples:\n"
    "  lora-harness verify --base model.safetensors --merged merged.safetensors --lora my_lora.safetensors\n"
    "  lora-harness verify --base base_folder --merged merged_folder --lora my_peft_folder --strength 0.8 --full"
)
@click.option("--base", required=True, type=_PATH, help="Checkpoint before the merge: file, folder or shard index.")
@click.option("--merged", required=True, type=_PATH, help="Checkpoint after the merge.")
@click.option("--lora", required=True, type=_PATH, help="LoRA file or PEFT folder.")
@click.option(
    "--strength",
    type=float,
    callback=finite,
    default=1.0,
    show_default=True,
    help="Strength that the merge was asked for.",
)
@click.option(
    "--lora-alpha", type=float, callback=finite, help="The alpha of the training, for a file that carries none."
)
@click.option("--full", is_flag=True, help="Read every row instead of a sample from each block of rows.")
@click.option("--device", default="cpu", show_default=True, help="Device of the products of --full, such as cuda.")
@shared.json_option
def command(
    base: Path,
    merged: Path,
    lora: Path,
    strength: float,
    lora_alpha: float | None,
    full: bool,
    device: str,
    as_json: bool,
) -> None:
    """Measure the scale baked into MERGED, per module and overall, through the rounding of its dtype.

    Exit 1 when it is not strength * alpha / rank, or when anything else than this LoRA was merged. DoRA, LoHa, LoKr,
    Tucker cores, whole differences and biases are measured too; what is not read is listed.
    """
    from harness.doctor.verify.verify import VerifyOptions, verify_merge

    with _progress(quiet=shared.quiet_on(as_json)) as on_module:
        report = verify_merge(base, merged, lora, VerifyOptions(strength, full, lora_alpha, device, on_module))
    _write_json(report) if as_json else _print(report)
    sys.exit(report.exit_code)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    from rich.console import Console
    from rich.progress import Progress

    from harness.text import printable

    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
        task = progress.add_task("verifying", total=None)
        yield lambda name: progress.update(task, advance=1, description=printable(name, 60))


def _write_json(report: MergeReport) -> None:
    from harness.report.environment import new_header
    from harness.report.records import RunWriter

    with RunWriter(None, new_header(), echo=sys.stdout) as writer:
        writer.write(*report.verdicts)
        writer.exit_code = report.exit_code


def _print(report: MergeReport) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from harness.text import printable

    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
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
