"""The regression on B @ A, worked by hand, and what its numbers are taken to mean."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from harness.measure.compare import Direction, Fit, alignment, fit, fit_slices, low_rank, norm, rounding_loss
from harness.measure.tolerance import Tolerance, tolerance

exactly = partial(pytest.approx, rel=1e-12, abs=0)
A = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, -1.0]])
B = torch.tensor([[2.0, 1.0], [0.0, 4.0]])
BA = torch.tensor([[2.0, 7.0, -1.0], [0.0, 12.0, -4.0]], dtype=torch.float64)
SQUARES = 4 + 49 + 1 + 144 + 16
# B^2 @ A^2: 4 * (1, 4, 0) + 1 * (0, 9, 1) and 16 * (0, 9, 1)
OUTER_SQUARES = torch.tensor([[4.0, 25.0, 1.0], [0.0, 144.0, 16.0]], dtype=torch.float64)
ASIDE = torch.tensor([[7.0, -2.0, 0.0], [5.0, 0.0, 0.0]], dtype=torch.float64)  # <ASIDE, BA> = 0, |ASIDE|^2 = 78
W = torch.tensor([[1.0, -2.0, 0.5], [4.0, 0.0, 8.0]], dtype=torch.float64)
U = 2.0**-24


def test_the_direction_is_the_product_and_the_root_of_its_summed_squares() -> None:
    found = low_rank(A.bfloat16(), B.bfloat16())
    assert torch.equal(found.product, BA)
    assert torch.allclose(found.outer, OUTER_SQUARES.sqrt(), rtol=1e-15)
    assert (found.product.dtype, found.outer.dtype, found.rank) == (torch.float64, torch.float64, 2)


def test_some_rows_of_a_direction_have_the_same_rank() -> None:
    found = low_rank(A, B).rows(slice(1, 2))
    assert torch.equal(found.product, BA[1:])
    assert torch.equal(found.outer, OUTER_SQUARES[1:].sqrt())
    assert found.rank == 2


@pytest.mark.parametrize("scale", [2.0, -0.5, 0.0])
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_scale_is_the_projection_and_the_residual_what_is_left(scale: float, share: float) -> None:
    found = fit(W, W + scale * BA + share * ASIDE, low_rank(A, B), expected=2.0, dtype="float32")
    assert found.scale == exactly(scale)
    assert found.product == exactly(math.sqrt(SQUARES))
    assert found.residual == pytest.approx(share * math.sqrt(78), rel=1e-12, abs=1e-14)
    assert found.change == exactly(math.sqrt(scale**2 * SQUARES + share**2 * 78))
    assert found.expected == 2.0


@pytest.mark.parametrize(("scale", "expected", "largest"), [(1.5, 1.0, 1.5), (1.5, -3.0, 3.0), (-3.0, 1.0, 3.0)])
def test_the_tolerance_is_that_of_the_larger_scale(scale: float, expected: float, largest: float) -> None:
    after = W + scale * BA
    found = fit(W, after, low_rank(A, B), expected=expected, dtype="float32").tolerance
    once = float(after.square().sum())
    squares = float(W.square().sum()) + once + largest**2 * (4 + 2) * float(OUTER_SQUARES.sum())
    noise = U * math.sqrt(squares / 3)
    assert found.noise == exactly(4 * U * math.sqrt((squares + once) / 3))  # of rank 2, the sum is rounded twice
    assert found.scale == exactly(16 * U * largest + 6 * noise / math.sqrt(6 * SQUARES))
    assert found.dtype == "float32"


def test_a_residual_beyond_rounding_widens_the_scale_by_its_own_standard_error() -> None:
    clean, noisy = (
        fit(W, W + 2 * BA + share * ASIDE, low_rank(A, B), expected=2.0, dtype="float32") for share in (0.0, 0.5)
    )
    blur = 6 * 0.5 * math.sqrt(78) / math.sqrt(6 * SQUARES)
    assert noisy.tolerance.scale - clean.tolerance.scale == pytest.approx(blur, rel=1e-5)
    assert noisy.tolerance.noise == pytest.approx(clean.tolerance.noise, rel=0.01)


@pytest.mark.parametrize(("scale", "share"), [(2.0, 1e-8), (2.0, 6.0), (0.01, 1.0), (0.0, 1.0)])
def test_rounding_and_what_outweighs_the_change_itself_do_not_widen_it(scale: float, share: float) -> None:
    found = fit(W, W + scale * BA + share * ASIDE, low_rank(A, B), expected=2.0, dtype="float32").tolerance
    assert found.scale < 1e-5


def test_a_residual_within_rounding_widens_nothing_at_all() -> None:
    after, direction = W + 2 * BA + 1e-8 * ASIDE, low_rank(A, B)
    sizes = {"base": norm(W), "merged": norm(after), "product": norm(BA), "outer": norm(direction.outer)}
    want = tolerance(dtype="float32", scale=2.0, elements=6, rank=2, **sizes)
    assert fit(W, after, direction, expected=2.0, dtype="float32").tolerance.scale == exactly(want.scale)


@pytest.mark.parametrize(("sign", "widened"), [(1.0, True), (-1.0, True)])
def test_a_negative_change_is_blurred_like_a_positive_one(sign: float, widened: bool) -> None:
    found = fit(W, W + sign * (2 * BA + ASIDE), low_rank(A, B), expected=2 * sign, dtype="float32").tolerance
    assert (found.scale > 0.1) is widened


def test_a_vanishing_product_has_scale_zero_and_everything_left_over() -> None:
    found = fit(W, W + ASIDE, low_rank(0 * A, B), expected=2.0, dtype="float32")
    assert (found.scale, found.product, found.tolerance.scale) == (0.0, 0.0, math.inf)
    assert found.residual == found.change == exactly(math.sqrt(78))


def test_half_precision_weights_are_compared_in_double_precision() -> None:
    after = (W + 2**-5 * BA).bfloat16()  # its last digits are below one unit of W's
    found = fit(W.bfloat16(), after, low_rank(A, B), expected=2**-5, dtype="bfloat16")
    change = after.double() - W
    assert found.scale == exactly(float((change * BA).sum()) / SQUARES)
    assert found.change == exactly(norm(change))


def test_each_slice_of_rows_is_fitted_alone() -> None:
    after = W + BA
    after[1] += BA[1]
    rows = (slice(0, 1), slice(1, 2), slice(0, 2))
    found = fit_slices(W, after, low_rank(A, B), rows, expected=1.0, dtype="float32")
    both = (4 + 49 + 1 + 2 * (144 + 16)) / SQUARES
    assert [part.scale for part in found] == [exactly(s) for s in (1.0, 2.0, both)]
    assert [part.expected for part in found] == [1.0] * 3
    assert found[0].product == exactly(math.sqrt(54))
    assert {part.tolerance.dtype for part in found} == {"float32"}


@pytest.mark.parametrize("factor", [0.5, 0.999, -1.0, 1.25])
def test_a_residual_along_the_base_is_the_factor_on_it(factor: float) -> None:
    base = ASIDE  # no part of it along B @ A
    found = fit(base, factor * base + 2 * BA, low_rank(A, B), expected=2.0, dtype="float32")
    assert found.along_base == pytest.approx(factor - 1, rel=1e-9)
    assert found.scale == exactly(2.0)


@pytest.mark.parametrize(("aside", "seen"), [(0.4, True), (0.6, False)])  # cosines 0.93 and 0.86
def test_a_residual_that_is_mostly_something_else_is_not_along_the_base(aside: float, seen: bool) -> None:
    base = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    other = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    b, a = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    for sign in (1, -1):
        change = b @ a + sign * base + aside * other
        found = fit(base, base + change, low_rank(a, b), expected=1.0, dtype="float32")
        assert found.along_base == (pytest.approx(sign) if seen else 0.0)


def test_a_right_merge_has_nothing_along_its_base() -> None:
    assert measured().along_base == 0.0
    assert fit(W, W + 2 * BA, low_rank(A, B), expected=2.0, dtype="float32").along_base == 0.0
    tiny = fit(ASIDE, (1 + 1e-9) * ASIDE + 2 * BA, low_rank(A, B), expected=2.0, dtype="float32")
    assert tiny.along_base == 0.0


def measured(**fields: float) -> Fit:
    """A fit that is right in every respect: scale 2 on a product of 3, allowed 0.25 in scale and 0.5 in noise."""
    return replace(Fit(2.0, 0.5, 6.0, 3.0, Tolerance(0.25, 0.5, "float32"), 2.0), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scale", "right"), [(2.0, True), (2.25, True), (1.75, True), (2.3, False), (1.7, False), (-2.0, False)]
)
def test_a_scale_is_right_up_to_its_tolerance_on_either_side(scale: float, right: bool) -> None:
    assert measured(scale=scale).scale_right is right


@pytest.mark.parametrize(("residual", "right"), [(0.0, True), (0.5, True), (0.51, False), (math.inf, False)])
def test_a_direction_is_right_when_only_rounding_is_left(residual: float, right: bool) -> None:
    assert measured(residual=residual).direction_right is right


@pytest.mark.parametrize(("change", "same"), [(0.0, True), (0.5, True), (0.51, False)])
def test_a_layer_is_unchanged_up_to_rounding(change: float, same: bool) -> None:
    assert measured(change=change).unchanged is same


@pytest.mark.parametrize(
    ("scale", "residual", "blurred"),
    [
        (2.0, 0.5, False),  # nothing but rounding is left
        (2.0, 0.6, True),
        (2.5, 1.5, True),  # off by 0.5 * 3, and as much is left
        (1.5, 1.5, True),
        (2.5, 1.4, False),  # off by more than is left: the scale is at fault
        (1.5, 1.4, False),
        (2.1, 0.4, False),
    ],
)
def test_a_fit_is_blurred_when_more_is_left_than_the_scale_is_off_by(
    scale: float, residual: float, blurred: bool
) -> None:
    assert measured(scale=scale, residual=residual).blurred is blurred


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_fit_is_finite_when_both_its_numbers_are(odd: float) -> None:
    assert measured().finite
    assert not measured(scale=odd).finite
    assert not measured(residual=odd).finite


def test_the_relative_residual_is_a_share_of_the_change() -> None:
    assert measured(residual=1.5).relative_residual == 0.25
    assert measured(change=0.5).relative_residual == 1.0
    assert measured(change=0.0).relative_residual == 0.0


def test_measurements_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        measured().scale = 1.0  # type: ignore[misc]
    with pytest.raises(AttributeError):
        Direction(BA, BA, 2).rank = 3  # type: ignore[misc]


def test_the_norm_is_that_of_all_entries() -> None:
    assert norm(torch.tensor([[3.0, 0.0], [0.0, -4.0]])) == 5.0


@pytest.mark.parametrize(
    ("candidate", "cosine"),
    [(BA, 1.0), (3 * BA, 1.0), (-0.5 * BA, -1.0), (ASIDE, 0.0), (BA * math.sqrt(78 / SQUARES) + ASIDE, 0.5**0.5)],
)
def test_alignment_is_the_cosine_of_two_changes(candidate: torch.Tensor, cosine: float) -> None:
    assert alignment(2 * BA, candidate) == pytest.approx(cosine, rel=1e-12, abs=1e-15)


def test_alignment_with_nothing_is_zero() -> None:
    assert alignment(BA, 0 * BA) == alignment(0 * BA, BA) == 0.0
    assert alignment(BA.bfloat16(), BA.bfloat16()) == exactly(1.0)


def in_bfloat16(update: float, seen: float = 1.0) -> Fit:
    """Fit a merge in bfloat16 of an update that is `update` times as large as W, at `seen` times the trained scale."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(96, 64, generator=draw).bfloat16().double()
    direction = low_rank(torch.randn(4, 64, generator=draw), torch.randn(96, 4, generator=draw))
    scale = update * norm(w) / norm(direction.product)
    merged = (w + seen * scale * direction.product).bfloat16()
    return fit(w, merged, direction, expected=scale, dtype="bfloat16")


