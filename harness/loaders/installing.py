"""Fetching releases, and only when asked: `uv` where it is there, else pip; each to a folder of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

from harness.errors import UserError
from harness.loaders.package_index import published_release
from harness.loaders.releases import ROOT_VARIABLE, Release, beside, releases_root, unpacked
from harness.text import printable

PIN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!]*)")
_SECONDS = 1800.0
_NOISE = ("warning", "hint:", "note:", "[notice]")


@dataclass(frozen=True)
class MissingRelease:
    """A release that is asked for and not there; `size` are the bytes to fetch, None where the index does not tell."""

    name: str
    version: str
    size: int | None = None

    @property
    def pin(self) -> str:
        """`name==version`."""
        return f"{self.name}=={self.version}"


def parse_pin(pin: str) -> tuple[str, str]:
    """Return name and version of `name==version`, the name as indexes spell it.

    Raises:
        UserError: it is no exact pin.
    """
    match = PIN.fullmatch(pin)
    if match is None:
        raise UserError(f"{printable(pin)!r} is no exact release; write name==version, for example diffsynth==2.0.4")
    return canonicalize_name(match["name"]), match["version"]


def here(name: str, version: str) -> Release | None:
    """Return a release that lies in a folder of its own, or is the one installed; None when it is neither."""
    own = next((each for each in unpacked(name) if Version(each.version) == Version(version)), None)
    return own or _installed(name, version)


def _installed(name: str, version: str) -> Release | None:
    found = installed_version(name)
    if found is None or Version(found) != Version(version):
        return None
    return Release(name, found, Path(str(metadata.distribution(name).locate_file(""))))


def installed_version(name: str) -> str | None:
    """Return the version of a package that this environment has installed, None when it has none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def missing(pins: Iterable[str]) -> list[tuple[str, str]]:
    """Return which of the releases `name==version`, and of those that they need beside them, are not there.

    Raises:
        UserError: one is no exact pin.
    """
    wanted = [parse_pin(pin) for pin in pins]
    wanted += [parse_pin(pin) for name, version in list(wanted) for pin in beside(name, version)]
    return [each for each in dict.fromkeys(wanted) if here(*each) is None]


def sized(wanted: Iterable[tuple[str, str]]) -> list[MissingRelease]:
    """Return the releases with the bytes that each takes to fetch, as the index says.

    Raises:
        UserError: the index cannot be reached, or has no such release.
    """
    return [_sized(name, version) for name, version in wanted]


def _sized(name: str, version: str) -> MissingRelease:
    found = published_release(name, version)
    if found is None:
        raise UserError(f"the package index has no release {name}=={version}")
    return MissingRelease(name, version, found.size)


def said_size(wanted: Sequence[MissingRelease]) -> str:
    """Return `3 releases, 4.2 MB to fetch`."""
    known = [each.size for each in wanted if each.size is not None]
    size = f"{sum(known) / 1e6:.1f} MB to fetch" if known else "of a size that the index does not tell"
    more = " and more" if known and len(known) < len(wanted) else ""
    return f"{len(wanted)} release{'' if len(wanted) == 1 else 's'}, {size}{more}"


def install(name: str, version: str) -> Release:
    """Unpack a release without its dependencies, unless it is there.

    Raises:
        UserError: neither uv nor pip can get it, or the folder cannot be written.
    """
    if (release := here(name, version)) is not None:
        return release
    folder = releases_root() / f"{name}-{version}"
    try:
        _unpack(f"{name}=={version}", folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}; {ROOT_VARIABLE} chooses another place") from error
    return Release(name, version, folder)


def _unpack(pin: str, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place when complete, so that an interrupted run leaves no half of a release behind.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
        target = Path(partial) / "release"
        problem = ""
        for command in _commands(target):
            shutil.rmtree(target, ignore_errors=True)
            problem = _ran([*command, pin])
            if not problem:
                break
        if problem:
            raise UserError(f"cannot install {pin} to {folder}: {problem}")
        if folder.exists():
            shutil.rmtree(folder)
        target.rename(folder)


def _commands(target: Path) -> list[list[str]]:
    """Return the installers to try, one after the other."""
    options = ["--quiet", "--no-deps", "--target", str(target)]
    beside_python = Path(sys.executable).with_name("uv")
    uv = shutil.which("uv") or (str(beside_python) if beside_python.exists() else None)
    found = [[uv, "pip", "install", "--python", sys.executable, *options]] if uv else []
    if installed_version("pip") or not found:
        found.append([sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *options])
    return found


def _ran(command: Sequence[str]) -> str:
    """Run an installer; return what it says is wrong, in a sentence, or nothing."""
    name = "uv" if command[1] == "pip" else "pip"
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"{name} did not end within {_SECONDS:g} s"
    if done.returncode == 0:
        return ""
    lines = [" ".join(line.strip(" │×╰─▶").split()) for line in done.stderr.splitlines()]
    told = [line for line in lines if line and not line.lower().startswith(_NOISE)] or ["no message"]
    ends = told[:1] + told[-1:] if name == "uv" and len(told) > 1 else told[-1:]
    return f"{name} says: {printable('; '.join(ends), 300)}"
