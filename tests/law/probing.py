"""Probes as a loader with a given scale would yield them, and what is said of them in short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from harness.law.diagnosis import Diagnosis
from harness.law.probe import Probe

SHAPES = ((10.5, 5), (2.75, 12), (6.0, 4), (0.625, 6), (6.0, 4), (33.0, 24), (3.5, 7))
Scale = Callable[[Probe], float]


def probes(
    scale: Scale,
    *,
    shapes: Sequence[tuple[float | None, int]] = SHAPES,
    strengths: Sequence[float] = (1.0, 0.5, -1.0, 2.0, 0.0, 1.75),
    names: Sequence[str] = (),
    **fields: object,
) -> list[Probe]:
    alphas, ranks = tuple(alpha for alpha, _ in shapes), tuple(rank for _, rank in shapes)
    found = []
    for strength in strengths:
        for i in range(len(shapes)):
            name = names[i] if names else f"m{i}"
            point = replace(Probe(name, strength, i, alphas, ranks, 0.0, 1e-6), **fields)
            found.append(replace(point, measured=scale(point)))
    return found


def said(found: Diagnosis) -> tuple[str | None, str | None, str | None]:
    return found.code, found.law and found.law.formula, found.trait and found.trait.text
