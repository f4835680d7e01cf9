"""Which releases of a loader to look at: those here, or with the index asked, all that it has in a range."""

from __future__ import annotations

from collections.abc import Sequence

from packaging.version import InvalidVersion, Version

from harness.errors import UserError
from harness.loaders.live import LiveLoader
from harness.loaders.package_index import every_published, published
from harness.loaders.pinned import live_named, package_of, releases_of
from harness.text import printable


def loader_with_releases(name: str) -> tuple[LiveLoader, str]:
    """Return a live loader and the package whose releases are its own.

    Raises:
        UserError: it is no live loader, or has no releases.
    """
    live = live_named(name)
    package = package_of(live) if live else None
    if live is None or package is None:
        raise UserError(
            f"{printable(name)!r} is no loader whose releases are known; those are {', '.join(with_releases())}"
        )
    return live, package


def with_releases() -> list[str]:
    """Return the live loaders that are the first of a package with releases."""
    from harness.loaders.live import live_loaders

    first: dict[str, str] = {}
    for name, live in live_loaders().items():
        if package := package_of(live):
            first.setdefault(package, name)
    return list(first.values())


def releases_between(
    live: LiveLoader, low: str | None, high: str | None, *, every: bool, ask_index: bool
) -> list[tuple[str, str | None]]:
    """Return the releases from `low` to `high`, oldest first, each with its day where the index was asked for it.

    Unless `every` one is wanted, the last of each minor series, and the two ends.

    Raises:
        UserError: an end is no version, there is no release between, or the index cannot be reached.
    """
    package = package_of(live)
    assert package is not None
    ends = [_version(end) for end in (low, high) if end is not None]
    found: list[tuple[str, str | None]]
    if ask_index:
        usual = [each for each in published(package) if not each.yanked]
        wanted = [each for each in every_published(package) if each in usual or Version(each.version) in ends]
        found = [(each.version, each.day) for each in wanted]
    else:
        found = [(version, None) for version in releases_of(live)]
    inside = [pair for pair in found if _is_between(pair[0], low, high)]
    if not inside:
        what = f"no release of {package}{_said_range(low, high)}"
        if ask_index:
            raise UserError(f"the package index has {what}")
        raise UserError(f"{what} is here; --install asks the package index and fetches them")
    return inside if every else _last_of_each_minor(inside, ends)


def _version(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        raise UserError(f"{printable(text)!r} is no version") from None


def _is_between(version: str, low: str | None, high: str | None) -> bool:
    this = Version(version)
    return (low is None or Version(low) <= this) and (high is None or this <= Version(high))


def _said_range(low: str | None, high: str | None) -> str:
    return "".join(f" {word} {printable(end)}" for word, end in (("from", low), ("to", high)) if end)


def _last_of_each_minor(
    found: Sequence[tuple[str, str | None]], ends: Sequence[Version]
) -> list[tuple[str, str | None]]:
    last = {Version(version).release[:2]: version for version, _ in found}
    return [pair for pair in found if pair[0] in last.values() or Version(pair[0]) in ends]
