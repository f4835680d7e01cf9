"""Releases of one package beside each other: `python -m harness.loaders.releases diffsynth==2.0.4 diffsynth==2.1.12`.

Each is unpacked to `<root>/<name>-<version>/` and imported from there, so a release known to be wrong and the current
one can be tested in one process. The root is `LORA_HARNESS_RELEASES`, else `<sys.prefix>/share/lora-harness/releases`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from types import ModuleType

from packaging.version import InvalidVersion, Version

from harness.errors import LoaderSpecError, UserError

ROOT_VARIABLE = "LORA_HARNESS_RELEASES"
_PIN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!]*)")


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
        raise LoaderSpecError(f"{which}; run `python -m harness.loaders.releases {wanted}`")


def releases_root() -> Path:
    """Return the folder that holds the unpacked releases (it may not exist yet)."""
    chosen = os.environ.get(ROOT_VARIABLE)
    return Path(chosen) if chosen else Path(sys.prefix) / "share" / "lora-harness" / "releases"


def find_releases(name: str) -> list[Release]:
    """Return every release of `name` found, oldest first: the unpacked ones and the one installed, if any."""
    found = {release.version: release for release in [*_installed(name), *_unpacked(name)]}
    return sorted(found.values(), key=lambda release: Version(release.version))


def _unpacked(name: str) -> list[Release]:
    folders = sorted(releases_root().glob(f"{name}-*"))
    pairs = [(folder.name.removeprefix(f"{name}-"), folder) for folder in folders]
    return [Release(name, version, folder) for version, folder in pairs if _is_complete(folder, name, version)]


def _is_complete(folder: Path, name: str, version: str) -> bool:
    try:
        Version(version)
    except InvalidVersion:
        return False
    return (folder / name).is_dir()


def _installed(name: str) -> list[Release]:
    try:
        found, version = util.find_spec(name), metadata.version(name)
    except (ImportError, ValueError, metadata.PackageNotFoundError):
        return []
    if found is None or not found.submodule_search_locations:
        return []
    return [Release(name, version, Path(next(iter(found.submodule_search_locations))).parent)]


def install(pin: str) -> tuple[Release, bool]:
    """Unpack the release `name==version` without its dependencies; return it and whether it was fetched now.

    Raises:
        UserError: `pin` is no exact pin, or pip cannot get it.
    """
    match = _PIN.fullmatch(pin)
    if match is None:
        raise UserError(f"{pin!r} is no exact release; write name==version, for example diffsynth==2.0.4")
    name, version = match["name"], match["version"]
    folder = releases_root() / f"{name}-{version}"
    if _is_complete(folder, name, version):
        return Release(name, version, folder), False
    try:
        _unpack(pin, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}; {ROOT_VARIABLE} chooses another place") from error
    return Release(name, version, folder), True


def _unpack(pin: str, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place when complete, so that an interrupted run leaves no half of a release behind.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
        target = Path(partial) / "release"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--target", str(target), pin], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            raise UserError(f"cannot install {pin} to {folder}: pip says: {lines[-1].strip()}")
        if folder.exists():
            shutil.rmtree(folder)
        target.rename(folder)


def main(pins: Sequence[str] | None = None) -> int:
    """Install every pin given; print one line each; return 0, or 2 when one could not be had."""
    wanted = list(sys.argv[1:] if pins is None else pins)
    if not wanted or wanted[0] in {"-h", "--help"}:
        print(__doc__)
        return 0 if wanted else 2
    failed = False
    for pin in wanted:
        try:
            release, fetched = install(pin)
        except UserError as error:
            failed = True
            print(error, file=sys.stderr)
        else:
            print(f"{release.name} {release.version}: {'unpacked to' if fetched else 'already in'} {release.folder}")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
