"""What a fixture loader says of itself: in which way it is wrong, and by which code the checks must name that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from harness.selftest.parts import Change, Delta, Factor, Weight, adds, becomes, changed_by, scaled_by

_ATTRIBUTE = "__fault__"
F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True)
class Fault:
    """`codes`: the right names, the best first. `format`, `bench`, `variant`: a cell in which the fault shows.

    `seconds` is the time limit of one call, for loaders that hang.
    """

    codes: tuple[str, ...]
    what: str
    format: str = "kohya"
    bench: str = "qwen-image-fused"
    variant: str = "lora"
    seconds: float | None = None


def wrong(*codes: str, what: str, **where: Any) -> Callable[[F], F]:
    """Declare the decorated loader to be wrong: `codes` that name it, `what` it does, and where it shows."""

    def declare(function: F) -> F:
        setattr(function, _ATTRIBUTE, Fault(codes, what, **where))
        return function

    return declare


def wrong_scale(*codes: str, what: str, factor: Factor, **where: Any) -> Callable[..., None]:
    """Return a loader that multiplies B @ A by factor(part, strength), which is wrong."""
    return wrong(*codes, what=what, **where)(scaled_by(factor))


def wrong_delta(*codes: str, what: str, change: Change, **where: Any) -> Callable[..., None]:
    """Return a loader that adds change(part, right delta, strength), which is wrong."""
    return wrong(*codes, what=what, **where)(changed_by(change))


def wrong_sum(*codes: str, what: str, delta: Delta, **where: Any) -> Callable[..., None]:
    """Return a loader that adds strength * delta(part), which is wrong."""
    return wrong(*codes, what=what, **where)(adds(delta))


def wrong_weight(*codes: str, what: str, weight: Weight, **where: Any) -> Callable[..., None]:
    """Return a loader that makes weight(part, W) of every weight W, which is wrong."""
    return wrong(*codes, what=what, **where)(becomes(weight))


def fault_of(function: Callable[..., object]) -> Fault | None:
    """Return what `function` was declared to do wrong, or None."""
    found = getattr(function, _ATTRIBUTE, None)
    return found if isinstance(found, Fault) else None
