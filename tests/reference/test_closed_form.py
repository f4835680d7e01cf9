"""The closed form against sums written out by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from tests.closed_form import delta, merged_weight, product, scale

A = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, -1.0]])
B = torch.tensor([[2.0, 1.0], [0.0, 4.0]])
BA = torch.tensor([[2.0, 7.0, -1.0], [0.0, 12.0, -4.0]]).double()  # rows of B times columns of A
W = torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]])


@pytest.mark.parametrize(("alpha", "rank", "expected"), [(16.0, 32, 0.5), (8.0, 2, 4.0), (3.0, 16, 0.1875)])
def test_the_scale_is_alpha_over_rank(alpha: float, rank: int, expected: float) -> None:
    assert scale(alpha, rank) == expected
    assert scale(-alpha, rank) == -expected


@pytest.mark.parametrize(("alpha", "rank", "expected"), [(16.0, 4, 8.0), (8.0, 64, 1.0), (3.0, 2, 3 / math.sqrt(2))])
def test_the_rank_stabilised_scale_is_alpha_over_the_root_of_the_rank(alpha: float, rank: int, expected: float) -> None:
    assert scale(alpha, rank, rslora=True) == pytest.approx(expected, rel=1e-15)


def test_without_alpha_the_scale_is_one_and_an_alpha_of_zero_is_zero() -> None:
    assert scale(None, 8) == scale(None, 8, rslora=True) == 1.0
    assert scale(0.0, 8) == 0.0


def test_the_product_is_rows_of_b_times_columns_of_a() -> None:
    assert torch.equal(product(A, B), BA)


def test_half_precision_factors_are_multiplied_in_double_precision() -> None:
    a, b = torch.full((1, 1), 1 + 2.0**-7).bfloat16(), torch.full((1, 1), 1 + 2.0**-6).bfloat16()
    found = product(a, b)
    assert found.dtype == torch.float64
    assert float(found) == (1 + 2.0**-7) * (1 + 2.0**-6)  # 15 bits: bfloat16 has 8


def test_the_delta_has_the_strength_and_the_scale_of_its_rank() -> None:
    assert torch.equal(delta(A, B, 6.0), 3 * BA)  # rank 2
    assert torch.equal(delta(A, B, 6.0, strength=0.5), 1.5 * BA)
    assert torch.equal(delta(A, B, 6.0, strength=-2.0), -6 * BA)
    assert torch.equal(delta(A, B, None, strength=4.0), 4 * BA)
    assert torch.allclose(delta(A, B, 6.0, rslora=True), 6 / math.sqrt(2) * BA, rtol=1e-15)


def test_the_merged_weight_is_the_weight_plus_the_delta() -> None:
    assert torch.equal(merged_weight(W, A, B, 6.0), W.double() + 3 * BA)
    assert torch.equal(merged_weight(W, A, B, 6.0, strength=-0.5), W.double() - 1.5 * BA)
    assert torch.equal(merged_weight(W, A, B, None), W.double() + BA)
    assert torch.equal(merged_weight(W, A, B, 0.0), W.double())


def test_a_half_precision_weight_keeps_a_delta_below_its_own_rounding() -> None:
    found = merged_weight(W.bfloat16(), A * 2.0**-20, B, 2.0)
    assert found.dtype == torch.float64
    assert torch.equal(found - W.double(), 2.0**-20 * BA)


def test_strength_and_stabilisation_are_given_by_name() -> None:
    for call in (lambda: scale(4.0, 2, True), lambda: delta(A, B, 6.0, 0.5), lambda: merged_weight(W, A, B, 6.0, 0.5)):
        with pytest.raises(TypeError):
            call()


def test_torch_is_not_imported_before_there_is_a_tensor() -> None:
    code = "import sys, harness.reference.closed_form; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
