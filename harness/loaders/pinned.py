"""A loader of another release, or of a checkout at a commit: `peft==0.12.0`, `diffusers==0.33.1,peft==0.17.1`.

`NAME@PLACE` takes the code from PLACE: a virtual environment or its Python, a checkout of the package (`FOLDER` or
`FOLDER@COMMIT`), or, of an application whose checkout an environment variable names, a commit of that. All of these run
in a process of their own, which has another search path or is another interpreter.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module, metadata
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from harness.errors import LoaderSpecError, UserError
from harness.isolation.elsewhere import Elsewhere
from harness.loaders.commits import Sources, sources_at
from harness.loaders.declaration import declaration_of
from harness.loaders.installing import here, install, installed_version, missing, parse_pin, said_size, sized
from harness.loaders.live import LiveLoader, live_loaders
from harness.loaders.package_index import published
from harness.loaders.protocol import Subject
from harness.loaders.releases import beside, unpacked
from harness.loaders.serve import Served
from harness.text import printable

_SPEC = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]*)(?P<sign>==|@)(?P<rest>.+)", re.DOTALL)
_RELEASE = re.compile(r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9])?)(?P<range>(?:[=<>!~].*)?)", re.DOTALL)
_ANSWER, _SERVE = "harness.checks.measuring:served", "harness.loaders.pinned:serve_there"


def is_pinned(spec: str) -> bool:
    """Tell whether a string names a live loader and where its code comes from."""
    found = _SPEC.fullmatch(spec)
    return found is not None and (found["sign"] == "==" or live_named(found["name"]) is not None)


def live_named(name: str) -> LiveLoader | None:
    """Return the live loader of a name, be it the loader's own or that of its package."""
    loaders = live_loaders(name)
    by_package = (each for each in loaders.values() if package_of(each) == name.lower())
    return loaders.get(name) or next(by_package, None)


def package_of(live: LiveLoader) -> str | None:
    """Return the package whose releases are this loader's, None for an application that is no package."""
    if live.package:
        return live.package.name
    return None if live.checkout or not live.needs else live.needs[0]


def pinned_subject(spec: str) -> Subject:
    """Return the loader that a pinned string names.

    Raises:
        LoaderSpecError: there is no such loader, or its release or checkout is not here.
    """
    found = _SPEC.fullmatch(spec)
    assert found is not None, spec
    if not hasattr(os, "fork"):
        raise LoaderSpecError(f"{printable(spec)!r}: other releases run in a process that this system cannot start")
    live = live_named(found["name"])
    if live is None:
        raise LoaderSpecError(f"{printable(spec)!r}: {found['name']} is no loader whose releases are known here")
    if found["sign"] == "@":
        sources = sources_at(live, found["rest"])
        if live.checkout and sources.python is None and (lacking := live.lacking()):
            raise LoaderSpecError(f"{printable(spec)}: {lacking}")
        return _from_sources(spec, live, sources)
    return _from_releases(spec, live, found["rest"].split(","))


def _from_releases(spec: str, live: LiveLoader, parts: Sequence[str]) -> Subject:
    package = package_of(live)
    if package is None:
        raise LoaderSpecError(f"{spec}: {live.name} has no releases; write {live.name}@COMMIT")
    try:
        pins = dict([(package, _version(spec, parts[0])), *(parse_pin(part) for part in parts[1:])])
        absent = missing(f"{name}=={version}" for name, version in pins.items())
    except UserError as error:
        raise LoaderSpecError(str(error)) from None
    if absent:
        wanted = " ".join(f"{name}=={version}" for name, version in absent)
        how = f"run `lora-harness install {wanted}`, or give --install (pytest: --lora-install)"
        raise LoaderSpecError(f"{spec} is not here; {how}")
    if live.package:
        load, version = live.bound(pins[package])
        known_as = live.name if version == live.version() else f"{live.name}-{version}"
        return Subject(spec, load, version, declaration_of(live.load), known_as=known_as)
    every = [*pins.items(), *(parse_pin(pin) for name, version in pins.items() for pin in beside(name, version))]
    found = [str(release.folder) for name, version in every if (release := here(name, version))]
    folders = [folder for folder in found if folder not in sys.path]  # one that is installed is found there
    return _subject(spec, live, pins[package], folders, {"versions": pins})


def _version(spec: str, version: str) -> str:
    try:
        Version(version)
    except InvalidVersion:
        raise UserError(f"{printable(spec)!r}: {printable(version)!r} is no exact version") from None
    return version


