"""One string names a loader everywhere: `resolve` turns it into the subject under test, `installed` lists the names."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.errors import LoaderSpecError, one_line
from harness.loaders.apart import subject_apart, subject_here
from harness.loaders.benches import bench_name
from harness.loaders.declaration import declaration_of
from harness.loaders.live import LiveLoader, live_loaders
from harness.loaders.pinned import is_pinned, pinned_here, pinned_subject
from harness.loaders.protocol import Subject
from harness.loaders.source import import_callable, is_file

ENTRY_POINTS = "lora_harness.loaders"


@dataclass(frozen=True)
class Installed:
    """A loader that can be named; `reason` says why it cannot run here when `available` is False."""

    name: str
    version: str | None
    available: bool
    reason: str | None = None


def resolve(spec: str | Callable[..., Any], *, name: str | None = None) -> Subject:
    """Return the loader that `spec` names, ready to be tested; reports show it as `name` where one is given.

    `spec` is a registered name (`peft`, `diffsynth-2.0.4`), one with a release or a checkout (`peft==0.12.0`,
    `comfyui@COMMIT`), `package.module:callable`, `path/to/file.py:callable`, `cmd:...`, `serve:...`, `outputs:...`, or
    the function itself.

    Raises:
        LoaderSpecError: nothing has that name, it cannot be imported, or it cannot be called as a loader.
        UserError: it declares a bench of its own that cannot be used.
    """
    subject = _with_benches(_resolved(spec))
    return replace(subject, name=name) if name else subject


def _resolved(spec: str | Callable[..., Any]) -> Subject:
    if not isinstance(spec, str):
        return subject_here(spec, _spec_of(spec), _version_of(getattr(spec, "__module__", "") or ""))
    if spec.startswith("cmd:"):
        from harness.loaders.command import command_subject

        return command_subject(spec)
    if spec.startswith("outputs:"):
        from harness.loaders.outputs import outputs_subject

        return outputs_subject(spec)
    if spec.startswith("serve:"):
        from harness.loaders.serve import serve_subject

        return serve_subject(spec)
    if is_pinned(spec):
        return pinned_subject(spec)
    if ":" in spec:
        module = spec.rpartition(":")[0]
        version = None if is_file(module) else _version_of(module)
        return subject_apart(spec, import_callable, version)
    return _from_name(spec)


def _with_benches(subject: Subject) -> Subject:
    """Return the subject with the benches of its own that it declares known, and called by their names."""
    said = subject.declaration
    if not any(not isinstance(bench, str) or ":" in bench for bench in said.benches or ()):
        return subject
    names = frozenset(bench_name(b) if not isinstance(b, str) or ":" in b else b for b in said.benches or ())
    return replace(subject, declaration=replace(said, benches=names))


def installed() -> list[Installed]:
    """Return every loader that has a name: the live ones, then those of other packages; none is imported."""
    points = _entry_points().items()
    return [*_live(), *(Installed(name, _point_version(point), True) for name, point in points)]


def releases_here() -> list[Installed]:
    """Return the fetched releases, by the names under which they are checked: `peft==0.12.0`."""
    found = ((live, version) for live in live_loaders().values() if not live.package for version in pinned_here(live))
    return [Installed(f"{live.name}=={version}", version, True) for live, version in found]


def available() -> list[str]:
    """Return the names of the loaders that can run here."""
    return [each.name for each in installed() if each.available]


def _live() -> Iterator[Installed]:
    for name, live in live_loaders().items():
        reason = live.reason()
        yield Installed(name, live.version(), reason is None, reason)
        for release in live.older():
            yield Installed(f"{name}-{release.version}", release.version, reason is None, reason)


def _from_name(name: str) -> Subject:
    live, version = _live_loader(name)
    if live is not None:
        if (reason := live.reason(version)) is not None:
            raise LoaderSpecError(f"{name}: {reason}")
        return Subject(name, *live.bound(version), declaration_of(live.load))
    point = _entry_points().get(name)
    if point is not None:
        return subject_apart(name, _loaded, _point_version(point))
    raise LoaderSpecError(_unknown(name))


def _live_loader(name: str) -> tuple[LiveLoader | None, str | None]:
    """Return the live loader of a name, and the version when it is NAME-VERSION."""
    found = live_loaders(name)
    base, _, version = name.rpartition("-")
    if name not in found and base in found and found[base].package and version[:1].isdigit():
        return found[base], version
    return found.get(name), None


def _unknown(name: str) -> str:
    names = [entry.name for entry in installed()]
    close = difflib.get_close_matches(name, names, n=2)
    if not close and (is_file(name) or Path(name).is_file()):
        return f"{name!r} names a file but no function; write {name}:load when `load` is its name"
    guess = f"; did you mean {' or '.join(close)}?" if close else ""
    known = f"known: {', '.join(names)}; or NAME==VERSION, package.module:function, file.py:function, "
    known += "cmd:..., serve:..., outputs:..."
    return f"no loader is called {name!r}{guess} ({known})"


def _entry_points() -> dict[str, metadata.EntryPoint]:
    """Return the loaders that other packages register, by name; a built-in name cannot be taken over."""
    points = metadata.entry_points(group=ENTRY_POINTS)
    return {point.name: point for point in points if _live_loader(point.name)[0] is None}


def _loaded(name: str) -> Callable[..., Any]:
    point = _entry_points()[name]
    try:
        return point.load()  # type: ignore[no-any-return]
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise LoaderSpecError(f"{point.name}: importing {point.value} raises {one_line(error)}") from error


def _point_version(point: metadata.EntryPoint) -> str | None:
    return point.dist.version if point.dist is not None else None


@functools.cache
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


def _version_of(module: str) -> str | None:
    owners = _distributions().get(module.partition(".")[0], [])
    return metadata.version(owners[0]) if owners else None


def _spec_of(function: Callable[..., Any]) -> str:
    """Return the string that names `function` on a command line as well as one can be given."""
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if module == "__main__" and file is not None:
        return f"{Path(file)}:{name}"
    return f"{module}:{name}" if module else name
