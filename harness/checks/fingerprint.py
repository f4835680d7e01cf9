"""What the verdicts of a cell depend on, as one number: its loader, its bench, the harness, and how it is checked.

Where that cannot be known there is none: code of the user's own imports what it likes, a checkout can be edited.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.benches import get_bench, own_benches
from harness.checks.cell import Cell
from harness.checks.known import applies
from harness.checks.plan import Plan
from harness.isolation.limits import Limits
from harness.loaders.live import LiveLoader, live_loaders
from harness.loaders.protocol import Subject

_MEASURES = ("torch", "numpy", "safetensors", "hypothesis", "lora-harness")
_NAME = re.compile(r"^[A-Za-z0-9._-]+")


def fingerprint(cell: Cell, plan: Plan, limits: Limits) -> str | None:
    """Return the number, None where something that the verdicts depend on is not known to be the same later."""
    loader = _loader(cell.subject)
    if loader is None or cell.bench_name in own_benches() or plan.pins:
        return None
    how = {
        "plan": [plan.examples_in(cell), plan.layers_in(cell), plan.seed, plan.dtypes, plan.shrink],
        "seconds": limits.seconds or cell.allowed,
        "memory": limits.memory,
        "known": [asdict(line) for line in plan.known if applies(line, cell)],
    }
    place = [cell.format, cell.bench_name, cell.variant_name]
    bench, harness = _bench(cell.bench_name), _harness()
    return None if bench is None or harness["needs"] is None else _digest([place, loader, bench, harness, how])


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _loader(subject: Subject) -> dict[str, Any] | None:
    """Return a live loader's releases and those of all that it needs; None of any other loader."""
    live = _live(subject.spec)
    if live is None or live.checkout or subject.elsewhere or subject.version is None:
        return None
    needs = _closure(live.needs)
    return None if needs is None else {"spec": subject.spec, "version": subject.version, "needs": needs}


def _live(spec: str) -> LiveLoader | None:
    found = live_loaders(spec) if re.fullmatch(r"[a-z0-9_.-]+", spec) else {}
    base, _, version = spec.rpartition("-")
    release = found.get(base) if version[:1].isdigit() else None
    return found.get(spec) or (release if release and release.package else None)


@cache
def _bench(name: str) -> str | None:
    """Return what a bench is: the numbers of its weights, its layers, and the release of the library of its class."""
    import torch

    model, digest = get_bench(name).base(), hashlib.sha256()
    needs = _closure([type(model).__module__.partition(".")[0]])
    state = sorted(model.state_dict().items())
    if not all(type(value) is torch.Tensor for _, value in state):
        return None  # codes of a library's own
    for key, value in state:
        digest.update(f"{key} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    layers = repr(sorted(get_bench(name).layers.items()))
    return None if needs is None else _digest([digest.hexdigest(), layers, needs])


@cache
def _harness() -> dict[str, Any]:
    """Return the harness's own source, and the releases of what it measures with."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and "_fixtures" not in path.parts:
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    here = f"{platform.system()} {platform.machine()} {platform.python_version()} {platform.processor()}"
    return {"source": digest.hexdigest(), "needs": _closure(_MEASURES, here=True), "platform": here}


def _closure(names: Iterable[str], *, here: bool = False) -> dict[str, str] | None:
    """Return the versions of distributions and of all that they need; None when one can change without its version.

    With `here` one that is installed from a folder, as the harness itself is in a checkout, is left to its source.
    """
    found: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        held = _held(name)
        if name in found or held is None:  # of another system, or an extra
            continue
        if held.editable and not (here and name == "lora-harness"):
            return None
        found[name] = held.version
        waiting += held.needs
    return found


@dataclass(frozen=True)
class _Held:
    """A distribution that is installed; an `editable` one is a folder, which can change without its version."""

    version: str
    needs: tuple[str, ...]
    editable: bool


@cache  # every cell asks, and a hundred files of metadata are read for each
def _held(name: str) -> _Held | None:
    try:
        held = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    needs = (_NAME.match(each) for each in held.requires or () if "extra ==" not in each)
    editable = "dir_info" in (held.read_text("direct_url.json") or "")
    return _Held(held.version, tuple(match[0] for match in needs if match), editable)
