"""Hypothesis strategies for LoRA files: ranks, alphas, strengths and whole examples, simplest first."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, get_args

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from harness.example import DTYPES, Example, Patterns, Target

_COMMON_RANKS = (2, 1, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24, 31, 32, 48, 64)
_COMMON_ALPHAS = (1.0, 2.0, 3.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
_STRENGTHS = (1.0, 2.0, 0.5, 0.0, -1.0, -0.5, 1.5, -2.0, 0.25)


@cache  # Hypothesis looks through a strategy once, and then again for every new one
def ranks(*, max_rank: int = 64) -> SearchStrategy[int]:
    """Ranks 1 to `max_rank`: powers of two, odd ones, ones divisible by 3 and by 4; some up to half above it."""
    common = st.sampled_from([rank for rank in _COMMON_RANKS if rank <= max_rank] or [1])
    anything = st.integers(1, max_rank)
    return st.one_of(
        common, anything, common, st.one_of(anything, st.integers(max_rank + 1, max_rank + max_rank // 2 + 1))
    )


@cache
def alphas(rank: int, *, zero: bool = True, negative: bool = True) -> SearchStrategy[float]:
    """Alphas for `rank`: whole, fractional, below one, equal to the rank, zero and negative.

    Most are exact in bfloat16 (eight significant bits); the last ones need up to 13, so that rounding alpha shows. A
    file stores alpha in float32 or as text, whatever the dtype of its weights.
    """
    options = [
        st.sampled_from(_COMMON_ALPHAS),
        st.integers(1, 127).map(lambda n: n / 8),
        st.integers(1, 15).map(lambda n: n / 16),
        st.just(float(rank)),
        st.integers(129, 8191).map(lambda n: n / 64),
    ]
    if zero:
        options.append(st.sampled_from((0.0, 1.0)))
    if negative:
        options.append(st.integers(-64, -1).map(lambda n: n / 4))
    return st.one_of(options)


@cache
def strengths() -> SearchStrategy[float]:
    """Strengths from -2 to 2: one, the usual fractions, zero, negative ones, any multiple of 1/64 and of 1/1000."""
    return st.one_of(
        st.sampled_from(_STRENGTHS),
        st.integers(-128, 128).map(lambda n: n / 64),
        st.integers(-2000, 2000).map(lambda n: n / 1000),
    )


@st.composite
def examples(
    draw: Any,
    layers: Sequence[str],
    *,
    missing_alpha: bool = True,
    zero_alpha: bool = True,
    negative_alpha: bool = True,
    max_layers: int | None = None,
    dtypes: Sequence[str] = DTYPES,
    file_dtypes: Sequence[str] | None = None,
    alpha: bool = True,
    max_rank: int = 64,
    strength: SearchStrategy[float] | None = None,
    patterns: bool = False,
    uniform: Collection[str] = (),
) -> Example:
    """Draw one LoRA over a subset of `layers`, with how it is written and loaded.

    `missing_alpha`: some or all modules may carry no alpha (formats whose alpha is optional); without `alpha` none do.
    `strength` is drawn from `strengths()` unless another strategy is given. The model's dtype is one of `dtypes`, the
    file's any of them, or one of `file_dtypes`. With `patterns` its configuration names modules in different ways.
    What is `uniform`, rank or alpha, is the same in all modules.
    """
    count = min(max_layers or len(layers), len(layers))
    chosen = draw(st.lists(st.sampled_from(layers), min_size=1, max_size=count, unique=True))
    alike = draw(st.integers(0, 3)) == 3 or "rank" in uniform
    omit = draw(st.sampled_from(("none", "none", "none", "some", "all"))) if missing_alpha else "none"
    omit = omit if alpha else "all"

    def target(name: str, shape: tuple[int, float] | None) -> Target:
        rank, value = shape or draw(_shapes(max_rank, zero_alpha, negative_alpha))
        gone = omit == "all" or (omit == "some" and draw(st.booleans()))
        return Target(name, rank, None if gone else value)

    shared = draw(_shapes(max_rank, zero_alpha, negative_alpha)) if alike else None
    targets = tuple(target(name, shared) for name in sorted(chosen, key=list(layers).index))
    if "alpha" in uniform:
        targets = tuple(replace(each, alpha=targets[0].alpha) for each in targets)
    dtype = draw(st.sampled_from(dtypes))
    return Example(
        targets,
        strength=draw(strengths() if strength is None else strength),
        dtype=dtype,
        file_dtype=draw(st.sampled_from(_files(dtype, dtypes, file_dtypes))),
        key_seed=draw(st.sampled_from((0, 0, 1, 2, 3))),
        value_seed=draw(st.integers(0, 99)),
        patterns=draw(st.sampled_from(("names", *get_args(Patterns)))) if patterns else "names",
    )


def _files(dtype: str, dtypes: Sequence[str], file_dtypes: Sequence[str] | None) -> tuple[str, ...]:
    """Return the dtypes a file may have: single precision and the model's own come more often."""
    every = ("float32", dtype, *(file_dtypes or dtypes))
    return tuple(name for name in every if file_dtypes is None or name in file_dtypes)


@cache
@st.composite
def _shapes(draw: Any, max_rank: int, zero: bool, negative: bool) -> tuple[int, float]:
    rank = draw(ranks() if max_rank >= 64 else st.integers(1, max_rank))  # `ranks` goes somewhat above its maximum
    return rank, draw(alphas(rank, zero=zero, negative=negative))
