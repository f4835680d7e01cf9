"""Benches by name: those of the table, and those that a run brought along."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import cache
from importlib import import_module

from harness.benches.bench import Bench
from harness.benches.table import rows
from harness.errors import UserError

_CORE = {  # in the order in which they are checked, with the module that has more of it than a row of the table says
    "qwen-image": "qwen_image",
    "qwen-image-fused": "qwen_image",
    "sd-unet": None,
    "flux": "flux",
    "clip-text": None,
    "gpt2": None,
    "tiny-llama": None,
    "qwen-image-deep": "qwen_image",
}
_OWN: dict[str, Bench] = {}
_GIVEN: dict[str, Callable[[], Bench]] = {}


def get_bench(name: str) -> Bench:
    """Return the bench called `name`.

    Raises:
        UserError: no bench has this name.
    """
    return _given(name) if name in _GIVEN else built_bench(name)


@cache
def _given(name: str) -> Bench:
    return _GIVEN[name]()


def built_bench(name: str) -> Bench:
    """Return the bench called `name` as this interpreter builds it.

    Raises:
        UserError: no bench has this name.
    """
    if name in _OWN:
        return _OWN[name]
    if name not in _CORE and name not in rows():
        near = difflib.get_close_matches(name, (*_CORE, *rows(), *_OWN), n=3)
        known = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join((*_CORE, *_OWN))}, …"
        raise UserError(
            f"bench={name!r}: no such bench; {known} (`lora-harness benches` lists all; "
            "one of your own is path/to/file.py:function)"
        )
    return _from_table(name)


@cache
def _from_table(name: str) -> Bench:
    module = _CORE.get(name)
    if module is None:
        return rows()[name].bench()
    benches: tuple[Bench, ...] = import_module(f"harness.benches.{module}").BENCHES
    return next(bench for bench in benches if bench.name == name)


def bench_names() -> tuple[str, ...]:
    """Return the names of the benches that loaders are checked on when nobody says which."""
    return tuple(_CORE)


def more_benches() -> tuple[str, ...]:
    """Return the names of the other architectures of the table, which are checked when they are asked for."""
    return tuple(name for name in rows() if name not in _CORE)


def own_benches() -> tuple[str, ...]:
    """Return the names of the benches that were brought along."""
    return tuple(_OWN)


def give_bench(name: str, make: Callable[[], Bench]) -> None:
    """Let `get_bench` return what `make` returns for `name` from now on in this process, whatever else is called so."""
    _GIVEN[name] = make
    _given.cache_clear()


def add_bench(bench: Bench) -> None:
    """Make a bench known under its name, here and in the processes that this one starts from now on.

    Raises:
        UserError: the name is taken, by one of the table or by another that was brought along.
    """
    if bench.name in _CORE or bench.name in rows():
        raise UserError(f"{bench.spec}: {bench.name!r} is the name of a bench of the harness; give yours another")
    before = _OWN.get(bench.name)
    if before is not None and before.spec != bench.spec:
        raise UserError(f"{bench.spec} and {before.spec} are both called {bench.name!r}; give one another name")
    _OWN[bench.name] = bench
