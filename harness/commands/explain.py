"""`lora-harness explain`: what a code means, which codes a symptom leads to, what a finding says."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Any

import click

from harness.commands import options as shared


@click.command(
    epilog="\b\nExamples:\n"
    "  lora-harness explain\n"
    "  lora-harness explain LH201\n"
    "  lora-harness explain noise\n"
    '  lora-harness explain "no effect"'
)
@click.argument("asked", nargs=-1, metavar="[CODE or SYMPTOM]")
@shared.json_option
def command(asked: tuple[str, ...], as_json: bool) -> None:
    """Say what a CODE means and how to fix it, which codes a SYMPTOM leads to; without an argument list them."""
    from harness.law.explained import about_code, about_finding
    from harness.law.findings import findings
    from harness.report.links import code_link, finding_link
    from harness.verdict.codes import CODES

    text = " ".join(asked).strip()
    if text.upper() in CODES:
        _tell(about_code(CODES[text.upper()]), code_link(text.upper()), as_json)
    elif text.lower() in findings():
        _tell(about_finding(findings()[text.lower()]), finding_link(text.lower()), as_json)
    elif text:
        _search(text, as_json)
    else:
        _list(as_json)


def _tell(found: dict[str, Any], address: str | None, as_json: bool) -> None:
    found |= {"address": address} if address else {}
    if as_json:
        click.echo(json.dumps(found))
        return
    head = f"{found.pop('code', '')} {found.pop('title', '')}".strip()
    found.pop("kind")
    click.echo(head)
    for label, value in found.items():
        for line in value if isinstance(value, list) else _text(value).splitlines():
            click.echo(f"  {label:<8}  {line}")


def _text(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _search(text: str, as_json: bool) -> None:
    """List the codes that a symptom leads to, or whose text has its words.

    Raises:
        UserError: nothing fits.
    """
    from harness.errors import UserError
    from harness.law.explained import symptoms
    from harness.law.findings import findings
    from harness.text import printable
    from harness.verdict.codes import CODES

    found = list(dict.fromkeys(_codes_of(text.lower())))
    if not found:
        known = [*CODES, *symptoms(), *findings()]
        near = [code for code in CODES if code == text.upper().replace("O", "0")]
        near = near or difflib.get_close_matches(text, known, n=3, cutoff=0.5)
        near = near or difflib.get_close_matches(text.upper(), CODES)
        hint = f"did you mean {', '.join(near)}?" if near else "`lora-harness explain` lists what is known"
        raise UserError(f"{printable(text, 60)!r}: no such code or symptom; {hint}")
    if as_json:
        click.echo(json.dumps({"kind": "symptom", "symptom": text, "codes": found}))
        return
    click.echo(f"{printable(text, 60)}: {len(found)} codes can be behind it, the most usual first")
    for code in found:
        click.echo(f"  {code}  {CODES[code].title}: {CODES[code].cause}")
    click.echo("`lora-harness diagnose FILE --saw ...` ranks the causes for one file; `explain CODE` says more")


def _codes_of(text: str) -> Iterator[str]:
    from harness.law.explained import symptoms, symptoms_of
    from harness.verdict.codes import CODES

    for symptom in symptoms_of(text):
        yield from symptoms()[symptom]
    words = text.split()
    for code in CODES.values():
        said = f"{code.title} {code.cause} {code.fix}".lower()
        if all(word in said for word in words):
            yield code.code


def _list(as_json: bool) -> None:
    from harness.law.explained import symptoms
    from harness.verdict.codes import CODES

    known = list(symptoms())
    if as_json:
        titles = {code.code: code.title for code in CODES.values()}
        click.echo(json.dumps({"kind": "codes", "codes": titles, "symptoms": known}))
        return
    for code in CODES.values():
        click.echo(f"{code.code}  {code.title}")
    click.echo(f"symptoms: {', '.join(known)}")
