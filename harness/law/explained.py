"""What is said of a code or a finding, for `explain`, the site and whoever else shows it: one text, one place."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from harness.law.findings import Finding, findings
from harness.text import read_toml
from harness.verdict import codes
from harness.verdict.codes import Code

_NAME = re.compile(r"\S*\w[._]\w+[._]\w\S*")  # of a tensor or a layer: dots or underscores on both sides of a word
_ERROR = "error"
_TABLE = Path(codes.__file__).with_name("examples.toml")


def about_code(code: Code) -> dict[str, Any]:
    """Return what a code means: title, cause, fix, a wrong and a right loader, and the findings that have it."""
    known = [f"{f.loader} {f.measured}: {f.what} ({f.link})" for f in findings_with(code.code)]
    rows: dict[str, Any] = {"kind": "code", **dataclasses.asdict(code)}
    rows |= {**examples_of(code.code), "known": known}
    return {name: value for name, value in rows.items() if value}


def about_finding(finding: Finding) -> dict[str, Any]:
    """Return what a finding says: the tool, what goes wrong, which effect it has, whether it is known upstream."""
    title = f"{finding.loader} {finding.measured}: {finding.what}"
    says = f"{finding.loader} {finding.says}"
    rows = {"kind": "finding", "code": ", ".join(finding.codes), "title": title, "effect": finding.effect, "says": says}
    rows |= {"upstream": finding.known, "page": finding.link}
    return {name: value for name, value in rows.items() if value}


def findings_with(code: str) -> list[Finding]:
    """Return the findings that have a code, in the order of the index."""
    return [finding for finding in findings().values() if code in finding.codes]


def examples_of(code: str) -> Mapping[str, str]:
    """Return a minimal `wrong` and a `right` loader or file for a code, as far as there are any."""
    found: Mapping[str, str] = _examples()["code"].get(code, {})
    return found


def symptoms() -> Mapping[str, list[str]]:
    """Return the codes that each symptom leads to, the most usual first."""
    found: Mapping[str, list[str]] = _examples()["symptom"]
    return found


def symptoms_of(text: str) -> list[str]:
    """Return the symptoms that a question in a user's own words is about: those that it names, else by other words.

    What is called after a tensor says nothing, and that it is an error no more than the rest of the words does.
    """
    words = re.findall(r"\w+", _NAME.sub(" ", text.lower()).replace("n't", " not"))
    named = [each for each in symptoms() if _is_said(each, words) or text.lower() in each]
    if set(named) - {_ERROR}:
        return named
    also: Mapping[str, str] = _examples()["also"]
    said = sorted((phrase for phrase in also if _is_said(phrase, words)), key=lambda each: -len(each.split()))
    return list(dict.fromkeys([*(also[phrase] for phrase in said), *named]))


def _is_said(phrase: str, words: list[str]) -> bool:
    return all(any(word.startswith(each) for word in words) for each in phrase.split())


@cache
def _examples() -> dict[str, Any]:
    return read_toml(_TABLE)
