"""Live loaders: one file each, which declares in `LIVE` under which names its loaders go and what they need."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from harness.errors import LoaderSpecError
from harness.loaders.checkouts import Checkout
from harness.loaders.protocol import Load
from harness.loaders.releases import Package, Release


@dataclass(frozen=True)
class LiveLoader:
    """A loader that this package ships; `fixtures/known_failures/` has a file for each that is known to be wrong.

    `needs` are distributions; the first gives the version unless a checkout or a package does. Of a `checkout`,
    `shipped` imports what is used of it. The `load` of a `package` takes the keyword `release`, and every release
    found of it is a loader of its own, `NAME-VERSION`.
    """

    name: str
    load: Callable[..., Any]
    needs: tuple[str, ...] = ()
    checkout: Checkout | None = None
    shipped: Callable[[], object] | None = None
    package: Package | None = None

    def version(self) -> str | None:
        """Return the version that runs under the plain name, None when there is none."""
        if self.checkout:
            return self.checkout.version()
        if self.package:
            return next((release.version for release in reversed(self.package.releases())), None)
        return _version(self.needs[0])

    def reason(self, version: str | None = None) -> str | None:
        """Return why it, or one version of it, cannot run here, or None when it can."""
        missing = next((name for name in self.needs if _version(name) is None), None)
        try:
            if self.checkout:
                self.checkout.folder()
            if self.package:
                self.package.release(version)
            if missing is None and self.shipped:
                self.shipped()  # nothing has ever installed a checkout here: what it imports may be missing
        except LoaderSpecError as error:
            return str(error)
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
def live_loaders() -> dict[str, LiveLoader]:
    """Return every live loader by name; none of the libraries under test is imported."""
    modules = (import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    return {each.name: each for module in modules for each in module.LIVE}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
