"""Benches by name: those of the table, and those that a run brought along."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from harness.benches.bench import Bench
from harness.errors import UserError

_MODULES = {
    "qwen-image": "qwen_image",
    "qwen-image-fused": "qwen_image",
    "sd-unet": "sd_unet",
    "flux": "flux",
    "clip-text": "text_models",
    "gpt2": "text_models",
    "qwen-image-deep": "qwen_image",
}
_OWN: dict[str, Bench] = {}


def get_bench(name: str) -> Bench:
    """Return the bench called `name`.

    Raises:
        UserError: no bench has this name.
    """
    if name in _OWN:
        return _OWN[name]
    if name not in _MODULES:
        raise UserError(
            f"bench={name!r}: no such bench; known are {', '.join((*bench_names(), *_OWN))}; "
            "one of your own is path/to/file.py:function"
        )
    return _from_table(name)


@cache
def _from_table(name: str) -> Bench:
    benches: tuple[Bench, ...] = import_module(f"harness.benches.{_MODULES[name]}").BENCHES
    return next(bench for bench in benches if bench.name == name)


def bench_names() -> tuple[str, ...]:
    """Return the names of all benches of the table."""
    return tuple(_MODULES)


def own_benches() -> tuple[str, ...]:
    """Return the names of the benches that were brought along."""
    return tuple(_OWN)


def add_bench(bench: Bench) -> None:
    """Make a bench known under its name, here and in the processes that this one starts from now on.

    Raises:
        UserError: the name is taken, by one of the table or by another that was brought along.
    """
    if bench.name in _MODULES:
        raise UserError(f"{bench.spec}: {bench.name!r} is the name of a bench of the harness; give yours another")
    before = _OWN.get(bench.name)
    if before is not None and before.spec != bench.spec:
        raise UserError(f"{bench.spec} and {before.spec} are both called {bench.name!r}; give one another name")
    _OWN[bench.name] = bench
