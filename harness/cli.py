"""The command line: `lora-harness COMMAND`; exit 0 fine, 1 a violation was found, 2 nothing could be judged."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from typing import Any

import click

from harness.commands.failures import told_in_a_sentence
from harness.commands.screen import obey_no_text
from harness.garbage import SELDOM
from harness.isolation.gpus import leave_the_driver_alone

# name -> (module below harness.commands, one line of help): a command's module is imported when it is asked for
COMMANDS = {
    "run": "Check every installed loader, sweep its images, write the HTML report.",
    "check": "Check loaders: does strength * alpha / rank * B @ A reach the model? Which law instead?",
    "sweep": "Make images across strengths and judge them: as trained, wrong strength, noise.",
    "inspect": "Say what is in a LoRA file: format, rank, alpha, hazards, the strength to pass.",
    "diagnose": "One answer: what this file is, what your tool does with it, the number to pass there.",
    "verify": "Say which scale was really merged into a checkpoint: base, merged file and LoRA in.",
    "audit": "Read a whole library of LoRA files: one row each.",
    "repair": "Write a new LoRA file whose scale every reader agrees on.",
    "report": "Write the HTML report from recorded runs.",
    "site": "Write a static site from recorded runs: a page per loader, finding, format and code.",
    "history": "Show what changed between recorded runs.",
    "selftest": "Check the checks: broken loaders must be found and named, right ones never blamed.",
    "explain": "Say what a code means and how to fix it.",
    "loaders": "List the loaders that can be checked here.",
    "benches": "List the models that they are checked on; say what is measured of one of your own.",
    "releases": "Say which release of a loader changed its law, and which of your files that changes.",
    "install": "Fetch releases of loaders, to be checked beside the installed ones.",
}


class _Commands(click.Group):
    """A group whose commands live in modules of their own, so that `--help` imports none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"harness.commands.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def make_context(self, *arguments: Any, **keywords: Any) -> click.Context:
        with told_in_a_sentence():  # `--help` prints here
            return super().make_context(*arguments, **keywords)

    def invoke(self, ctx: click.Context) -> Any:
        with told_in_a_sentence():
            return super().invoke(ctx)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(f"{error.message} Commands are {', '.join(COMMANDS)}.", ctx) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lora-harness")
def main() -> None:
    """Diagnose LoRA loaders and LoRA files: which scaling law, which strength, which fix.

    \b
    Example:
      lora-harness check peft
      lora-harness check path/to/my_loader.py:load --format kohya
      lora-harness inspect my_lora.safetensors
    """
    gc.set_threshold(*SELDOM)
    leave_the_driver_alone()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach a hub unless it is asked to
    obey_no_text()
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
