"""Releases beside each other: `lora-harness install diffsynth==2.0.4 peft==0.12.0` unpacks each to a folder of its own.

It is `<root>/<name>-<version>/`, without dependencies: the packages of the present interpreter serve, torch among them,
and `releases.toml` says which release needs others beside it. The root is `LORA_HARNESS_RELEASES`, else in the user's
cache; what lies in `<sys.prefix>/share/lora-harness/releases` is found too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from types import ModuleType

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from harness.errors import LoaderSpecError
from harness.text import read_toml

ROOT_VARIABLE = "LORA_HARNESS_RELEASES"
_TABLE = Path(__file__).with_name("releases.toml")


@dataclass(frozen=True)
class Release:
    """One version of a package; `folder` is the directory that holds the package's own directory."""

    name: str
    version: str
    folder: Path

    def hollow(self, packages: Sequence[str], *, alias: str | None = None) -> None:
        """Put empty packages in place of `packages` (`""`, `.core`, ...), whose files can then be imported.

        They carry the real folders, but their own `__init__`, which imports the whole application, does not run. Under
        an `alias` two releases run in one process.

        Raises:
            LoaderSpecError: another release stands in this process under that name.
        """
        for package in packages:
            name = f"{alias or self.name}{package}"
            path = [str(self.folder.joinpath(self.name, *package.split(".")[1:]))]
            module = sys.modules.setdefault(name, ModuleType(name))
            if list(getattr(module, "__path__", path)) != path:
                raise LoaderSpecError(f"{self.name} {self.version}: this process has another release of it already")
            module.__path__ = path


@dataclass(frozen=True)
class Package:
    """A package used in releases beside each other; `tested` are the versions it was tested in, newest first."""

    name: str
    tested: tuple[str, ...]

    def releases(self) -> list[Release]:
        """Return every release found, oldest first."""
        return find_releases(self.name)

    def release(self, version: str | None = None) -> Release:
        """Return one release found, the newest when no version is given.

        Raises:
            LoaderSpecError: it is not there; the message has the command that gets it.
        """
        found = {release.version: release for release in self.releases()}
        if version is None and found:
            return list(found.values())[-1]
        if version in found:
            return found[version]
        wanted = " ".join(f"{self.name}=={each}" for each in ([version] if version else self.tested))
        which = (
            f"release {version} is not here (found: {', '.join(found) or 'none'})" if version else "no release is here"
        )
        raise LoaderSpecError(f"{which}; run `lora-harness install {wanted}`")


def releases_root() -> Path:
    """Return the folder that releases are unpacked to (it may not exist yet)."""
    if chosen := os.environ.get(ROOT_VARIABLE):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "lora-harness" / "releases" / str(sys.implementation.cache_tag)


def _roots() -> list[Path]:
    older = Path(sys.prefix) / "share" / "lora-harness" / "releases"
    return [releases_root()] if os.environ.get(ROOT_VARIABLE) else [older, releases_root()]


def find_releases(name: str) -> list[Release]:
    """Return every release of `name` found, oldest first: the unpacked ones and the one installed, if any."""
    found = {release.version: release for release in [*_installed(name), *unpacked(name)]}
    return sorted(found.values(), key=lambda release: Version(release.version))


def unpacked(name: str) -> list[Release]:
    """Return the releases of `name` that lie in folders of their own, oldest first."""
    found: dict[str, Release] = {}
    for folder in (folder for root in _roots() for folder in root.glob(f"{name}-*")):
        version = folder.name.removeprefix(f"{name}-")
        if _is_complete(folder, name, version):
            found[version] = Release(name, version, folder)
    return sorted(found.values(), key=lambda release: Version(release.version))


def _is_complete(folder: Path, name: str, version: str) -> bool:
    try:
        Version(version)
    except InvalidVersion:
        return False
    # an older pip makes an egg of a release that has no wheel
    return (folder / name).is_dir() or any(folder.glob("*.dist-info")) or any(folder.glob("*.egg-info"))


def _installed(name: str) -> list[Release]:
    try:
        found, version = util.find_spec(name), metadata.version(name)
    except (ImportError, ValueError, metadata.PackageNotFoundError):
        return []
    if found is None or not found.submodule_search_locations:
        return []
    return [Release(name, version, Path(next(iter(found.submodule_search_locations))).parent)]


@dataclass(frozen=True)
class Beside:
    """What the releases `versions` of a package need beside them: `pins`, and why."""

    package: str
    versions: str
    pins: tuple[str, ...]
    why: str


@cache
def _table() -> tuple[Beside, ...]:
    rows = read_toml(_TABLE)["beside"]
    return tuple(Beside(row["package"], row["versions"], tuple(row["with"]), row["why"]) for row in rows)


def beside(name: str, version: str) -> tuple[str, ...]:
    """Return the pins of the releases that this one needs beside it."""
    fits = (row for row in _table() if row.package == name and Version(version) in SpecifierSet(row.versions))
    return tuple(pin for row in fits for pin in row.pins)
