"""`lora-harness repair`: a new file whose scale every reader agrees on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from harness.commands import options as shared


@click.command(
    epilog="\b\nExamples:\n"
    "  lora-harness repair my_lora.safetensors --to diffsynth --out fixed.safetensors --lora-alpha 16\n"
    "  lora-harness repair kohya.safetensors --to diffusers --out fixed.safetensors --base transformer_folder"
)
@click.argument("lora", type=shared.PATH, metavar="LORA")
@click.option("--to", required=True, metavar="FORMAT", help="Format of the new file: peft, kohya, diffusers, ...")
@click.option("--out", required=True, type=shared.PATH, metavar="NEW", help="The new file (a folder for peft).")
@click.option("--scale", type=float, callback=shared.finite, help="Trained factor on B @ A.  [default: the file's]")
@shared.lora_alpha_option
@click.option("--for", "loader", metavar="LOADER", help="Measure this loader and fold the scale for it.")
@click.option("--model-names", type=shared.PATH, metavar="FILE", help="The model's layers, a line each.")
@click.option(
    "--base",
    type=shared.PATH,
    metavar="CKPT",
    help="The same, read from a checkpoint with their shapes: names get their dots back, fused layers are split.",
)
@click.option("--dtype", type=shared.DTYPE, help="Dtype of the new file.")
@click.option("--force", is_flag=True, help="Replace NEW when it exists.")
@shared.json_option
def command(
    lora: Path, to: str, out: Path, model_names: Path | None, base: Path | None, as_json: bool, **options: Any
) -> None:
    """Write LORA again as NEW, with an explicit alpha: keys of FORMAT, the trained effect at strength 1.0.

    Nothing that was trained is left out: what FORMAT has no place for is named, and nothing is written (exit code 2).
    """
    from harness.doctor.repair.naming import layers_from
    from harness.doctor.repair.repair import repair_file
    from harness.text import count, printable

    source = model_names or base
    names = layers_from(source) if source else None
    report = repair_file(lora, to, out, model_names=names, **options)
    if as_json:
        click.echo(report.model_dump_json())
        sys.exit(0)
    low, high = report.scales
    span = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    folded = f"{count(report.modules, 'module')}, trained scale {span} folded in"
    what = folded if report.modules else "no module has a scale to fold"
    click.echo(f"{printable(report.path, 500)}: {report.format}, {what}")
    if report.loader:
        how = "measured here" if report.measured else "from the committed table"
        click.echo(f"  law       {printable(report.loader)}: {report.law} ({how}); pass strength 1.0")
    carried = f", {count(report.carried, 'more tensor')} carried bit for bit" if report.carried else ""
    click.echo(f"  read back {'lossless' if report.rounded == 0 else f'off by {report.error:.1e} at most'}{carried}")
    for note in report.notes:
        click.echo(f"  note      {printable(note, 300)}")
