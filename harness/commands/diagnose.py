"""`lora-harness diagnose`: one answer for one file and one tool."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.commands import options as shared
from harness.commands.screen import grid, stdout_console
from harness.text import printable

if TYPE_CHECKING:
    from harness.doctor.diagnose import FileDiagnosis

_SAW = ("noise", "nothing", "weak", "strong")


@click.command(
    epilog="\b\nExamples:\n"
    "  lora-harness diagnose my_lora.safetensors\n"
    "  lora-harness diagnose my_lora.safetensors --tool comfyui\n"
    "  lora-harness diagnose my_lora.safetensors --tool diffusers --saw noise"
)
@click.argument("file", type=shared.PATH, metavar="FILE")
@click.option(
    "--tool", metavar="TOOL", help="The tool you load it with: comfyui, forge, diffusers, ...  [default: all]"
)
@click.option("--tool-version", metavar="V", help="Its release.  [default: the one that is known]")
@shared.lora_alpha_option
@click.option("--base", type=shared.PATH, metavar="CKPT", help="The model: says how many modules of FILE apply to it.")
@click.option("--saw", type=click.Choice(_SAW), help="What the picture shows: ranks the causes, each with its test.")
@shared.json_option
def command(
    file: Path,
    tool: str | None,
    tool_version: str | None,
    lora_alpha: float | None,
    base: Path | None,
    saw: str | None,
    as_json: bool,
) -> None:
    """Say in six lines what FILE is, what TOOL does with it, and the number to put into TOOL's own field."""
    from harness.doctor.answer import Question
    from harness.doctor.diagnose import diagnose
    from harness.doctor.told import as_data

    if tool_version is not None and tool is None:
        raise click.UsageError("--tool-version needs --tool")
    asked = Question(tool_version, lora_alpha)
    found = diagnose(file, tool=tool, asked=asked, saw=saw, base=base)  # type: ignore[arg-type]  # click.Choice checks it
    if not as_json and _can_ask():
        found = _completed(found)
    if as_json:
        click.echo(json.dumps(as_data(found)))
    else:
        _print(found)
    sys.exit(found.exit_code)


def _can_ask() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and not os.environ.get("CI")


def _completed(found: FileDiagnosis) -> FileDiagnosis:
    """Ask for what would change the answer and was not given."""
    from dataclasses import replace

    from harness.doctor.diagnose import tool_named

    if found.tool is None:
        named = click.prompt("Which tool do you load it with? (Enter: all)", default="", show_default=False, err=True)
        found = replace(found, tool=tool_named(named) if named.strip() else None)
    if "none" in found.traits.alphas and found.rule is None and found.asked.lora_alpha is None:
        said = click.prompt("lora_alpha of the training? (Enter: unknown)", default="", show_default=False, err=True)
        alpha = shared.finite(click.get_current_context(), click.Option(["--lora-alpha"]), _number(said))
        found = replace(found, asked=replace(found.asked, lora_alpha=alpha))
    return found


def _number(text: str) -> float | None:
    if not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        raise click.UsageError(f"{printable(text, 40)!r} is no number") from None


def _print(found: FileDiagnosis) -> None:
    from rich.text import Text

    from harness.doctor.told import lines

    console = stdout_console()
    console.print(Text(printable(found.path, 500), style="bold"))
    console.print(grid((f"  {label}", printable(said, 1000)) for label, said in lines(found)))
