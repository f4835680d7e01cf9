"""The energies of a LoRA as maps: a column per block, a row per kind of layer, colour by the size of the update.

Drawn as plain shapes and not with matplotlib, so that each tile names its module and `inspect` needs no plotting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from harness.verdict.blocks import OUTSIDE, group_of, in_order, place_of
from harness.verdict.file_record import ModuleEnergy

_ROW = 15  # all sizes in pixels
_WIDEST, _NARROWEST = 24, 5
_ROOM = 820
_GROUP_GAP = 8
_LETTER = 6.6
_TICK_ROOM = 20
_LONGEST_LABEL = 40
_LANE = 13
_MOST_LANES = 3
_MOST_TILES = 4000
_MOST_ROWS = 120
_MOST_COLUMNS = 150
_FAINTEST = 0.07

Cells = dict[str, dict[str, str]]  # innermost block -> kind of layer -> module


@dataclass(frozen=True)
class ModuleTile:
    """One module: its place, how full of colour (None: nothing known), its look beside that, and what it says."""

    x: float
    y: int
    opacity: float | None
    look: str
    title: str


@dataclass(frozen=True)
class Label:
    """Text at a place."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class EnergyMap:
    """Blocks that have kinds of layers in common, side by side: `cells` by block, `groups` of blocks by their name."""

    groups: Mapping[str, Sequence[str]]
    cells: Cells
    energies: Mapping[str, ModuleEnergy]
    most: float
    row: ClassVar[int] = _ROW

    @cached_property
    def kinds(self) -> list[str]:
        """The rows."""
        return sorted({kind for row in self.cells.values() for kind in row}, key=in_order)

    @cached_property
    def step(self) -> int:
        """The width of a column."""
        return max(_NARROWEST, min(_WIDEST, _ROOM // max(len(self.cells), 1)))

    @cached_property
    def left(self) -> float:
        """Where the first column begins, right of the names of the rows."""
        return 14 + _LETTER * max(len(_cut(kind)) for kind in self.kinds)

    @cached_property
    def columns(self) -> dict[str, float]:
        """Each block's x."""
        found, x = {}, self.left
        for blocks in self.groups.values():
            for block in blocks:
                found[block] = x
                x += self.step
            x += _GROUP_GAP
        return found

    @cached_property
    def tiles(self) -> list[ModuleTile]:
        """Every module."""
        rows = {kind: index * _ROW for index, kind in enumerate(self.kinds)}
        return [
            self._tile(name, self.columns[block], rows[kind])
            for block, row in self.cells.items()
            for kind, name in row.items()
        ]

    def _tile(self, name: str, x: float, y: int) -> ModuleTile:
        energy = self.energies[name]
        value, relative = energy.norm if energy.relative is None else energy.relative, energy.relative is not None
        if not energy.finite:
            return ModuleTile(x, y, None, "broken", f"{name}: NaN or infinite weights")
        if not relative and any(other.relative is not None for other in self.energies.values()):
            return ModuleTile(x, y, None, "unknown", f"{name}: no such weight in the base")
        if value == 0:
            return ModuleTile(x, y, None, "zero", f"{name}: 0, changes nothing")
        share = value / self.most if self.most else 0.0
        return ModuleTile(x, y, round(_FAINTEST + (1 - _FAINTEST) * share, 3), "", f"{name}: {value:.3g}")

    @cached_property
    def row_labels(self) -> list[Label]:
        """The kinds of layers, right-aligned at `left`."""
        return [Label(self.left - 6, index * _ROW + 11, _cut(kind)) for index, kind in enumerate(self.kinds)]

    @cached_property
    def ticks(self) -> list[Label]:
        """Block numbers below groups in which every block has one number."""
        every = -(-_TICK_ROOM // self.step)
        found = []
        for blocks in self.groups.values():
            numbers = [group_of(block)[1] for block in blocks]
            shown = [(b, n) for i, (b, n) in enumerate(zip(blocks, numbers, strict=True)) if n and i % every == 0]
            if all(number.isdecimal() or not number for number in numbers):
                found += [Label(self.columns[b] + self.step / 2, self.foot + 11, n) for b, n in shown]
        return found

    @cached_property
    def group_labels(self) -> list[Label]:
        """The names of the groups, in as many lines as keep them apart; what still collides is left out."""
        ends, found = [0.0] * _MOST_LANES, []
        top = self.foot + (24 if self.ticks else 12)
        for group, blocks in self.groups.items():
            x, text = self.columns[blocks[0]], _cut(group)
            lane = next((lane for lane, end in enumerate(ends) if end <= x), None)
            if lane is not None:
                ends[lane] = x + _LETTER * len(text) + 10
                found.append(Label(x, top + lane * _LANE, text))
        return found

    @property
    def foot(self) -> int:
        """Where the rows end."""
        return len(self.kinds) * _ROW

    @cached_property
    def width(self) -> float:
        """The width of the drawing."""
        last = max(self.columns.values()) + self.step
        return round(max(last, *(label.x + _LETTER * len(label.text) for label in self.group_labels)) + 4, 1)

    @cached_property
    def height(self) -> float:
        """The height of the drawing."""
        return max(label.y for label in self.group_labels) + 6


def energy_maps(energies: Mapping[str, ModuleEnergy]) -> list[EnergyMap]:
    """Return the maps of a file, none when there is nothing to draw or too much of it."""
    most = max(_shown(energies), default=0.0)
    maps = [_map(cells, energies, most) for cells in _alike(_cells(energies))] if len(energies) <= _MOST_TILES else []
    drawable = all(len(one.kinds) <= _MOST_ROWS and len(one.cells) <= _MOST_COLUMNS for one in maps)
    return maps if drawable else []


def _shown(energies: Mapping[str, ModuleEnergy]) -> list[float]:
    """Return ||ΔW|| / ||W|| of the modules whose base is known, ||ΔW|| of all of them without a base."""
    relative = [energy.relative for energy in energies.values() if energy.relative is not None]
    return relative or [energy.norm for energy in energies.values() if energy.finite]


def _cells(energies: Mapping[str, ModuleEnergy]) -> Cells:
    cells: Cells = {}
    for name in energies:
        block, kind = place_of(name)
        cells.setdefault(block, {})[kind] = name
    return {block: cells[block] for block in sorted(cells, key=in_order)}


def _alike(cells: Cells) -> list[Cells]:
    """Put blocks together whose kinds of layers are mostly the same, and those outside of blocks on their own."""
    found: list[tuple[set[str], Cells]] = []
    for block, row in cells.items():
        fits = (entry for entry in found if 2 * len(entry[0] & set(row)) >= min(len(entry[0]), len(row)))
        home = next(fits, None) if block != OUTSIDE else None
        if home is None:
            found.append((set(row), {block: row}))
        else:
            home[0].update(row)
            home[1][block] = row
    return [cells for _, cells in found]


def _map(cells: Cells, energies: Mapping[str, ModuleEnergy], most: float) -> EnergyMap:
    groups: dict[str, list[str]] = {}
    for block in cells:
        groups.setdefault(group_of(block)[0], []).append(block)
    return EnergyMap(groups, {block: cells[block] for row in groups.values() for block in row}, energies, most)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_LABEL else text[: _LONGEST_LABEL - 1] + "…"
