"""`lora-harness explain`: what a code means and how to fix it."""

from __future__ import annotations

import dataclasses
import json

import click

from harness.commands import options as shared


@click.command(epilog="\b\nExample:\n  lora-harness explain LH201")
@click.argument("code")
@shared.json_option
def command(code: str, as_json: bool) -> None:
    """Say what CODE means, how grave it is, which checks emit it, its likely cause and its fix."""
    from harness.verdict.codes import explain

    found = explain(code)
    if as_json:
        click.echo(json.dumps({"kind": "code", **dataclasses.asdict(found)}))
        return
    rows = {"severity": found.severity, "checks": ", ".join(found.checks), "cause": found.cause, "fix": found.fix}
    rows |= {"explains": ", ".join(found.explains)} if found.explains else {}
    click.echo("\n".join([f"{found.code} {found.title}", *(f"  {label:<8}  {text}" for label, text in rows.items())]))
