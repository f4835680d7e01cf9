"""Changes made of a layer's own A and B put together otherwise: what is left out, and what has factors of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from harness.checks import likeness

GENERATOR = torch.Generator().manual_seed(3)
A, B = torch.randn(4, 24, generator=GENERATOR).double(), torch.randn(30, 4, generator=GENERATOR).double()
PRODUCT = B @ A


def without(rows: slice) -> Tensor:
    change = PRODUCT.clone()
    change[rows] = 0
    return 0.5 * change


@pytest.mark.parametrize(
    ("change", "left_out", "by_row"),
    [
        (without(slice(20, 30)), True, True),
        (without(slice(29, 30)), True, True),
        (torch.linspace(0.8, 1.2, 30)[:, None] * PRODUCT, False, True),
        (PRODUCT.flip(0), False, False),
        (PRODUCT + torch.randn(30, 24, generator=GENERATOR), False, False),
        (B[:, :3] @ A[:3], False, False),
    ],
)
@pytest.mark.parametrize("turned", [lambda x: x, lambda x: x.mT.contiguous().mT])
def test_rows_that_are_missing_or_weighted_are_told_apart(
    change: Tensor, left_out: bool, by_row: bool, turned: Callable[[Tensor], Tensor]
) -> None:
    assert likeness.left_out(turned(change), PRODUCT) is left_out
    assert likeness.by_row(turned(change), PRODUCT) is by_row


def test_rows_that_are_all_alike_tell_nothing() -> None:
    one = B[:, :1] @ A[:1]
    assert not likeness.by_row(one.flip(0), one)  # each is a multiple of any other
    assert not likeness.by_row(PRODUCT[:4] * torch.arange(4)[:, None], PRODUCT[:4])  # too few
