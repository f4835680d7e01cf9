"""Applications that no package index has: used from a checkout whose folder an environment variable names."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import util
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from harness.errors import LoaderSpecError, one_line
from harness.loaders.source import on_path

_VERSION = re.compile(r"""^(?:__version__|version)\s*=\s*["']([^"']+)["']""", re.MULTILINE)
_VERSION_FILES = ("pyproject.toml", "setup.py")


@dataclass(frozen=True)
class Checkout:
    """One application: `variable` names its folder, `marker` is a file that tells it from any other folder.

    `inside` is where its packages lie in that folder. `absent` are libraries that its files import for parts which load
    no LoRA. Where one is not installed, an empty object stands in for it while those files are imported, and no longer;
    a use of it would fail.
    """

    name: str
    variable: str
    marker: str
    repository: str
    absent: tuple[str, ...] = ()
    inside: str = ""

    def folder(self) -> Path:
        """Return the folder of the checkout.

        Raises:
            LoaderSpecError: the variable is not set, or names another folder.
        """
        chosen = os.environ.get(self.variable)
        if not chosen:
            raise LoaderSpecError(f"set {self.variable} to a checkout of {self.repository}")
        folder = Path(chosen).expanduser()
        if not (folder / self.marker).is_file():
            raise LoaderSpecError(f"{self.variable}={chosen} is no checkout: it has no {self.marker}")
        return folder

    def version(self) -> str | None:
        """Return the version that the checkout states, else the first 8 digits of its commit, else None."""
        with contextlib.suppress(LoaderSpecError):
            folder = self.folder()
            return stated_version(folder) or _commit(folder)
        return None

    def modules(self, *names: str) -> list[ModuleType]:
        """Import the shipped modules `names`, unmodified.

        Raises:
            LoaderSpecError: there is no checkout, or an import fails.
        """
        folder = self.folder()
        with on_path(str(folder / self.inside)), _standing_in(self.absent):
            try:
                return [importlib.import_module(name) for name in names]
            except Exception as error:  # an application may do anything when it is imported
                raise LoaderSpecError(f"{self.name}: cannot import {folder}: {one_line(error)}") from error


class _Absent(ModuleType):
    """Answers `from torchvision import transforms` and no more."""

    def __getattr__(self, name: str) -> ModuleType:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")


@contextlib.contextmanager
def _standing_in(names: Sequence[str]) -> Iterator[None]:
    missing = [name for name in names if name not in sys.modules and util.find_spec(name) is None]
    for name in missing:
        sys.modules[name] = _Absent(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)  # libraries ask for it to learn what is installed
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def stated_version(folder: Path, package: Path | None = None) -> str | None:
    """Return the version that the files of a checkout, or the `__init__` of its `package`, state."""
    files = [folder / name for name in _VERSION_FILES] + ([package / "__init__.py"] if package else [])
    return next(filter(None, map(_stated, files)), None)


def _stated(file: Path) -> str | None:
    found = _VERSION.search(file.read_text(encoding="utf-8")) if file.is_file() else None
    return found[1] if found else None


def _commit(folder: Path) -> str | None:
    head = folder / ".git" / "HEAD"
    text = head.read_text(encoding="utf-8").strip() if head.is_file() else ""
    if text.startswith("ref: "):
        branch = folder / ".git" / text[5:]
        text = branch.read_text(encoding="utf-8").strip() if branch.is_file() else ""
    return text[:8] or None
