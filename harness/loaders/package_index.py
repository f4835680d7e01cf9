"""What a package index says of a package: its releases, the day of each, how large they are.

Asked for one package by name, when somebody wants releases fetched or listed; over the index that pip or uv is set to.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from packaging.tags import sys_tags
from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, parse_sdist_filename, parse_wheel_filename
from packaging.version import InvalidVersion, Version

from harness.errors import UserError
from harness.text import parse_json, printable

_VARIABLES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
_DEFAULT = "https://pypi.org/simple"
_JSON = "application/vnd.pypi.simple.v1+json"
_SECONDS = 20.0
_MOST_BYTES = 64 << 20
_LISTED = re.compile(r"^Available versions: (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Published:
    """A release as the index has it: the day its first file came, the bytes to fetch, whether it was taken back."""

    name: str
    version: str
    day: str | None = None
    size: int | None = None
    yanked: bool = False


def published(name: str) -> tuple[Published, ...]:
    """Return the final releases of a package, oldest first; of one that has none, those before.

    Raises:
        UserError: the index cannot be reached, or has no such package.
    """
    found = every_published(name)
    return tuple(each for each in found if not Version(each.version).is_prerelease) or found


def published_release(name: str, version: str) -> Published | None:
    """Return what the index says of one release, final or not, None when it has none such.

    Raises:
        UserError: the index cannot be reached.
    """
    return next((each for each in every_published(name) if Version(each.version) == Version(version)), None)


@cache
def every_published(name: str) -> tuple[Published, ...]:
    """Return the releases of a package, alphas, candidates and nightlies too, oldest first.

    Raises:
        UserError: the index cannot be reached, or has no such package.
    """
    url = f"{index_url().rstrip('/')}/{name}/"
    found = _from_json(name, _fetched(url, name)) or [Published(name, version) for version in _listed_by_pip(name)]
    if not found:
        raise UserError(f"the package index {_shown(url)} has no release of {name}")
    return tuple(sorted(found, key=lambda each: Version(each.version)))


def index_url() -> str:
    """Return the address of the index that uv or pip is set to, by variable or by pip's own configuration."""
    if chosen := next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), None):
        return chosen
    done = _pip("config", "get", "global.index-url")
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else _DEFAULT


def _pip(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *words, "--disable-pip-version-check"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def _shown(url: str) -> str:
    parts = urlsplit(url)  # without the password that may stand in it
    return printable(f"{parts.scheme}://{parts.hostname or ''}{parts.path}")


def _fetched(url: str, name: str) -> bytes:
    if urlsplit(url).scheme not in ("http", "https", "file"):
        raise UserError(f"the package index {_shown(url)} is no address that can be asked")
    try:
        request = urllib.request.Request(url, headers={"Accept": f"{_JSON}, text/html;q=0.1"})
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            body: bytes = answer.read(_MOST_BYTES)
            return body
    except (OSError, ValueError) as error:  # URLError is an OSError
        if getattr(error, "code", None) == 404:
            raise UserError(f"the package index {_shown(url)} has no package {name}") from None
        reason = printable(getattr(error, "reason", error))
        raise UserError(f"no release of {name} can be asked for: {_shown(url)} does not answer ({reason})") from None


def _from_json(name: str, body: bytes) -> list[Published]:
    """Return what an index that speaks JSON says; nothing of one that does not."""
    try:
        files = parse_json(body, limit=_MOST_BYTES)["files"]
    except (ValueError, KeyError, TypeError):
        return []
    by_version: dict[str, list[Mapping[str, Any]]] = {}
    for file in files if isinstance(files, list) else ():
        if isinstance(file, dict) and (version := _version_of(str(file.get("filename", "")))):
            by_version.setdefault(version, []).append(file)
    return [_published(name, version, files) for version, files in by_version.items()]


def _published(name: str, version: str, files: list[Mapping[str, Any]]) -> Published:
    days = [str(file["upload-time"])[:10] for file in files if file.get("upload-time")]
    fitting = [file for file in files if _fits(str(file["filename"]))] or files
    size = next((file["size"] for file in fitting if isinstance(file.get("size"), int)), None)
    return Published(name, version, min(days, default=None), size, all(file.get("yanked") for file in files))


def _version_of(filename: str) -> str | None:
    try:
        if filename.endswith(".whl"):
            return str(parse_wheel_filename(filename)[1])
        return str(parse_sdist_filename(filename)[1])
    except (InvalidWheelFilename, InvalidSdistFilename, InvalidVersion):
        return None


@cache
def _tags() -> frozenset[Any]:
    return frozenset(sys_tags())


def _fits(filename: str) -> bool:
    return filename.endswith(".whl") and not _tags().isdisjoint(parse_wheel_filename(filename)[3])


def _listed_by_pip(name: str) -> Iterable[str]:
    """Return the versions that pip lists: an index need not speak JSON, and may be several."""
    found = _LISTED.search(_pip("index", "versions", name).stdout)
    return found[1].split(", ") if found else ()
