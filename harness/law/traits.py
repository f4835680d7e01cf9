"""Traits of a probe: the conditions under which a loader may be wrong while it is right everywhere else."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.law.probe import Probe

Input = Literal["alpha", "strength"]
_Value = Callable[[Probe], "float | None"]
About = Literal["alpha", "strength", "rank", "dtype", "file", "place", "layer", "part", "small"]


@dataclass(frozen=True)
class Trait:
    """A condition in words, and what it is about: a value of alpha, the strength, the module's place in the file, ...

    `part` is said of traits that no single probe has: a set of modules, a value that decides.
    """

    text: str
    about: About
    holds: Callable[[Probe], bool] = lambda probe: False

    def __call__(self, probe: Probe) -> bool:
        """Tell whether `probe` has the trait."""
        return self.holds(probe)

    def __str__(self) -> str:
        """Return the condition in words."""
        return self.text


_TABLE = (
    Trait("bfloat16", "dtype", lambda p: p.dtype == "bfloat16"),
    Trait("float16", "dtype", lambda p: p.dtype == "float16"),
    Trait("half precision", "dtype", lambda p: p.dtype != "float32"),
    Trait("bfloat16 file", "dtype", lambda p: p.file_dtype == "bfloat16"),
    Trait("float16 file", "dtype", lambda p: p.file_dtype == "float16"),
    Trait("half-precision file", "dtype", lambda p: p.file_dtype != "float32"),
    Trait(
        "half-precision file in a float32 model",
        "dtype",
        lambda p: p.file_dtype != "float32" and p.dtype == "float32",
    ),
    Trait("file in another dtype than the model", "dtype", lambda p: p.file_dtype != p.dtype),
    Trait("negative alpha", "alpha", lambda p: (p.alpha or 0) < 0),
    Trait("alpha = 0", "alpha", lambda p: p.alpha == 0),
    Trait("no alpha in the file", "file", lambda p: all(alpha is None for alpha in p.alphas)),
    Trait(
        "no alpha for this module while others have one",
        "file",
        lambda p: p.alpha is None and any(a is not None for a in p.alphas),
    ),
    Trait("no alpha for this module", "file", lambda p: p.alpha is None),
    Trait("fractional alpha", "alpha", lambda p: p.alpha is not None and p.alpha != int(p.alpha)),
    Trait("0 < alpha < 1", "alpha", lambda p: p.alpha is not None and 0 < p.alpha < 1),
    Trait("alpha > rank", "alpha", lambda p: (p.alpha or 0) > p.rank),
    Trait("alpha < rank", "alpha", lambda p: p.alpha is not None and p.alpha < p.rank),
    Trait("rank = 1", "rank", lambda p: p.rank == 1),
    Trait("rank > 64", "rank", lambda p: p.rank > 64),
    Trait("rank > 32", "rank", lambda p: p.rank > 32),
    Trait("odd rank", "rank", lambda p: p.rank % 2 == 1),
    Trait("rank divisible by 3", "rank", lambda p: p.rank % 3 == 0),
    Trait("rank divisible by 4", "rank", lambda p: p.rank % 4 == 0),
    Trait("several ranks in the file", "file", lambda p: len(set(p.ranks)) > 1),
    Trait("several alphas in the file", "file", lambda p: len(set(p.alphas)) > 1),
    Trait("one module in the file", "file", lambda p: len(p.ranks) == 1),
    Trait("first module of the file", "place", lambda p: p.index == 0),
    Trait("last module of the file", "place", lambda p: p.index == len(p.ranks) - 1),
    Trait("every second module of the file (1st, 3rd, ...)", "place", lambda p: p.index % 2 == 0),
    Trait("every second module of the file (2nd, 4th, ...)", "place", lambda p: p.index % 2 == 1),
    Trait("square module", "layer", lambda p: p.square),
    Trait("rectangular module", "layer", lambda p: not p.square),
    Trait("merged q/k/v", "layer", lambda p: p.fused),
    Trait("strength = 0", "strength", lambda p: p.strength == 0),
    Trait("negative strength", "strength", lambda p: p.strength < 0),
    Trait("strength > 1", "strength", lambda p: p.strength > 1),
    Trait("strength other than 1", "strength", lambda p: p.strength != 1),
    Trait("fractional strength", "strength", lambda p: p.strength != int(p.strength)),
    Trait("patterns that are ends of names", "file", lambda p: p.patterns == "tails"),
    Trait("patterns that are regular expressions", "file", lambda p: p.patterns == "regex"),
    Trait("patterns that are not whole names", "file", lambda p: p.patterns != "names"),
    Trait("keys permuted", "file", lambda p: p.permuted),
    Trait("rank > 8 that 8 does not divide", "rank", lambda p: p.rank > 8 and p.rank % 8 != 0),
    Trait("rank that 8 does not divide", "rank", lambda p: p.rank % 8 != 0),
)
TRAITS: Mapping[str, Trait] = {trait.text: trait for trait in _TABLE}

_VALUES, _AGAIN = 3, 2  # wrong values, and how often each must have been met, before it is said to decide
_FINE = 1e-3
_LACKING = "a module of the file has no alpha, and others have that of another"
_BORROWED = 6  # wrong scales that are those of other modules by chance are fewer


def common_trait(wrong: Sequence[Probe], right: Sequence[Probe]) -> Trait | None:
    """Return the trait that every wrong probe has and no right one, or None."""
    if not wrong or not right:
        return None
    return next((t for t in TRAITS.values() if all(map(t, wrong)) and not any(map(t, right))), None)


def one_input_decides(name: Input, wrong: Sequence[Probe], right: Sequence[Probe]) -> Trait | None:
    """Return a trait when a value of `alpha` or `strength` is always wrong or always right, whatever else differs.

    It must have been met with several others: three wrong values, and three right ones, twice each. A scale that is
    right only within a coarse tolerance says nothing. A missing alpha is a value of its own, or else that of the rank.
    """
    fine = [p for p in right if p.tolerance <= _FINE * abs(p.expected)]
    if two := _either(name, wrong, fine):
        return two
    readings: tuple[_Value, ...] = (lambda p: getattr(p, name), lambda p: float(p.rank) if p.alpha is None else p.alpha)
    found = (_decides(name, value, wrong, fine) for value in (readings if name == "alpha" else readings[:1]))
    return next(filter(None, found), None)


def _either(name: Input, wrong: Sequence[Probe], right: Sequence[Probe]) -> Trait | None:
    """Return a trait of an input that every wrong probe has, or two of which each has one; no right one has either."""
    if len(wrong) < _BORROWED or not right:
        return None
    able = [t for t in _TABLE if t.about == name and any(map(t, wrong)) and not any(map(t, right))]
    two = next((two for two in itertools.combinations(able, 2) if all(two[0](p) or two[1](p) for p in wrong)), None)
    alone = next((t for t in able if all(map(t, wrong))), None)
    return alone or (Trait(" or ".join(map(str, two)), name) if two else None)


def _decides(name: Input, value: _Value, wrong: Sequence[Probe], right: Sequence[Probe]) -> Trait | None:
    bad, good = (Counter(value(p) for p in {_inputs(p): p for p in part}.values()) for part in (wrong, right))
    if bad.keys() & good.keys():
        return None
    often = [[each for each, count in values.most_common() if count >= _AGAIN] for values in (bad, good)]
    if min(map(len, often)) < _VALUES:
        return None
    wrongly, rightly = (", ".join("none" if v is None else f"{v:g}" for v in values[:_VALUES]) for values in often)
    return Trait(f"{name} is one of certain values ({wrongly}, ..., not {rightly}, ...)", name)


def borrowed(wrong: Sequence[Probe], every: Sequence[Probe] = ()) -> Trait | None:
    """Return a trait when every wrong scale is the one that another module's alpha, or rank, or both would give.

    Or that which the module itself had, with the same rank, in a file before: `every` are all probes as they came.
    """
    if len(wrong) < _BORROWED:
        return None
    for name, scales in (("alpha", _with_alphas), ("rank", _with_ranks), ("alpha / rank", _with_both)):
        if all(any(_near(p, scale) for scale in scales(p)) for p in wrong):
            lacking = name == "alpha" and _only_where_one_lacks_alpha(wrong, every)
            return Trait(_LACKING if lacking else f"two modules of a file differ in {name}", "part")
    if all(any(_near(p, scale) for scale in _before(p, every)) for p in wrong):
        return Trait("a file loaded before has another alpha for the module", "part")
    return None


def _only_where_one_lacks_alpha(wrong: Sequence[Probe], every: Sequence[Probe]) -> bool:
    """Whether some module of each file that is wrong has no alpha, and files with several alphas are right."""
    whole = (p for p in every if None not in p.alphas and len(set(p.alphas)) > 1)
    return all(None in p.alphas for p in wrong) and next(whole, None) is not None


def kept_by_rank(wrong: Sequence[Probe]) -> Trait | None:
    """Return a trait when every wrong scale has the alpha of the first, or last, module of the same rank."""
    if len(wrong) < _BORROWED:
        return None
    for place, word in ((-1, "last"), (0, "first")):
        if all(_near(p, p.scale_of(_of_same_rank(p, place), p.rank)) for p in wrong):
            return Trait(f"modules of one rank differ in alpha, of which that of the {word} module is kept", "part")
    return None


def _near(probe: Probe, scale: float) -> bool:
    return abs(probe.measured - scale) <= probe.tolerance


def _of_same_rank(probe: Probe, place: int) -> float | None:
    """Return alpha of the first or last module of the file that has this module's rank."""
    return [a for a, r in zip(probe.alphas, probe.ranks, strict=True) if r == probe.rank][place]


