"""The factor that training put on B @ A, written once for everybody."""

from __future__ import annotations

import math

# Boundaries of the words, in times the trained effect; the pictures behind them are in the image tests.
_WORDS = (
    (0.01, "no effect"),
    (0.8, "weaker than trained"),
    (0.99, "slightly weaker than trained"),
    (1.01, "as trained"),
    (1.25, "slightly stronger than trained"),
    (8.0, "too strong: artifacts expected"),
)


def trained_scale(alpha: float | None, rank: int, *, rslora: bool = False) -> float:
    """Return alpha / rank, alpha / sqrt(rank) with `rslora`, or 1.0 without alpha or rank.

    Hu et al., 2021, section 4.1; rank-stabilised: Kalajdzievski, 2023. A rank of 0 is that of a whole difference.
    """
    if alpha is None or rank == 0:
        return 1.0
    return alpha / (math.sqrt(rank) if rslora else rank)


def word_of(factor: float) -> str:
    """Say what to expect of a picture made at `factor` times the trained strength."""
    if factor < 0:
        return "inverted"
    return next((word for limit, word in _WORDS if factor <= limit), "noise expected")
