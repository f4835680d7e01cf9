"""What the name of a module says: its block, its kind of layer; and the energies of a LoRA by block."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from harness.verdict.file_record import ModuleEnergy

OUTSIDE = "outside of blocks"
_FIRST = re.compile(r"^.*?[._]\d+(?=[._]|$)")
_NUMBERED = re.compile(
    r"(?:blocks?|layers?|attentions|resnets|samplers|transformer|single|double|\bh)[._]\d+(?=[._]|$)"
)
_DIGITS = re.compile(r"(\d+)")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class BlockEnergy:
    """The update of one block: `norm` is ||ΔW|| of its modules together, `relative` that over their ||W||.

    `energy` is `relative` where a base was given, None for a block that it lacks, else `norm`. `spectral` is the
    largest singular value among them, `effective_rank` the mean over those that change anything; `broken` counts the
    modules with NaN or infinite weights, which the other numbers leave out.
    """

    name: str
    modules: int
    energy: float | None
    norm: float
    relative: float | None
    spectral: float
    effective_rank: float
    broken: int = 0


def block_of(name: str) -> str:
    """Return the outermost numbered part of a module name, `outside of blocks` when it has none."""
    found = _FIRST.match(name)
    return found.group() if found else OUTSIDE


def place_of(name: str) -> tuple[str, str]:
    """Return (innermost block, kind of layer in it): `transformer_blocks.7` and `attn.to_out.0`."""
    *_, found = (_FIRST.match(name), *_NUMBERED.finditer(name))
    if found is None:
        return OUTSIDE, name
    return name[: found.end()], name[found.end() + 1 :] or "whole"


def group_of(block: str) -> tuple[str, str]:
    """Return (the name that a block shares with its neighbours, the rest): `transformer_blocks` and `7`.

    Blocks nested in `down_blocks.1` share that name; the rest is empty for what lies outside of blocks.
    """
    outer = block_of(block)
    group = outer.rstrip("0123456789").rstrip("._") or outer if outer == block else outer
    return group, block.removeprefix(group).strip("._")


def family_of(name: str) -> str:
    """Return a module name with its block number written N (only the first number: `to_out.0` keeps its own)."""
    return _NUMBER.sub("N", name, count=1)


def by_block(energies: Mapping[str, ModuleEnergy]) -> list[BlockEnergy]:
    """Return the blocks in the order of their numbers, what lies outside of blocks last."""
    groups: dict[str, list[ModuleEnergy]] = {}
    for name, energy in energies.items():
        groups.setdefault(block_of(name), []).append(energy)
    against_base = any(energy.relative is not None for energy in energies.values())
    return [_block(name, groups[name], against_base) for name in sorted(groups, key=in_order)]


def in_order(name: str) -> tuple[bool, tuple[tuple[int, str], ...]]:
    """Return a sort key in which 10 follows 9."""
    parts = _DIGITS.split(name[:400])
    return name == OUTSIDE, tuple((int(part[:18]), part) if part.isdecimal() else (-1, part) for part in parts)


def _block(name: str, modules: list[ModuleEnergy], against_base: bool) -> BlockEnergy:
    finite = [module for module in modules if module.finite]
    norm, relative = norm_of(module.norm for module in finite), _relative(finite)
    live = [module.effective_rank for module in finite if module.norm > 0]
    return BlockEnergy(
        name=name,
        modules=len(modules),
        energy=relative if against_base else norm,
        norm=norm,
        relative=relative,
        spectral=max((module.spectral for module in finite), default=0.0),
        effective_rank=sum(live) / len(live) if live else 0.0,
        broken=len(modules) - len(finite),
    )


def _relative(modules: list[ModuleEnergy]) -> float | None:
    """Return ||ΔW|| / ||W|| over the modules whose base weight is known; those without an update do not tell theirs."""
    known = [(module.norm, module.relative) for module in modules if module.relative is not None]
    base = norm_of(norm / relative for norm, relative in known if relative)
    if not known:
        return None
    return norm_of(norm for norm, _ in known) / base if base else 0.0


def norm_of(values: Iterable[float]) -> float:
    """Return the root of the sum of squares."""
    return math.sqrt(math.fsum(value * value for value in values))
