"""Every product gives the rows, columns and sums of the matrix it stands for, which only the tests form whole."""

from __future__ import annotations

import pytest
import torch

from harness.doctor.verify.products import Experts, Hadamard, Kronecker, LowRank, Product, Whole, sums_by_chunk
from harness.doctor.verify.rows import Rounding

torch.manual_seed(0)
PAIRS = [(torch.randn(12, 3), torch.randn(3, 20)) for _ in range(2)]
SMALL, LARGE = torch.randn(3, 4), torch.randn(4, 5)
DENSE = [left @ right for left, right in PAIRS]
PRODUCTS: list[tuple[Product, torch.Tensor]] = [
    (LowRank(*PAIRS[0]), DENSE[0]),
    (Whole(DENSE[0]), DENSE[0]),
    (Hadamard(LowRank(*PAIRS[0]), LowRank(*PAIRS[1])), DENSE[0] * DENSE[1]),
    (Kronecker(Whole(SMALL), Whole(LARGE)), torch.kron(SMALL, LARGE)),
]
each_product = pytest.mark.parametrize(
    ("product", "dense"), PRODUCTS, ids=[type(product).__name__ for product, _ in PRODUCTS]
)


@each_product
def test_rows_and_columns_are_those_of_the_matrix(product: Product, dense: torch.Tensor) -> None:
    rows, columns = torch.tensor([0, 5, 11]), slice(1, None, 3)
    assert product.shape == tuple(dense.shape)
    assert torch.allclose(product.part(rows, columns, torch.float64), dense.double()[rows][:, columns], atol=1e-6)
    turned = product.turned().part(rows, columns, torch.float64)
    assert torch.allclose(turned, dense.t().double()[rows][:, columns], atol=1e-6)


@each_product
def test_the_sums_of_rows_are_those_of_the_matrix(product: Product, dense: torch.Tensor) -> None:
    before = torch.randn(12, 20)
    after = before + 0.5 * dense
    after[7] = before[7]
    stored = (lambda *run: before[slice(*run)]), (lambda *run: after[slice(*run)])
    change = (after - before).double()
    rounding = Rounding(0.5, "float32", 2.0**-24, float(dense.square().mean().sqrt()))
    for sums in (product.row_sums(*stored, rounding), sums_by_chunk(product, *stored, rounding)):
        assert torch.allclose(torch.from_numpy(sums.overlap).double(), (change * dense).sum(1), rtol=1e-4, atol=1e-5)
        assert torch.allclose(torch.from_numpy(sums.product).double(), dense.double().square().sum(1), rtol=1e-4)
        assert torch.allclose(torch.from_numpy(sums.energy).double(), change.square().sum(1), rtol=1e-4)
        assert sums.changed.tolist() == [row != 7 for row in range(12)]
        assert (sums.misfit > 1).tolist() == [row == 7 for row in range(12)]


@each_product
def test_some_rows_are_those_of_the_matrix(product: Product, dense: torch.Tensor) -> None:
    found = product.sliced(3, 9)
    assert found.shape == (6, 20)
    assert torch.allclose(
        found.part(torch.tensor([0, 5]), slice(None), torch.float64), dense.double()[[3, 8]], atol=1e-6
    )


def test_experts_lie_one_below_the_other() -> None:
    left, right = torch.randn(4, 3, 2), torch.randn(4, 2, 5)
    dense = (left @ right).double()
    found, rows = Experts(left, right), torch.tensor([0, 4, 11])
    assert found.shape == (12, 5)
    assert torch.allclose(found.part(rows, slice(None), torch.float64), dense.reshape(12, 5)[rows], atol=1e-6)
    turned = dense.transpose(1, 2).reshape(20, 3)
    assert torch.allclose(found.turned().part(torch.arange(20), slice(None), torch.float64), turned, atol=1e-6)