def _from_sources(spec: str, live: LiveLoader, sources: Sources) -> Subject:
    more = {"variables": sources.variables, **({"python": sources.python} if sources.python else {})}
    return _subject(spec, live, sources.version, sources.folders, {"versions": {}}, **more)


def _subject(
    spec: str, live: LiveLoader, version: str | None, folders: Sequence[str], told: dict[str, Any], **more: Any
) -> Subject:
    told |= {"loader": live.name, "imports": list(live.imports), "plain": live.any_model}
    elsewhere = Elsewhere(_ANSWER, told, tuple(folders), **more)
    served, said = Served(spec, elsewhere.words(_SERVE)), declaration_of(live.load)
    unload, set_strength = said.unload and served.unload, said.set_strength and served.set_strength
    declaration = replace(said, unload=unload, set_strength=set_strength)
    return Subject(spec, served, version, declaration, elsewhere=elsewhere, known_as=live.name)


def subject_there(told: Mapping[str, Any]) -> Subject:
    """Return the live loader `told["loader"]` where it runs, with all imported that it needs.

    Raises:
        LoaderSpecError: another release than that of `told["versions"]` would run.
    """
    for name in told["imports"]:
        import_module(name)
    for name, version in told["versions"].items():
        if metadata.version(name) != version:
            raise LoaderSpecError(f"{name} is {metadata.version(name)} here, not {version}")
    live = live_loaders(told["loader"])[told["loader"]]
    return Subject(live.name, *live.bound(), declaration_of(live.load))


def serve_there(told: Mapping[str, Any]) -> None:
    """Serve the loader of a pinned string where it runs, for whoever loads into a model of his own."""
    from harness.serve import serve

    subject = subject_there(told["told"])
    declared = subject.declaration
    serve(subject.load, unload=declared.unload, set_strength=declared.set_strength, name=subject.spec)


def install_named(specs: Sequence[str], say: Callable[[str], object]) -> None:
    """Fetch the releases that pinned strings name and that are not here; `say` hears first how large they are.

    Raises:
        UserError: the index cannot be reached, or has no such release.
    """
    if absent := _absent(specs):
        say(said_size(sized(absent)))
        for name, version in absent:
            install(name, version)


def size_of_named(specs: Sequence[str]) -> str:
    """Return how large the releases are that pinned strings name and that are not here, nothing when all are.

    Raises:
        UserError: the index cannot be reached, or has no such release.
    """
    absent = _absent(specs)
    return said_size(sized(absent)) if absent else ""


def _absent(specs: Sequence[str]) -> list[tuple[str, str]]:
    return missing(pin for spec in specs if "==" in spec and is_pinned(spec) for pin in pins_of(spec))


def pins_of(text: str) -> list[str]:
    """Return the releases that `name==version,…`, a range `name>=1,<2` or a name, of a loader or a package, stands for.

    Raises:
        UserError: the index, which a range and a name are looked up in, cannot be reached, or it is none of these.
    """
    found = _RELEASE.fullmatch(text)
    if found is None:
        raise UserError(f"{printable(text)!r} names no release; write peft==0.12.0, or 'peft>=0.10,<0.13'")
    live = live_named(found["name"])
    package = canonicalize_name((live and package_of(live)) or found["name"])
    if found["range"].startswith("==") and "*" not in found["range"]:
        first, *rest = found["range"].removeprefix("==").split(",")
        return [f"{package}=={first}", *rest]
    versions = versions_in(package, found["range"])
    return [f"{package}=={version}" for version in (versions if found["range"] else versions[-1:])]


def versions_in(package: str, wanted: str) -> list[str]:
    """Return the releases of a package in a range, oldest first, as the index has them.

    Raises:
        UserError: the index cannot be reached, or the range is none, or has no release in it.
    """
    try:
        among = SpecifierSet(wanted)
    except InvalidSpecifier:
        raise UserError(f"{printable(wanted)!r} is no range of versions, such as '>=0.10,<0.13'") from None
    found = [each.version for each in published(package) if not each.yanked and each.version in among]
    if not found:
        raise UserError(f"the package index has no release of {package} in {printable(wanted)!r}")
    return found


def pinned_here(live: LiveLoader) -> list[str]:
    """Return the versions of a loader's package that lie unpacked here, oldest first."""
    package = package_of(live)
    return [release.version for release in unpacked(package)] if package else []


def releases_of(live: LiveLoader) -> list[str]:
    """Return the versions of a loader's package that can be measured here, the installed one among them."""
    package = package_of(live)
    if package is None:
        return []
    installed = [version] if (version := installed_version(package)) else []
    return sorted({*pinned_here(live), *installed}, key=Version)
