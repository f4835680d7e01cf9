"""Whether a file's layers have the sizes of the released models of an architecture, whose layers others call alike."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol

from harness.law.reads import Place, pattern_of
from harness.text import read_toml

TABLE = Path(__file__).with_name("sizes.toml")
_TOY = 256  # no released model is narrower: smaller ones are benches and examples, which have the names alone
_DEEP = 6  # so many blocks from the first on are no choice of a few


class Sized(Protocol):
    """What tells the size of a layer."""

    @property
    def name(self) -> str:
        """Its path in the model, with dots or flattened."""

    @property
    def in_features(self) -> int:
        """Its inputs, 0 where it has none."""

    @property
    def out_features(self) -> int:
        """Its outputs."""


@dataclass(frozen=True)
class Sizes:
    """A row of `sizes.toml`; see there for what the fields mean."""

    widths: frozenset[int] = frozenset()
    blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    inputs: Mapping[str, frozenset[int]] = field(default_factory=dict, hash=False)
    outputs: Mapping[str, frozenset[int]] = field(default_factory=dict, hash=False)
    like: str = ""
    never: str = ""

    def allow(self, file: _Measured) -> bool:
        """Tell whether a model of these sizes can have the layers of a file."""
        inside = all(max(seen) < max(self.blocks[stack]) for stack, seen in file.stacks.items() if stack in self.blocks)
        takes = _take(self.inputs, file.inputs) and _take(self.outputs, file.outputs)
        if self.never and any(map(re.compile(self.never).match, file.names)):
            return False
        return inside and takes and not self.widths.isdisjoint(file.widths)

    def is_as_deep(self, full: Mapping[str, int]) -> bool:
        """Tell whether a model has as many blocks as a file that has all of its first ones: stack -> number."""
        known = [number in self.blocks[stack] for stack, number in full.items() if stack in self.blocks]
        return all(known) and bool(known)

    def is_deeper(self, full: Mapping[str, int]) -> bool:
        """Tell whether no stack of the file that begins with the first block ends where a model's does."""
        known = [number in self.blocks[stack] for stack, number in full.items() if stack in self.blocks]
        return bool(known) and not any(known)


def _take(asked: Mapping[str, frozenset[int]], layers: Mapping[str, set[int]]) -> bool:
    """Tell whether all layers whose patterns end so have a width that is asked for."""
    return all(
        seen & widths for pattern, seen in layers.items() for end, widths in asked.items() if pattern.endswith(end)
    )


@dataclass
class _Measured:
    """Names, widths, numbers of blocks by their stack, inputs and outputs by pattern, of a file's layers."""

    names: list[str] = field(default_factory=list)
    widths: set[int] = field(default_factory=set)
    into: Counter[int] = field(default_factory=Counter)
    stacks: dict[str, set[int]] = field(default_factory=dict)
    inputs: dict[str, set[int]] = field(default_factory=dict)
    outputs: dict[str, set[int]] = field(default_factory=dict)

    def add(self, layer: Sized, pattern: str) -> None:
        self.names.append(layer.name.replace(".", "_"))
        self.widths.update((layer.in_features, layer.out_features))
        self.into[layer.in_features] += 1
        if pattern.endswith(_asked()):
            self.inputs.setdefault(pattern, set()).add(layer.in_features)
            self.outputs.setdefault(pattern, set()).add(layer.out_features)
        if found := _in_stack(layer.name):
            self.stacks.setdefault(found[0], set()).add(found[1])

    @property
    def usual(self) -> int:
        """The inputs that most layers have."""
        return max(self.into, key=lambda width: self.into[width], default=0)

    @property
    def full(self) -> dict[str, int]:
        """The stacks of which the file has every block from the first on, with their number."""
        counts = {stack: len(seen) for stack, seen in self.stacks.items() if len(seen) == max(seen) + 1}
        return {stack: number for stack, number in counts.items() if number >= _DEEP}


_NUMBER = re.compile(r"_\d+(?=_|$)")


@cache
def _rows() -> dict[str, Sizes]:
    return {family: _row(row) for family, row in read_toml(TABLE).items()}


def _row(row: Mapping[str, Any]) -> Sizes:
    blocks = {stack: tuple(numbers) for stack, numbers in row.get("blocks", {}).items()}
    inputs, outputs = (
        {end: frozenset(widths) for end, widths in row.get(side, {}).items()} for side in ("inputs", "outputs")
    )
    return Sizes(frozenset(row["widths"]), blocks, inputs, outputs, row.get("like", ""), row.get("never", ""))


def families() -> frozenset[str]:
    """Return the architectures whose sizes are known."""
    return frozenset(_rows())


def like(place: Place) -> Place | None:
    """Return the place with the same class of model, None where there is none."""
    sizes = _rows().get(place[0])
    return (sizes.like, place[1]) if sizes and sizes.like else None


@cache
def _asked() -> tuple[str, ...]:
    return tuple({end for sizes in _rows().values() for end in (*sizes.inputs, *sizes.outputs)})


@cache
def _stack() -> re.Pattern[str]:
    """Match the name of a layer inside a stack whose number of blocks is known, the longest first."""
    stacks = sorted({stack for sizes in _rows().values() for stack in sizes.blocks}, key=len, reverse=True)
    able = "|".join(stack.replace("#", r"\d+") for stack in stacks)
    return re.compile(rf"({able})_(\d+)(?:_|$)")


@lru_cache(maxsize=1 << 14)
def _in_stack(name: str) -> tuple[str, int] | None:
    """Return the stack that a layer is in, as a pattern, and the number of its block there."""
    found = _stack().match(name.replace(".", "_"))
    return (_NUMBER.sub("_#", found[1]), int(found[2])) if found else None


def fitting(places: Iterable[Place], layers: Iterable[Sized]) -> list[Place]:
    """Return the architectures of `places` that a file with these layers can be for, by its widths and its blocks.

    Where it has all blocks of some of them, those alone.
    """
    file = _Measured()
    for layer in layers:
        file.add(layer, pattern_of(layer.name))
    known, full = {place: _rows().get(place[0]) for place in places}, file.full
    toy = file.usual < _TOY
    able = {place: sizes for place, sizes in known.items() if toy or sizes is None or sizes.allow(file)}
    deep = [place for place, sizes in able.items() if sizes and sizes.is_as_deep(full)]
    return deep or [place for place, sizes in able.items() if toy or sizes is None or not sizes.is_deeper(full)]
