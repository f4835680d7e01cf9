"""What is wrong with a direction is named after the cause that explains it best, not the first that explains some."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harness.checks.families.direction import check_direction
from harness.checks.families.numerics import check_numerics
from harness.checks.observation import Observation
from harness.example import Example, Target
from harness.measure.compare import fit, fit_slices, low_rank

ROWS, COLUMNS = 48, 16
SLICES = [slice(start, start + ROWS // 3) for start in range(0, ROWS, ROWS // 3)]


def pair(rank: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(rank)
    return torch.randn(rank, COLUMNS, generator=draw), torch.randn(ROWS, rank, generator=draw)


def observed(change: Tensor, a: Tensor, b: Tensor, *, fused: bool = True, base: Tensor | None = None) -> Observation:
    """Return what is seen of one layer that changed so although its file says b @ a."""
    base, direction = torch.zeros(ROWS, COLUMNS) if base is None else base, low_rank(a, b)
    fits = [fit(base, base + change, direction, expected=1.0, dtype="float32")]
    fits += fit_slices(base, base + change, direction, SLICES, expected=1.0, dtype="float32") if fused else ()
    example = Example((Target("x", a.shape[0], float(a.shape[0])),))
    return Observation(example, {"x": tuple(fits)}, {"x": change.double()}, {"x": direction.product})


def codes(change: Tensor, a: Tensor, b: Tensor, *, fused: bool = True) -> list[str]:
    return [finding.code for finding in check_direction(observed(change, a, b, fused=fused))]


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("share", [0.15, 0.3])
def test_noise_in_a_merged_layer_is_no_fault_of_its_slices(rank: int, share: float) -> None:
    a, b = pair(rank)
    noise = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(9)) * (b @ a).std()
    assert codes(b @ a + share * noise, a, b) == ["LH304"]


def test_small_entries_that_are_dropped_are_no_moved_rows() -> None:
    a, b = pair(1)
    delta = b @ a
    assert codes(delta * (delta.abs() > delta.abs().max() / 8), a, b) == ["LH304"]


@pytest.mark.parametrize("rank", [1, 4])
def test_slices_in_another_order_are_named(rank: int) -> None:
    a, b = pair(rank)
    swapped = torch.cat([(b @ a)[rows] for rows in (SLICES[1], SLICES[0], SLICES[2])])
    assert codes(swapped, a, b) == ["LH302"]


def test_slices_with_scales_of_their_own_are_named() -> None:
    a, b = pair(4)
    assert codes(torch.cat([k * (b @ a)[rows] for k, rows in zip((1, 2, 3), SLICES, strict=True)]), a, b) == ["LH302"]


@pytest.mark.parametrize("size", [0.07, 0.5])
def test_rows_that_have_factors_of_their_own_are_named_however_small_these_are(size: float) -> None:
    a, b = pair(4)
    factors = 1 + size * torch.randn(ROWS, 1, generator=torch.Generator().manual_seed(2))
    seen = observed(factors * (b @ a), a, b, fused=False)
    (found,) = check_direction(seen)
    assert found.code == "LH304"
    assert found.fact.endswith("each of its rows has a factor of its own")
    assert not check_numerics(seen)


def test_a_slice_that_is_left_out_is_rows_left_out() -> None:
    for rank in (1, 4):
        a, b = pair(rank)
        kept = torch.cat([k * (b @ a)[rows] for k, rows in zip((1, 0, 1), SLICES, strict=True)])
        assert codes(kept, a, b) == ["LH304"]


def test_what_rounding_leaves_over_is_no_other_modules_delta() -> None:
    a, b = pair(4)
    noise = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(9)) * (b @ a).std()
    seen = observed(b @ a + 0.104 * noise, a, b, fused=False)
    others = {f"y{n}": low_rank(*pair(n)).product for n in (5, 6, 7)}
    (found,) = check_direction(replace(seen, products={**seen.products, **others}))
    assert (found.code, found.fact.partition(": ")[2]) == (
        "LH304",
        "a part of it is along B @ A, the rest is unexplained",
    )


@pytest.mark.parametrize("half", ["A", "B"])
def test_one_half_of_another_modules_pair_is_a_wrong_module(half: str) -> None:
    a, b = pair(4)
    other_a, other_b = pair(5)
    mixed = b @ other_a[:4] if half == "A" else other_b[:, :4] @ a
    seen = observed(mixed, a, b, fused=False)
    both = replace(seen, products={**seen.products, "y": (other_b @ other_a).double()})
    assert [finding.code for finding in check_direction(both)] == ["LH104"]
    assert [finding.code for finding in check_direction(seen)] == ["LH306"]


def test_a_column_that_outweighs_the_rest_does_not_make_it_a_transposed_layer() -> None:
    a, b = pair(4)
    change = b @ a
    change[:, -1] += 1000 * torch.randn(ROWS, generator=torch.Generator().manual_seed(9))
    assert codes(change, a, b, fused=False) == ["LH304"]


def test_a_change_that_has_nothing_to_do_with_the_file_is_called_so() -> None:
    a, b = pair(4)
    other_a, other_b = pair(5)
    assert codes(other_b @ other_a, a, b, fused=False) == ["LH306"]


@pytest.mark.parametrize("factor", [0.7, 0.999])
def test_a_base_weight_that_is_scaled_too_is_said_with_its_factor(factor: float) -> None:
    a, b = pair(4)
    base = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(9))
    seen = observed(b @ a + (factor - 1) * base, a, b, base=base)
    (found,) = check_direction(seen)
    assert found.code == "LH304"
    assert float(found.fact.rsplit(" ", 1)[1]) == pytest.approx(factor, abs=0.05 * (1 - factor))
    assert check_numerics(seen) == []
