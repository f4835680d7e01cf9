"""What a cell is tried with: one pinned example, the planned probes that tell all laws apart, and random files."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, get_args

from hypothesis.strategies import SearchStrategy, sampled_from

from harness.checks.cell import Cell
from harness.errors import UserError
from harness.example import DTYPES, Example, Patterns, Target
from harness.files import FORMATS
from harness.loaders.protocol import CORE_BENCHES, CORE_VARIANTS, IMPLIED_BENCHES
from harness.strategies import examples as lora_examples

if TYPE_CHECKING:
    from harness.checks.known import KnownFailure

# Whatever module a file's key order puts first or last: first, last, most common, largest, smallest and mean should all
# differ, alphas have fractions on both sides of one half, and no rank equals its alpha.
_MIXED = (
    ((5, 10.5), (12, 33.0), (4, 6.0), (6, 0.625), (4, 2.75), (24, 6.0), (7, 3.5)),
    # another first, last, mean, ...; one rank with two alphas; alphas that half precision rounds
    ((10, 1.5), (3, 136.5625), (9, 4.2578125), (14, 20.0078125), (2, 1.5), (21, 0.875), (10, 7.5)),
)
_Shape = tuple[int, float | None]  # rank and alpha
_UNIFORM = ((16, 8.0), (8, 24.0), (3, 0.75), (1, 2.5))
_IMPLIED_SHARE = 0.05  # of the examples: names are tried there, nothing else
# -1 would hide a square; some take a small one for none, or bound it; half precision or two decimals round most
_STRENGTHS = (1.0, 0.5, -3.07, 0.0123, 0.0, 4.193)
_NEAR = (1.0, 0.5, -0.6, 0.0123, 0.0, 1.703)
_AFTER_LOADS = 15  # trials of what follows a load, of a loader that declares nothing else
_STYLES: tuple[Patterns, ...] = get_args(Patterns)
# (model, file): every pair but float32 in float32, which the other examples are; those that are met most come first
_DTYPES = (
    ("float16", "float16"),
    ("float32", "bfloat16"),
    ("bfloat16", "float32"),
    ("float32", "float16"),
    ("bfloat16", "bfloat16"),
    ("float16", "float32"),
    ("float16", "bfloat16"),
    ("bfloat16", "float16"),
)


@dataclass(frozen=True)
class Pins:
    """One example fixed from outside: `modules` by name, or `rank` and `alpha` for every target of a cell.

    Where nobody says, alpha and the dtypes are those of the plain example: no alpha where files of the cell cannot
    carry one.
    """

    modules: tuple[Target, ...] = ()
    rank: int = 4
    alpha: float | None = None
    strength: float = 1.0
    dtype: str | None = None
    file_dtype: str | None = None
    key_seed: int = 0
    value_seed: int = 0
    patterns: Patterns = "names"

    def example(self, cell: Cell) -> Example:
        """Return the example in `cell`.

        Raises:
            UserError: a module the cell's bench does not have, or that is named twice, or another dtype than it has.
        """
        for name, number in Counter(target.name for target in self.modules).items():
            if number > 1:
                raise UserError(f"module={name!r} is named {number} times")
        for target in self.modules:
            if target.name not in cell.view.layers:
                near = ", ".join(cell.targets[:3])
                raise UserError(
                    f"module={target.name!r}: bench {cell.bench_name} has no such layer (it has {near}, ...)"
                )
        alpha = _plain_alpha(cell) if self.alpha is None else self.alpha
        targets = self.modules or tuple(Target(name, self.rank, alpha) for name in cell.targets)
        dtype = self.dtype or cell.dtypes[0]
        if dtype not in cell.dtypes:
            raise UserError(f"dtype={dtype}: {cell.place} is checked in {', '.join(cell.dtypes)}")
        if self.file_dtype and self.file_dtype not in cell.file_dtypes:
            raise UserError(f"file-dtype={self.file_dtype}: this loader takes {', '.join(cell.file_dtypes)}")
        file_dtype = self.file_dtype or (dtype if dtype in cell.file_dtypes else cell.file_dtypes[0])
        return Example(targets, self.strength, dtype, file_dtype, self.key_seed, self.value_seed, self.patterns)


@dataclass(frozen=True)
class Plan:
    """How hard to look: examples per cell, the seed, one pinned example instead of a search, what is known to fail.

    `max_examples=None` stands for what the subject has by default, less of it when `quick`.
    `share` is the part of the examples that a cell gets which is not plain LoRA on one of the core benches; below 1 its
    planned files have at most `max_layers` modules too, as always on an implied bench.
    """

    max_examples: int | None = None
    seed: int = 0
    pins: Pins | None = None
    known: tuple[KnownFailure, ...] = ()
    max_layers: int = 8
    dtypes: tuple[str, ...] = DTYPES
    shrink: bool = True
    share: float = 1.0
    quick: bool = False

    def whole(self, cell: Cell) -> bool:
        """Whether `cell` is checked at full length."""
        if cell.bench_name in IMPLIED_BENCHES:
            return False
        return self.share == 1 or (cell.variant_name in CORE_VARIANTS and cell.bench_name in CORE_BENCHES)

    def examples_in(self, cell: Cell) -> int:
        """Return how many random examples `cell` gets."""
        most = self.max_examples or cell.subject.defaults.examples_in(quick=self.quick)
        share = min(self.share, _IMPLIED_SHARE) if cell.bench_name in IMPLIED_BENCHES else self.share
        return most if self.whole(cell) else max(1, round(share * most))

    def loads_in(self, cell: Cell) -> int:
        """Return about how many files a loader that is right gets in `cell`."""
        if self.pins:
            return _AFTER_LOADS + 1
        return sum(1 for _ in planned(cell, self.layers_in(cell))) + self.examples_in(cell) + _AFTER_LOADS

    def layers_in(self, cell: Cell) -> tuple[str, ...]:
        """Return the layers that planned files cover: all, or an even choice of `max_layers` of them."""
        if self.whole(cell) or len(cell.targets) <= self.max_layers:
            return cell.targets
        step = (len(cell.targets) - 1) / (self.max_layers - 1)
        chosen = [cell.targets[round(step * i)] for i in range(self.max_layers)]
        return tuple(dict.fromkeys([*_alike(cell.targets), *chosen]))[: self.max_layers]


def _alike(names: Sequence[str]) -> tuple[str, ...]:
    """Return two layers of which one's block begins as the other's number does, as 1 and 10: a prefix takes both."""
    known = set(names)
    pairs = ((name, longer) for name in names if (longer := re.sub(r"\.1\.", ".10.", name, count=1)) != name)
    return next((pair for pair in pairs if pair[1] in known), ())


def examples_for(cell: Cell, plan: Plan) -> SearchStrategy[Example]:
    """Return the random examples of the cell."""
    variant, dtypes = cell.variant, plan.dtypes if cell.subject.outputs is None else ("float32",)
    return lora_examples(
        cell.targets,
        missing_alpha=FORMATS[cell.format].alpha[0] in ("tensor", "header"),
        alpha=cell.has_alpha,
        max_layers=plan.max_layers if cell.subject.outputs is None else 1,
        dtypes=tuple(dtype for dtype in dtypes if dtype in cell.dtypes) or cell.dtypes[:1],
        file_dtypes=tuple(dtype for dtype in dtypes if dtype in cell.file_dtypes) or cell.file_dtypes[:1],
        max_rank=variant.rank_limit(cell.view),
        strength=sampled_from(cell.strengths) if cell.strengths else None,
        patterns=cell.has_patterns,
        uniform=cell.uniform,
    )


def smoke_example(cell: Cell, layers: Sequence[str]) -> Example:
    """Return the plain example over `layers`: rank 4, alpha 8, strength 1, a model of the first dtype that it takes."""
    rank = min(4, cell.variant.rank_limit(cell.view))
    layers = layers if cell.subject.outputs is None else layers[:1]
    targets = tuple(Target(name, rank, _plain_alpha(cell)) for name in layers)
    return Example(targets, dtype=cell.dtypes[0], file_dtype=cell.file_dtypes[0])


def _plain_alpha(cell: Cell) -> float | None:
    return 8.0 if cell.has_alpha else None


def planned(
    cell: Cell, layers: Sequence[str] | None = None, *, alpha: bool = True, uniform: bool = False
) -> Iterator[Example]:
    """Yield the planned examples of one cell, over `layers` (default: all its targets), each with values of its own.

    `alpha=False` writes none; `uniform=True` leaves out files with several ranks, for loaders that refuse them. Ranks
    above the variant's limit wrap around.
    """
    plan = _one_by_one if cell.subject.outputs else _planned
    drawn = plan(cell, layers, alpha=alpha, uniform=uniform)
    return (replace(example, value_seed=number) for number, example in enumerate(drawn))


def _planned(cell: Cell, layers: Sequence[str] | None, *, alpha: bool, uniform: bool) -> Iterator[Example]:
    names, most = layers or cell.targets, cell.variant.rank_limit(cell.view)
    strengths, alpha = cell.strengths or _strengths(cell), alpha and cell.has_alpha
    uniform = uniform or "rank" in cell.uniform

    def example(shapes: Sequence[_Shape], strength: float) -> Example:
        one = shapes[0][1] if "alpha" in cell.uniform else None
        pairs = ((name, (rank, one or a)) for name, (rank, a) in zip(names, itertools.cycle(shapes), strict=False))
        targets = (Target(n, 1 + (rank - 1) % most, a if alpha else None) for n, (rank, a) in pairs)
        return Example(tuple(targets), strength, cell.dtypes[0], cell.file_dtypes[0])

    yield from () if uniform else _mixed(cell, strengths, example)
    yield from (example([shape], 1.0) for shape in _UNIFORM)
    yield from (example([_UNIFORM[0]], strength) for strength in strengths[1:] if uniform)
    shapes = [_UNIFORM[1:2], _UNIFORM[:1]] if uniform else _MIXED
    for (dtype, file_dtype), drawn in zip(_DTYPES, itertools.cycle(shapes), strict=False):
        if dtype in cell.dtypes and file_dtype in cell.file_dtypes:
            yield replace(example(drawn, 1.0), dtype=dtype, file_dtype=file_dtype)
    if alpha and cell.zero_alpha_is_ambiguous:
        yield example([(_UNIFORM[0][0], 0.0)], 1.0)
        yield from () if uniform or cell.uniform else (example([(6, 4.5), (10, None), (3, 8.0)], 1.0),)


def _strengths(cell: Cell) -> tuple[float, ...]:
    """Return the strengths to try; a sum far larger than the weight has codes far coarser than the weight's own."""
    coded = cell.subject.declaration.quantises or any(cell.view.layers[name].codes for name in cell.targets)
    return _NEAR if coded else _STRENGTHS


def _one_by_one(cell: Cell, layers: Sequence[str] | None, *, alpha: bool, uniform: bool) -> Iterator[Example]:
    """Yield the planned examples that show in outputs: in float32, with one module each, every layer in its turn."""
    names = itertools.cycle(layers or cell.targets)
    one = tuple(_planned(cell, (cell.targets[0],), alpha=alpha, uniform=uniform))
    plain = [example for example in one if example.dtype == example.file_dtype == "float32"]
    if alpha and cell.has_alpha and not cell.zero_alpha_is_ambiguous:  # readers differ here too, and it shows
        plain.append(replace(plain[0], targets=(Target(cell.targets[0], 4, 0.0),)))
    for example, name in zip(plain, names, strict=False):
        yield replace(example, targets=(replace(example.targets[0], name=name),))


def _mixed(
    cell: Cell, strengths: Sequence[float], example: Callable[[Sequence[_Shape], float], Example]
) -> Iterator[Example]:
    for shapes, strength, style in zip(itertools.cycle(_MIXED), strengths, itertools.cycle(_STYLES), strict=False):
        yield replace(example(shapes, strength), patterns=style if cell.has_patterns else "names")
