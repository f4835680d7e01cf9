"""`lora-harness loaders`: what can be checked here."""

from __future__ import annotations

import dataclasses
import json

import click

from harness.commands import options as shared


@click.command(epilog="\b\nExample:\n  lora-harness loaders")
@shared.json_option
def command(as_json: bool) -> None:
    """List the loaders that have a name: installed ones, why the others cannot run, and the releases fetched."""
    from harness.loaders.registry import installed, releases_here

    found = [*installed(), *releases_here()]
    if as_json:
        for each in found:
            click.echo(json.dumps({"kind": "loader", **dataclasses.asdict(each)}))
        return
    for each in found:
        state = "available" if each.available else f"not available: {each.reason}"
        click.echo(f"{each.name:<24} {each.version or '-':<10} {state}")
