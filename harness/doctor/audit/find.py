"""Which LoRA files lie under the given paths: safetensors files and PEFT folders, in a stable order, each once."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.doctor.audit import remote
from harness.errors import UserError
from harness.files.format import CONFIG_NAME, WEIGHTS_NAME

_SUFFIX = ".safetensors"
_PICKLED = "adapter_model.bin"


@dataclass(frozen=True)
class Found:
    """One file or PEFT folder to audit; `problem` says why it must not be opened."""

    path: str
    problem: str | None = None

    def stamp(self) -> tuple[int, int] | None:
        """Return (bytes, modification time in ns) of the weights, None when they cannot be told."""
        if remote.is_url(self.path):
            return remote.stamp(self.path)
        try:
            status = _weights_status(self.path)
        except (OSError, ValueError):
            return None
        return status.st_size, status.st_mtime_ns


def find_files(paths: Iterable[Path | str], *, schemes: Iterable[str] = remote.SCHEMES) -> list[Found]:
    """Return what to audit under files, folders, globs and URLs, in the order given and sorted within each.

    Links inside a folder are followed only to files inside it; a file reached twice counts once.

    Raises:
        UserError: a path or glob that names nothing, or a URL whose scheme is not in `schemes`.
    """
    seen: set[tuple[int, int] | str] = set()
    return [found for path in paths for found in _under(str(path), tuple(schemes)) if _is_new(found, seen)]


def _weights_status(path: str) -> os.stat_result:
    status = os.stat(path)
    return os.stat(os.path.join(path, WEIGHTS_NAME)) if stat.S_ISDIR(status.st_mode) else status


def _is_new(found: Found, seen: set[tuple[int, int] | str]) -> bool:
    identity: tuple[int, int] | str = found.path
    if not remote.is_url(found.path) and not found.problem:
        try:
            status = _weights_status(found.path)
            identity = (status.st_dev, status.st_ino)
        except (OSError, ValueError):
            pass
    if identity in seen:
        return False
    seen.add(identity)
    return True


def _under(path: str, schemes: tuple[str, ...]) -> Iterator[Found]:
    if remote.is_url(path):
        yield from (Found(url) for url in remote.find(path, schemes))
        return
    if os.path.lexists(path):
        yield from _local(Path(path))
        return
    matches = sorted(glob.glob(path, recursive=True))
    if not matches:
        raise UserError(f"{path}: no such file or folder, and no glob that matches anything")
    for match in matches:
        if os.path.isdir(match) or match.endswith(_SUFFIX):
            yield from _local(Path(match))


def _local(path: Path) -> Iterator[Found]:
    if path.is_dir():
        yield from _walk(path, path.resolve())
    else:
        yield Found(str(path))


def _walk(folder: Path, root: Path) -> Iterator[Found]:
    """Yield what is in a folder, then in its folders; links to folders are never entered."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield Found(str(folder), f"cannot be listed ({error.strerror or error})")
        return
    links = {entry.name: entry.is_symlink() for entry in entries}
    is_peft = {CONFIG_NAME, WEIGHTS_NAME} <= links.keys()
    if is_peft:
        yield _checked(folder / WEIGHTS_NAME, folder, root) if links[WEIGHTS_NAME] else Found(str(folder))
    elif _PICKLED in links:
        yield Found(str(folder))  # never opened; its row says so
    for entry in entries:
        taken = is_peft and entry.name == WEIGHTS_NAME
        if entry.name.endswith(_SUFFIX) and not entry.is_dir(follow_symlinks=False) and not taken:
            yield _checked(Path(entry.path), Path(entry.path), root) if links[entry.name] else Found(entry.path)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), root)


def _checked(file: Path, shown: Path, root: Path) -> Found:
    """Refuse a link that leads out of the root."""
    try:
        inside = file.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):
        return Found(str(shown), "a link that leads nowhere")
    return Found(str(shown), None if inside else f"a link that leads out of {root}: not followed")