def _with_alphas(probe: Probe) -> Iterator[float]:
    """Yield the scale with every alpha of the file; a missing one stands for scale 1, or for its module's rank."""
    for alpha, rank in zip(probe.alphas, probe.ranks, strict=True):
        yield probe.scale_of(alpha, probe.rank)
        if alpha is None:
            yield probe.scale_of(float(rank), probe.rank)


def _with_ranks(probe: Probe) -> Iterator[float]:
    """Yield the scale with every rank of the file; a missing alpha stands for scale 1, or for the module's own rank."""
    for rank in probe.ranks:
        yield probe.scale_of(probe.alpha, rank)
        if probe.alpha is None:
            yield probe.scale_of(float(probe.rank), rank)


def _with_both(probe: Probe) -> Iterator[float]:
    return (probe.scale_of(alpha, rank) for alpha, rank in zip(probe.alphas, probe.ranks, strict=True))


def _before(probe: Probe, every: Sequence[Probe]) -> Iterator[float]:
    earlier = itertools.takewhile(lambda other: other is not probe, every)
    same = {p.alpha for p in earlier if (p.module, p.rank) == (probe.module, probe.rank)}
    return (probe.scale_of(alpha, probe.rank) for alpha in same)


def _inputs(probe: Probe) -> tuple[float | None, int, float]:
    return probe.alpha, probe.rank, probe.strength
