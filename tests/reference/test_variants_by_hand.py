"""The closed forms of the variants against their sums, written out index by index.

The numbers are small integers, so both sides are exact.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch

from tests import closed_form as variants


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def table(shape: Sequence[int], entry: Callable[..., torch.Tensor | float]) -> torch.Tensor:
    """Return the tensor whose entry at each index is `entry(*index)`."""
    out = torch.zeros(*shape, dtype=torch.float64)
    for index in itertools.product(*map(range, shape)):
        out[index] = float(entry(*index))
    return out


def same(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert found.dtype == torch.float64
    assert torch.equal(found, exact)


@pytest.mark.parametrize("kernel", [(), (3,), (2, 3)])
def test_a_convolution_sums_over_the_rank_at_each_place_of_the_kernel(kernel: tuple[int, ...]) -> None:
    a, b = integers(4, 3, *kernel), integers(5, 4, *(1 for _ in kernel), seed=1)
    exact = table((5, 3, *kernel), lambda o, i, *k: sum(b[o, r].item() * a[(r, i, *k)] for r in range(4)))
    same(variants.conv_product(a, b), exact)


def test_a_tucker_core_sums_over_both_its_ranks() -> None:
    a, b, mid = integers(4, 3, 1, 1), integers(5, 2, 1, 1, seed=1), integers(2, 4, 2, 3, seed=2)
    exact = table(
        (5, 3, 2, 3),
        lambda o, i, y, x: sum(b[o, p, 0, 0] * mid[p, q, y, x] * a[q, i, 0, 0] for p in range(2) for q in range(4)),
    )
    same(variants.tucker_product(a, b, mid), exact)


def low_rank(rows: int, columns: int, seed: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    a, b = integers(rows, 2, seed=seed), integers(2, columns, seed=seed + 1)
    return (a, b), table((rows, columns), lambda i, j: sum(a[i, r] * b[r, j] for r in range(2)))


def with_core(rows: int, columns: int, seed: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    a, b, t = integers(2, rows, seed=seed), integers(4, columns, seed=seed + 1), integers(2, 4, 3, 2, seed=seed + 2)
    return (a, b, t), table(
        (rows, columns, 3, 2),
        lambda i, j, y, x: sum(t[p, q, y, x] * a[p, i] * b[q, j] for p in range(2) for q in range(4)),
    )


@pytest.mark.parametrize("half", [low_rank, with_core])
def test_a_hadamard_product_multiplies_its_halves_place_by_place(half: Callable[..., tuple]) -> None:
    (first, one), (second, two) = half(5, 6, seed=3), half(5, 6, seed=8)
    exact = table(one.shape, lambda *index: one[index] * two[index])
    same(variants.loha_product(first, second), exact)
    if half is low_rank:
        same(variants.loha_product(first, second, (5, 3, 2, 1)), exact.reshape(5, 3, 2, 1))


def full(rows: int, columns: int, seed: int) -> tuple[tuple[torch.Tensor], torch.Tensor]:
    w = integers(rows, columns, seed=seed)
    return (w,), w.double()


@pytest.mark.parametrize(("left", "right"), [*itertools.product([full, low_rank], [full, low_rank, with_core])])
def test_a_kronecker_product_puts_the_second_factor_in_every_place_of_the_first(
    left: Callable[..., tuple], right: Callable[..., tuple]
) -> None:
    (first, one), (second, two) = left(2, 3, seed=3), right(4, 5, seed=8)
    exact = table((8, 15, *two.shape[2:]), lambda i, j, *k: one[i // 4, j // 5] * two[(i % 4, j % 5, *k)])
    same(variants.lokr_product(first, second), exact)
    same(variants.lokr_product(first, second, (4, 2, -1)), exact.reshape(4, 2, -1))


@pytest.mark.parametrize("form", [variants.embedding_product, variants.transposed_product])
def test_layers_that_store_the_transpose_get_the_transposed_product(form: Callable[..., torch.Tensor]) -> None:
    a, b = integers(2, 5), integers(3, 2, seed=1)
    same(form(a, b), table((5, 3), lambda i, o: sum(b[o, r] * a[r, i] for r in range(2))))


def test_a_bias_gets_its_part_times_the_factor() -> None:
    found = variants.bias_sum(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0]), 0.5)
    same(found, torch.tensor([2.5, 0.0], dtype=torch.float64))


# rows (3, 4) and (6, 8) have the norms 5 and 10; columns (3, 6) and (4, 8) have 3 sqrt(5) and 4 sqrt(5)
W, DELTA = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[2.0, 2.0], [3.0, 4.0]])


def test_dora_gives_each_row_its_magnitude() -> None:
    exact = torch.tensor([[6.0, 8.0], [12.0, 16.0]]).double()
    for magnitude in (torch.tensor([10.0, 20.0]), torch.tensor([[10.0], [20.0]])):
        same(variants.dora_weight(W, DELTA, magnitude), exact)
        same(variants.dora_weight(W, DELTA, magnitude, axis=0), exact)


def test_dora_along_the_inputs_gives_each_column_its_magnitude() -> None:
    found = variants.dora_weight(W, DELTA, torch.tensor([[10.0, 20.0]]), axis=1)
    root = math.sqrt(5)
    exact = torch.tensor([[10 / root, 20 / root], [20 / root, 40 / root]], dtype=torch.float64)
    assert found.dtype == torch.float64
    assert torch.allclose(found, exact, rtol=1e-15)


def test_dora_on_a_convolution_normalises_over_inputs_and_kernel_together() -> None:
    w = torch.arange(1.0, 25.0).reshape(2, 3, 2, 2)
    found = variants.dora_weight(w, w, torch.tensor([1.0, 7.0]))
    norms = [math.sqrt(sum(x * x for x in row.flatten().tolist())) for row in w.double()]
    exact = torch.stack([m * row / norm for m, row, norm in zip((1.0, 7.0), w.double(), norms, strict=True)])
    assert torch.allclose(found, exact, rtol=1e-14)


def test_a_whole_difference_has_the_strength_alone_and_the_weights_shape() -> None:
    w, diff = integers(2, 3), integers(6, seed=1)
    exact = table((2, 3), lambda i, j: w[i, j] + diff[3 * i + j])
    same(variants.full_weight(w, diff), exact)
    same(variants.full_weight(w, diff, strength=-0.5), 1.5 * w.double() - 0.5 * exact)


def test_half_precision_factors_are_multiplied_in_double_precision() -> None:
    x, y = (torch.full((1, 1), 1 + 2.0**-n).bfloat16() for n in (6, 7))
    exact = (1 + 2.0**-6) * (1 + 2.0**-7)
    core = torch.ones(1, 1, 1, 1)
    assert float(variants.conv_product(x, y)) == exact
    assert float(variants.tucker_product(x[..., None, None], y[..., None, None], core)) == exact
    assert float(variants.embedding_product(x, y)) == exact
    assert float(variants.loha_product((x, y), (x, y))) == exact**2
    assert float(variants.lokr_product((x,), (y,))) == exact
    assert float(variants.lokr_product((x, y), (x, y))) == exact**2


def test_strength_and_axis_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        variants.dora_weight(W, DELTA, torch.tensor([10.0, 20.0]), 1)  # type: ignore[misc]
    with pytest.raises(TypeError):
        variants.full_weight(W, DELTA, 0.5)  # type: ignore[misc]


def test_torch_is_not_imported_before_there_is_a_tensor() -> None:
    code = "import sys, harness.reference.closed_form; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
