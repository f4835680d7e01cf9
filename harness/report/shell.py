"""What every page shares: the template environment, and the policy under which only the page's own script runs."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from harness.text import plain

if TYPE_CHECKING:
    from jinja2 import Environment

_PACKAGE = "harness.report"
_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; img-src data:; "
    "base-uri 'none'; form-action 'none'; object-src 'none'"
)


def environment() -> Environment:
    """Return the templates of the report: escaped, strict, and with hostile characters shown as escapes."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader(_PACKAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalized,
    )


def asset(name: str) -> Any:
    """Return a file that lies beside the templates, to be put into the page as it is."""
    from markupsafe import Markup

    text = (files(_PACKAGE) / "templates" / name).read_text(encoding="utf-8")
    return Markup(text)


def policy(script: str, style: str) -> str:
    """Return the content security policy that allows this script and this style alone."""
    return _POLICY.format(script=_hashed(script), style=_hashed(style))


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with `digits` significant digits, a dash for None."""
    return "–" if value is None else f"{value:.{digits}g}"


def _finalized(value: Any) -> Any:
    from markupsafe import Markup

    if isinstance(value, str) and not isinstance(value, Markup):
        return plain(value)
    return "" if value is None else value


def _hashed(text: str) -> str:
    digest = hashlib.sha256(str(text).encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