@pytest.mark.parametrize("update", [0.5, 1e-2, 3e-3, 1e-3, 3e-4, 1e-5])
def test_a_merge_may_lose_what_is_below_the_step_between_two_weights(update: float) -> None:
    assert in_bfloat16(update).scale_right


def test_an_update_that_rounding_mostly_hides_says_nothing_of_the_law() -> None:
    assert in_bfloat16(1e-3).scale < 0.7 * in_bfloat16(1e-3).expected
    assert [in_bfloat16(update).faint for update in (0.5, 0.1, 1e-2, 1e-3)] == [False, False, False, True]
    assert in_bfloat16(1e-5).faint


@pytest.mark.parametrize(("lost", "faint"), [(0.0, False), (0.1, False), (0.15, True)])
def test_a_scale_is_faint_when_a_twentieth_of_it_is_lost(lost: float, faint: bool) -> None:
    assert measured(lost=lost, expected=4.0).faint is faint
    assert measured(lost=lost, scale=0.0, expected=-2.0).faint is faint
    assert measured().lost == 0.0


@pytest.mark.parametrize(
    ("scale", "loss"),
    [
        (1.5, 1.5),  # 1 + 1.5 * 2^-9 falls back to 1: all of the scale is lost
        (-1.5, 0.5),  # below 1 the steps are half as wide: 1 - 2^-8 is reached
        (3.0, 1.0),  # 1 + 2^-7, a third too much
        (4.0, 0.0),
    ],
)
def test_the_loss_is_what_rounding_to_the_next_weight_takes_or_adds(scale: float, loss: float) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    assert rounding_loss(one, 2.0**-9 * one, scale, "bfloat16") == loss


@pytest.mark.parametrize(("update", "seen"), [(0.5, 1.01), (0.5, 0.99), (1e-2, 1.1), (1e-2, 0.9), (1e-3, 4.0)])
def test_what_is_lost_excuses_no_wrong_scale(update: float, seen: float) -> None:
    assert not in_bfloat16(update, seen).scale_right


def test_single_precision_loses_nothing() -> None:
    assert rounding_loss(W, BA, 1e-6, "float32") == 0.0
    assert rounding_loss(W, 0 * BA, 1.0, "bfloat16") == 0.0
