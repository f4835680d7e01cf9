"""The planned probes behind `measure_law`: a few files whose ranks, alphas and strengths tell all laws apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.checks.trial import Cell
from harness.example import Example, Target
from harness.files import FORMATS

# Whatever module a file's key order puts first or last: first, last, most common, largest, smallest and mean should all
# differ, alphas have fractions on both sides of one half, and no rank equals its alpha.
_MIXED = ((5, 10.5), (12, 2.75), (4, 6.0), (6, 0.625), (4, 6.0), (24, 33.0), (7, 3.5))
_UNIFORM = (((16, 8.0), 1.0), ((8, 24.0), 1.0), ((3, 0.75), 1.0), ((1, 2.5), 1.0))
STRENGTHS = (1.0, 0.5, -1.0, 2.0, 0.0, 1.75)


def design(
    layers: Sequence[str],
    *,
    alpha: bool = True,
    uniform: bool = False,
    value_seed: int = 0,
    max_rank: int = 64,
    strengths: Sequence[float] = STRENGTHS,
) -> Iterator[Example]:
    """Yield the planned examples over `layers`.

    `alpha=False` writes none; `uniform=True` leaves out files with several ranks, for loaders that refuse them. Ranks
    above `max_rank` wrap around.
    """

    def example(shapes: Sequence[tuple[int, float]], strength: float, names: Sequence[str]) -> Example:
        pairs = zip(names, shapes, strict=False)
        targets = (Target(n, 1 + (rank - 1) % max_rank, a if alpha else None) for n, (rank, a) in pairs)
        return Example(tuple(targets), strength=strength, value_seed=value_seed)

    for strength in strengths:
        if not uniform:
            yield example([_MIXED[i % len(_MIXED)] for i in range(len(layers))], strength, layers)
    for shape, strength in _UNIFORM:
        yield example([shape] * len(layers), strength, layers)
    for strength in strengths[1:] if uniform else ():
        yield example([_UNIFORM[0][0]] * len(layers), strength, layers)


def has_alpha(cell: Cell) -> bool:
    """Tell whether a file of this cell can carry an alpha that means something."""
    return cell.variant.alpha and FORMATS[cell.format].alpha[0] != "none"


def planned(
    cell: Cell, layers: Sequence[str] | None = None, *, alpha: bool = True, uniform: bool = False
) -> Iterator[Example]:
    """Yield the planned examples of one cell, over `layers` (default: all its targets)."""
    variant = cell.variant
    limits = {"max_rank": variant.rank_limit(cell.view), "strengths": variant.strengths or STRENGTHS}
    yield from design(layers or cell.targets, alpha=alpha and has_alpha(cell), uniform=uniform, **limits)  # type: ignore[arg-type]
