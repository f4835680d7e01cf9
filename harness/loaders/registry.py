"""One string names a loader everywhere: `resolve` turns it into the subject under test, `installed` lists the names."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from harness.errors import LoaderSpecError
from harness.loaders.checkouts import CHECKOUTS
from harness.loaders.protocol import Subject, declaration_of
from harness.loaders.releases import find_releases
from harness.loaders.source import adapt, import_callable, is_file, one_line

ENTRY_POINTS = "lora_harness.loaders"


@dataclass(frozen=True)
class Installed:
    """A loader that can be named; `reason` says why it cannot run here when `available` is False."""

    name: str
    version: str | None
    available: bool
    reason: str | None = None


@dataclass(frozen=True)
class _Builtin:
    target: str  # module:attribute
    needs: tuple[str, ...] = ()  # modules to be found; the distribution of the first gives the version
    checkout: str | None = None  # name in CHECKOUTS
    release: str | None = None  # package to be unpacked beside the others


BUILTIN = {
    "peft": _Builtin("harness.loaders.live.peft:load", ("peft",)),
    "diffusers": _Builtin("harness.loaders.live.diffusers:load", ("diffusers", "peft")),
    "diffusers-fused": _Builtin("harness.loaders.live.diffusers:load_fused", ("diffusers", "peft")),
    "peft-runtime": _Builtin("harness.loaders.live.peft:load_runtime", ("peft",)),
    "lycoris": _Builtin("harness.loaders.live.lycoris:load", ("lycoris",)),
    "lycoris-runtime": _Builtin("harness.loaders.live.lycoris:load_runtime", ("lycoris",)),
    "loralib": _Builtin("harness.loaders.live.loralib:load", ("loralib",)),
    "comfyui": _Builtin("harness.loaders.live.comfyui:load", ("einops", "scipy", "psutil"), checkout="comfyui"),
    "sd-scripts": _Builtin(
        "harness.loaders.live.sd_scripts:load", ("diffusers", "transformers"), checkout="sd-scripts"
    ),
    "sd-scripts-runtime": _Builtin(
        "harness.loaders.live.sd_scripts:load_runtime", ("diffusers", "transformers"), checkout="sd-scripts"
    ),
    "invokeai": _Builtin("harness.loaders.live.invokeai:load", ("einops",), release="invokeai"),
    "invokeai-sidecar": _Builtin("harness.loaders.live.invokeai:load_sidecar", ("einops",), release="invokeai"),
    "diffsynth-hot": _Builtin("harness.loaders.live.diffsynth:load_hot", release="diffsynth"),
    "diffsynth-flux": _Builtin("harness.loaders.live.diffsynth:load_flux", release="diffsynth"),
}
_DIFFSYNTH = "diffsynth"
_DISTRIBUTIONS = {"lycoris": "lycoris-lora"}
_TESTED = {"diffsynth": ("2.1.12", "2.0.4"), "invokeai": ("6.14.2",)}


def resolve(spec: str | Callable[..., Any]) -> Subject:
    """Return the loader that `spec` names, ready to be tested.

    `spec` is a registered name (`peft`), `package.module:callable`, `path/to/file.py:callable`, `cmd:...`, or the
    function itself.

    Raises:
        LoaderSpecError: nothing has that name, it cannot be imported, or it cannot be called as a loader.
    """
    if not isinstance(spec, str):
        return _from_function(spec, _spec_of(spec), _version_of(getattr(spec, "__module__", "") or ""))
    if spec.startswith("cmd:"):
        from harness.loaders.command import command_loader

        return Subject(spec, command_loader(spec))
    if ":" in spec:
        module = spec.rpartition(":")[0]
        version = None if is_file(module) else _version_of(module)
        return _from_function(import_callable(spec), spec, version)
    return _from_name(spec)


def installed() -> list[Installed]:
    """Return every loader that has a name: the built-in ones, then those of other packages; imports none of them."""
    builtin = [_installed(name, entry) for name, entry in BUILTIN.items()]
    others = [Installed(name, _point_version(point), True) for name, point in _entry_points().items()]
    return builtin + _installed_diffsynth() + others


def _from_name(name: str) -> Subject:
    if name in BUILTIN:
        status = _installed(name, BUILTIN[name])
        if not status.available:
            raise LoaderSpecError(f"{name}: {status.reason}")
        return _from_function(import_callable(BUILTIN[name].target), name, status.version)
    if name == _DIFFSYNTH or name.startswith(f"{_DIFFSYNTH}-"):
        return _from_diffsynth(name)
    point = _entry_points().get(name)
    if point is not None:
        return _from_function(_loaded(point), name, _point_version(point))
    raise LoaderSpecError(_unknown(name))


def _from_diffsynth(name: str) -> Subject:
    from harness.loaders.live import diffsynth

    version = name.removeprefix(_DIFFSYNTH).removeprefix("-") or diffsynth.newest_release().version
    return _from_function(diffsynth.release_loader(version), name, version)


def _from_function(function: Callable[..., Any], spec: str, version: str | None) -> Subject:
    if not callable(function) or isinstance(function, type):
        raise LoaderSpecError(f"{function!r} is no loader: give a function or a string that names one")
    declaration = declaration_of(function)
    return Subject(spec, adapt(function, declaration.strength_argument, spec), version, declaration)


def _unknown(name: str) -> str:
    names = [entry.name for entry in installed()]
    close = difflib.get_close_matches(name, names, n=2)
    if not close and (is_file(name) or Path(name).is_file()):
        return f"{name!r} names a file but no function; write {name}:load when `load` is its name"
    guess = f"; did you mean {' or '.join(close)}?" if close else ""
    known = f"known: {', '.join(names)}; or package.module:function, file.py:function, cmd:..."
    return f"no loader is called {name!r}{guess} ({known})"


def _installed(name: str, entry: _Builtin) -> Installed:
    versions = {needed: _distribution_version(needed) for needed in entry.needs}
    version = next(iter(versions.values()), None)
    missing = next((_distribution_of(needed) for needed, found in versions.items() if found is None), None)
    reason = f"{missing} is not installed; run `pip install {missing}`" if missing else None
    if entry.checkout:
        checkout = CHECKOUTS[entry.checkout]
        version, reason = checkout.version(), checkout.reason() or reason or _import_fails(entry)
    if entry.release:
        releases = find_releases(entry.release)
        version = releases[-1].version if releases else None
        reason = reason if releases else _no_release(entry.release)
    return Installed(name, version, reason is None, reason)


def _import_fails(entry: _Builtin) -> str | None:
    """Import the application of a checkout, which nothing has ever installed here, and return why it cannot be."""
    try:
        import_callable(f"{entry.target.partition(':')[0]}:shipped")()
    except LoaderSpecError as error:
        return str(error)
    return None


def _no_release(package: str) -> str:
    pins = " ".join(f"{package}=={version}" for version in _TESTED[package])
    return f"no release is here; run `python -m harness.loaders.releases {pins}`"


def _installed_diffsynth() -> list[Installed]:
    found = find_releases(_DIFFSYNTH)
    if not found:
        return [Installed(_DIFFSYNTH, None, False, _no_release(_DIFFSYNTH))]
    older = [Installed(f"{_DIFFSYNTH}-{release.version}", release.version, True) for release in found[:-1]]
    return [Installed(_DIFFSYNTH, found[-1].version, True), *older]


def _entry_points() -> dict[str, metadata.EntryPoint]:
    """Return the loaders that other packages register, by name; a built-in name cannot be taken over."""
    points = metadata.entry_points(group=ENTRY_POINTS)
    return {point.name: point for point in points if point.name not in {*BUILTIN, _DIFFSYNTH}}


def _loaded(point: metadata.EntryPoint) -> Callable[..., Any]:
    try:
        return point.load()  # type: ignore[no-any-return]
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise LoaderSpecError(f"{point.name}: importing {point.value} raises {one_line(error)}") from error


def _point_version(point: metadata.EntryPoint) -> str | None:
    return point.dist.version if point.dist is not None else None


def _distribution_of(module: str) -> str:
    return _DISTRIBUTIONS.get(module, module)


def _distribution_version(module: str) -> str | None:
    try:
        return metadata.version(_distribution_of(module)) if util.find_spec(module) is not None else None
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


def _version_of(module: str) -> str | None:
    owners = _distributions().get(module.partition(".")[0], [])
    return metadata.version(owners[0]) if owners else None


def _spec_of(function: Callable[..., Any]) -> str:
    """Return the string that names `function` on a command line as well as one can be given."""
    return next(_names(function))


def _names(function: Callable[..., Any]) -> Iterator[str]:
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if module == "__main__" and file is not None:
        yield f"{Path(file)}:{name}"
    yield f"{module}:{name}" if module else name
