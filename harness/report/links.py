"""Where the pages of codes and findings lie: below the address in LORA_HARNESS_SITE, and nowhere without it."""

from __future__ import annotations

import os
import re
from urllib.parse import quote, urlsplit

from harness.errors import UserError
from harness.law.findings import findings
from harness.text import printable
from harness.verdict.codes import CODES

VARIABLE = "LORA_HARNESS_SITE"
_CITED = re.compile(r"^(?P<reason>.*) \((?P<link>(?:docs/findings/|https?://)[^\s()]+)(?P<rest>[^\n]*)\)$", re.DOTALL)
_PAGE = re.compile(r"docs/findings/([a-z0-9.-]+)\.md")


def site() -> str | None:
    """Return the address of the site that `lora-harness site` wrote, without the last slash; None when none is set.

    Raises:
        UserError: the variable holds something that is no http(s) address.
    """
    given = os.environ.get(VARIABLE, "").strip().rstrip("/")
    if not given:
        return None
    parts = urlsplit(given)
    if parts.scheme not in ("http", "https") or not parts.netloc or not given.isprintable():
        raise UserError(f"{VARIABLE}={printable(given, 80)!r}: is no address; write https://example.org/lora")
    return given


def code_link(code: str | None) -> str | None:
    """Return the address of a code's page, None for what is no code and where no site is set."""
    base = site() if code in CODES else None
    return f"{base}/codes/{quote(str(code))}.html" if base else None


def finding_link(page: str) -> str | None:
    """Return the address of a finding's page, None where there is no such finding or no site."""
    base = site() if page in findings() else None
    return f"{base}/findings/{quote(page)}.html" if base else None


def cited(reason: str) -> tuple[str, str, str]:
    """Split the reason of a known failure into (reason, link, what follows the link); the last two may be empty."""
    found = _CITED.match(reason)
    return (found["reason"], found["link"], found["rest"].strip()) if found else (reason, "", "")


def finding_of_link(link: str) -> str:
    """Return the finding that a link such as `docs/findings/NAME.md` names, empty when it is none."""
    found = _PAGE.fullmatch(link)
    return found[1] if found and found[1] in findings() else ""
