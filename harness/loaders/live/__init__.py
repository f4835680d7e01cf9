"""Live loaders: one file each, which declares in `LIVE` under which names its loaders go and what they need.

The names that a file declares begin with its own, so that a loader is found without reading the other files.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from harness.errors import LoaderSpecError
from harness.isolation.calls import is_listened_to
from harness.loaders.protocol import Load

if TYPE_CHECKING:
    from harness.loaders.checkouts import Checkout
    from harness.loaders.releases import Package, Release

_WITH_BARS = ("diffusers", "transformers")  # these two show progress bars too, for every model they load


@dataclass(frozen=True)
class LiveLoader:
    """A loader that this package ships; `fixtures/known_failures/` has a file for each that is known to be wrong.

    `needs` are distributions; the first gives the version unless a checkout or a package does. Of a `checkout`,
    `shipped` imports what is used of it. The `load` of a `package` takes the keyword `release`, and every release
    found of it is a loader of its own, `NAME-VERSION`. `imports` are the modules that loading imports; `any_model` says
    that it takes whatever has layers, not only the classes of a library.
    """

    name: str
    load: Callable[..., Any]
    needs: tuple[str, ...] = ()
    checkout: Checkout | None = None
    shipped: Callable[[], object] | None = None
    package: Package | None = None
    imports: tuple[str, ...] = ()
    any_model: bool = False

    def version(self) -> str | None:
        """Return the version that runs under the plain name, None when there is none."""
        if self.checkout:
            return self.checkout.version()
        if self.package:
            return next((release.version for release in reversed(self.package.releases())), None)
        return _version(self.needs[0])

    def reason(self, version: str | None = None) -> str | None:
        """Return why it, or one version of it, cannot run here, or None when it can."""
        missing = self.lacking()
        try:
            if self.checkout:
                self.checkout.folder()
            if self.package:
                self.package.release(version)
            if missing is None and self.shipped:
                self.shipped()  # nothing has ever installed a checkout here: what it imports may be missing
        except LoaderSpecError as error:
            return str(error)
        return missing

    def lacking(self) -> str | None:
        """Return which package that it needs is missing, and what installs it, or None when all are here."""
        missing = next((name for name in self.needs if _version(name) is None), None)
        return f"{missing} is not installed; run `pip install {missing}`" if missing else None

    def bound(self, version: str | None = None) -> tuple[Load, str | None]:
        """Return the function to call and the version that it runs, of a package the given or the newest one.

        Raises:
            LoaderSpecError: the release is not there.
        """
        if self.package is None:
            return self.load, self.version()
        release = self.package.release(version)
        return functools.partial(self.load, release=release), release.version

    def older(self) -> list[Release]:
        """Return the releases to list beside the newest: of the loader that has its package's name, all of them."""
        return self.package.releases()[:-1] if self.package and self.package.name == self.name else []


@functools.cache
def live_loaders(name: str = "") -> dict[str, LiveLoader]:
    """Return every live loader by name, or those of the files that may declare `name`; no library is imported."""
    files = [module.name for module in pkgutil.iter_modules(__path__)]
    asked = [file for file in files if not name or name.startswith(file.replace("_", "-"))]
    return {each.name: each for file in asked for each in import_module(f"{__name__}.{file}").LIVE}


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Drop prints to stdout and Python warnings inside the block, and messages of `loggers` below the level error.

    Of diffusers and transformers, named as loggers, the progress bars go too. Where somebody listens, nothing goes.
    """
    if is_listened_to():
        yield
        return
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as after:
        warnings.simplefilter("ignore")
        for name in loggers:
            logger = logging.getLogger(name)
            after.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
            bars = import_module(f"{name}.utils.logging") if name in _WITH_BARS else None
            if bars and bars.is_progress_bar_enabled():
                after.callback(bars.enable_progress_bar)
                bars.disable_progress_bar()
        yield


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
