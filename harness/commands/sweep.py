"""`lora-harness sweep`: pictures across strengths, judged from the pictures alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.commands import options as shared

if TYPE_CHECKING:
    from harness.checks.known import KnownFailure
    from harness.images import SweepOptions, SweepResult
    from harness.report.records import RunWriter
    from harness.verdict.verdict import Verdict


class _Numbers(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    name = "NUMBERS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a tuple of numbers from text separated by commas."""
        try:
            return value if isinstance(value, tuple) else tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r}: write numbers separated by commas, for example 0,0.5,1,2,4", param, ctx)


@click.command(
    epilog="\b\nExamples:\n"
    "  lora-harness sweep peft\n"
    "  lora-harness sweep examples/raw_alpha.py:load --alphas 0,1,4,32\n"
    "  lora-harness sweep diffusers --pipeline ./my-sd15 --lora my_lora.safetensors --prompt 'a red fox' --device cuda"
)
@click.argument("loader")
@click.option("--name", help="What reports call the loader.")
@click.option(
    "--alphas", type=_Numbers(), default="0,0.25,0.5,1,2,4,8,16,32", show_default=True, help="Strengths to draw."
)
@click.option(
    "--pipeline",
    metavar="DIR",
    help="A saved diffusers pipeline.  [default: a toy model for tests, which no LoRA of yours was trained on]",
)
@click.option("--lora", type=shared.PATH, help="The LoRA file or PEFT folder.  [default: rank 8, alpha 16]")
@click.option("--prompt", "prompts", multiple=True, help="A prompt; repeat for more.")
@click.option("--prompts", "prompts_file", type=shared.PATH, help="A text file, one prompt per line.")
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True, help="How many seeds per prompt.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="The first seed; the others follow.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--dtype", type=shared.DTYPE, help="Dtype of the pipeline.")
@click.option("--offload", type=click.Choice(["none", "model", "sequential"]), default="none", show_default=True)
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: the pipeline's own]")
@click.option("--size", type=click.IntRange(8), help="Width and height in pixels.  [default: the pipeline's own]")
@click.option("--batch", type=click.IntRange(1), help="Pictures per batch.")
@click.option("--quick", is_flag=True, help="One denoiser call per prompt and seed instead of pictures.")
@click.option(
    "--every-strength",
    is_flag=True,
    help="All pictures at every strength.  [default: as many as make the answer sure, one denoiser call elsewhere]",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0.0, min_open=True),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="Limit for one load of the LoRA.",
)
@click.option(
    "-j",
    "--workers",
    type=click.IntRange(0, 1),
    default=1,
    show_default=True,
    help="0: load and draw in this process, on all its threads.",
)
@click.option("--allow-download", is_flag=True, help="Let --pipeline be a hub id.")
@click.option("--out", type=shared.FOLDER, default=Path("reports/out/sweep"), show_default=True)
@shared.install_option
@shared.json_option
def command(
    loader: str,
    name: str | None,
    out: Path,
    as_json: bool,
    prompts: tuple[str, ...],
    prompts_file: Path | None,
    seeds: int,
    seed: int,
    dtype: str | None,
    install: bool,
    every_strength: bool,
    **options: Any,
) -> None:
    """Draw LOADER at each strength beside PEFT's reference: does strength 1 give the picture that was trained?"""
    if options["lora"] is not None and options["pipeline"] is None:
        _refuse_lora_of_another_model(options["lora"])
    import torch

    from harness.images import SweepOptions, read_prompts
    from harness.report.environment import new_header
    from harness.report.records import RunWriter, counts_of, exit_code_of

    shared.fetch([loader], install)
    texts = [*prompts, *(read_prompts(prompts_file) if prompts_file else ())]
    wanted = SweepOptions(
        prompts=texts or None,
        seeds=tuple(range(seed, seed + seeds)),
        dtype=getattr(torch, dtype) if dtype else None,
        out=out,
        progress=not shared.quiet_on(as_json),
        sequential=not every_strength,
        **options,
    )
    header = new_header(planned=[f"sweep:{name or loader}"])
    with RunWriter(out / "run.jsonl", header, echo=sys.stdout if as_json else None) as writer:
        verdicts = _sweep_one(writer, loader, wanted, name=name)
    shared.show(out, as_json=as_json)
    sys.exit(exit_code_of(counts_of(verdicts)))


def _refuse_lora_of_another_model(lora: Path) -> None:
    """Refuse a LoRA that was not trained on the toy model, which is drawn with where no pipeline is named.

    Only headers are read, and nothing that draws is imported.

    Raises:
        UserError: none of its modules, or modules of another shape, are in the toy model; or it cannot be read.
    """
    from harness.doctor.match import place
    from harness.errors import UserError
    from harness.files import read_header, read_lora
    from harness.fixtures import fixtures_folder
    from harness.text import count, printable

    adapter = read_lora(lora)
    weights = fixtures_folder() / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
    layers = {name.removesuffix(".weight"): info.shape for name, info in read_header(weights).tensors.items()}
    placed = place(adapter, layers)
    if placed.slots and not placed.misfits:
        return
    fitting, modules = len(placed.slots), count(len(adapter.modules), "module")
    raise UserError(
        f"{printable(lora, 300)}: without --pipeline, sweep draws with a toy model (a Qwen-Image of 4 blocks that "
        f"knows shapes on a ground), and {fitting} of its {modules} fit it. Name the pipeline that the LoRA was "
        "trained for: --pipeline DIR, a folder that diffusers' save_pretrained wrote, or --pipeline OWNER/NAME "
        "--allow-download"
    )


def _sweep_one(writer: RunWriter, loader: str, options: SweepOptions, *, name: str | None = None) -> list[Verdict]:
    """Sweep one loader, write its rows as they come and its verdicts at the end, and return these."""
    from harness.images import run_sweep
    from harness.loaders.registry import resolve
    from harness.report.models import SweepRecord

    result = run_sweep(
        resolve(loader, name=name), options, on_record=lambda row: writer.write(SweepRecord.model_validate(row))
    )
    verdicts = verdicts_of(result)
    writer.write(*verdicts)
    return verdicts


def verdicts_of(result: SweepResult, known: Sequence[KnownFailure] = ()) -> list[Verdict]:
    """Return the verdicts of a sweep as they are written: with what it was drawn with, known failures excused."""
    from harness.checks.known import excuse_images

    told = [v.model_copy(update={"data": {**v.data, "environment": result.environment}}) for v in result.verdicts]
    return excuse_images(told, known)
