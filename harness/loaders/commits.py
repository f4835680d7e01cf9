"""Sources of a loader other than a release: a virtual environment, or a checkout at one of its commits."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import LoaderSpecError, one_line
from harness.loaders.checkouts import stated_version
from harness.loaders.live import LiveLoader
from harness.loaders.releases import releases_root
from harness.text import printable

_DIGITS = 12
_SECONDS = 60  # for a Python to start and to look for packages
_FIND = "import importlib.util as u, sys; print(*(name for name in sys.argv[1:] if u.find_spec(name) is None))"


@dataclass(frozen=True)
class Sources:
    """Where the code is: another interpreter, or folders to search first; variables that say so to the loader."""

    version: str | None
    folders: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    python: str | None = None


def sources_at(live: LiveLoader, place: str) -> Sources:
    """Return the sources that `place` names for a loader: `FOLDER`, `FOLDER@COMMIT`, `COMMIT`, or a Python.

    Raises:
        LoaderSpecError: there is nothing of the kind.
    """
    path = Path(place).expanduser()
    if (python := _python(path)) is not None:
        packages = dict.fromkeys(each.partition(".")[0] for each in live.imports)
        _has_all(python, ["torch", "safetensors", *packages], place)
        return Sources(None, python=str(python))
    folder, commit = _split(live, place)
    digits = _commit(folder, commit)
    sources = _exported(live, folder, digits)
    if live.checkout:
        if not (sources / live.checkout.marker).is_file():
            raise LoaderSpecError(f"{folder} has no {live.checkout.marker} at {digits}: it is no {live.name}")
        said = stated_version(sources)
        return Sources(f"{said}+{digits}" if said else digits, variables={live.checkout.variable: str(sources)})
    root = next((each for each in (sources / "src", sources) if _holds(each, live)), None)
    if root is None:
        raise LoaderSpecError(f"{printable(place)!r} is no checkout of {live.needs[0]}: {live.imports[0]} is not in it")
    version = _described(live, root, sources)
    return Sources(f"{version or '0'}+{digits}", folders=(str(root),))


def _python(path: Path) -> Path | None:
    found = path / "bin" / "python" if path.is_dir() else path
    return found.absolute() if found.is_file() and os.access(found, os.X_OK) else None


def _has_all(python: Path, names: Sequence[str], place: str) -> None:
    """Refuse a Python in which one of the packages is missing: nothing of the loader could be measured there."""
    try:
        done = subprocess.run([str(python), "-c", _FIND, *names], capture_output=True, check=False, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LoaderSpecError(f"{printable(place)!r}: {python} does not run: {one_line(error)}") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2] or f"it ended with {done.returncode}"
        raise LoaderSpecError(f"{printable(place)!r}: {python} does not run: {printable(said, 200)}")
    if missing := done.stdout.decode().split():
        raise LoaderSpecError(f"{printable(place)!r} has no {missing[0]}; there must be {', '.join(names)}")


def _split(live: LiveLoader, place: str) -> tuple[Path, str]:
    """Return the folder of the checkout and what names the commit."""
    folder, _, commit = place.partition("@")
    if Path(folder).expanduser().is_dir():
        return Path(folder).expanduser().resolve(), commit or "HEAD"
    if live.checkout is None or Path(folder).expanduser().is_absolute() or folder.startswith("."):
        raise LoaderSpecError(f"there is no folder {printable(folder)}; write {live.name}@FOLDER@COMMIT")
    return live.checkout.folder().resolve(), place


def _git(folder: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, check=False)
    except OSError as error:
        raise LoaderSpecError(f"git cannot be run: {error.strerror}") from None


def _commit(folder: Path, name: str) -> str:
    done = _git(folder, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if done.returncode != 0:
        raise LoaderSpecError(f"{folder} is no checkout that has the commit {printable(name)!r}")
    return done.stdout.decode().strip()[:_DIGITS]


def _exported(live: LiveLoader, folder: Path, commit: str) -> Path:
    """Return a folder with the files of the commit, written once; the checkout itself stays as it is."""
    of = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    target = releases_root() / f"{live.name}@{commit}-{of}"
    if target.is_dir():
        return target
    done = _git(folder, "archive", "--format=tar", commit)
    if done.returncode != 0:
        why = printable(done.stderr.decode(errors="replace").partition("\n")[0], 200)
        raise LoaderSpecError(f"git cannot export {commit} of {folder}: {why}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            _unpack(archive, Path(partial) / "files")
        (Path(partial) / "files").rename(target)
    return target


def _holds(root: Path, live: LiveLoader) -> bool:
    return (root / live.imports[0].partition(".")[0]).is_dir()


def _described(live: LiveLoader, root: Path, sources: Path) -> str | None:
    """Let the checkout say its version as an installed package does: libraries ask one another for it."""
    package = live.imports[0].partition(".")[0]
    version = stated_version(sources, root / package)
    folder = root / f"{live.needs[0].replace('-', '_')}-{version or '0'}.dist-info"
    if not folder.is_dir():
        folder.mkdir()
        text = f"Metadata-Version: 2.1\nName: {live.needs[0]}\nVersion: {version or '0'}\n"
        (folder / "METADATA").write_text(text, encoding="utf-8")
    return version


def _unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """Write what lies in `folder` and nowhere else; a Python without filters for that takes plain files alone."""
    if hasattr(tarfile, "data_filter"):
        archive.extractall(folder, filter="data")
        return
    inside = [member for member in archive if not {"/", ".."} & set(Path(member.name).parts)]
    archive.extractall(folder, [member for member in inside if member.isfile() or member.isdir()])
