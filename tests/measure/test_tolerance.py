"""Tolerances follow their derivation: worked by hand where the square root comes out even."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest

from harness.measure.tolerance import UNIT_ROUNDOFF, Tolerance, scale_rounding, tolerance

# |W|^2 + |W'|^2 + s^2 (4 + r) outer^2 = 49 + 23 + 4 * 9 * 1 = 108 = 3 * 6^2, so the noise is 6 u;
# over 9 elements and |BA| = 2 the regression sees 6 u / (3 * 2) = 1 u of it.
EVEN: dict[str, Any] = {
    "scale": 2.0, "elements": 9, "base": 7.0, "merged": math.sqrt(23), "product": 2.0, "outer": 1.0, "rank": 5
}  # fmt: skip
exactly = partial(pytest.approx, rel=1e-12, abs=0)
BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}


@pytest.mark.parametrize("dtype", BITS)
def test_the_unit_roundoff_is_half_a_unit_in_the_last_place(dtype: str) -> None:
    assert UNIT_ROUNDOFF[dtype] == 0.5 ** BITS[dtype]


@pytest.mark.parametrize(("dtype", "roundings"), [("float64", 16), ("float32", 16), ("float16", 2), ("bfloat16", 2)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_tolerance_is_roundings_of_the_scale_plus_six_sigma(dtype: str, roundings: int, sign: int) -> None:
    u = 0.5 ** BITS[dtype]
    found = tolerance(dtype=dtype, **EVEN | {"scale": 2.0 * sign})
    assert found.scale == exactly(roundings * 2 * u + 6 * u)
    sums = 5 if roundings == 16 else 1  # whoever adds rank by rank rounds the sum as often
    assert found.noise == exactly(4 * u * math.sqrt((49 + sums * 23 + 36) / 3))
    assert found.dtype == dtype


@pytest.mark.parametrize(
    ("change", "sum_of_squares"),
    [
        ({"base": 1.0}, 1 + 23 + 36),
        ({"merged": 1.0}, 49 + 1 + 36),
        ({"outer": 3.0}, 49 + 23 + 4 * 9 * 9),
        ({"rank": 1}, 49 + 23 + 4 * 5),
        ({"scale": 3.0}, 49 + 23 + 9 * 9),
        ({"scale": 0.0}, 49 + 23),
    ],
)
def test_the_noise_adds_the_squares_of_its_sources(change: dict[str, float], sum_of_squares: float) -> None:
    noise = tolerance(dtype="float16", **EVEN | change).noise
    assert noise == exactly(4 * 2.0**-11 * math.sqrt(sum_of_squares / 3))


@pytest.mark.parametrize(
    ("dtype", "error"),
    [("float64", 2.0**-49), ("float32", 2.0**-20), ("float16", 2.0**-10), ("bfloat16", 2.0**-7)],
)
def test_a_scale_is_rounded_sixteen_times_in_single_precision_and_twice_in_half(dtype: str, error: float) -> None:
    assert scale_rounding(dtype) == error


def test_the_scale_of_a_file_in_eight_bits_is_rounded_in_bfloat16() -> None:
    assert scale_rounding("float8_e4m3fn") == scale_rounding("bfloat16")


def test_more_elements_and_a_larger_product_sharpen_the_scale() -> None:
    u = 2.0**-24
    allowed = {elements: tolerance(dtype="float32", **EVEN | {"elements": elements}).scale for elements in (9, 36)}
    assert allowed[36] == exactly(32 * u + 3 * u)
    assert tolerance(dtype="float32", **EVEN | {"product": 4.0}).scale == exactly(32 * u + 3 * u)
    assert tolerance(dtype="float32", **EVEN | {"product": 0.5}).scale == exactly(32 * u + 24 * u)


def test_a_vanishing_product_tells_nothing_of_the_scale() -> None:
    found = tolerance(dtype="float32", **EVEN | {"product": 0.0})
    assert found.scale == math.inf
    assert math.isfinite(found.noise)


def test_one_per_cent_of_the_scale_is_beyond_every_dtypes_own_roundings() -> None:
    for dtype in BITS:
        large_layer = EVEN | {"elements": 10**12}
        assert tolerance(dtype=dtype, **large_layer).scale < 0.01 * EVEN["scale"]


def test_a_measured_blur_widens_the_scale_by_six_sigma_and_nothing_else() -> None:
    assert Tolerance(0.5, 3.0, "float16").blurred(0.25) == Tolerance(2.0, 3.0, "float16")


def test_a_tolerance_says_where_it_comes_from_and_cannot_be_widened_in_place() -> None:
    half = Tolerance(0.5, 3.0, "bfloat16")
    assert half.why() == "2 roundings of the scale in bfloat16 + 6 sigma of the regression"
    assert Tolerance(0.5, 3.0, "float32").why().startswith("16 roundings of the scale in float32")
    with pytest.raises(AttributeError):
        half.scale = 9.0  # type: ignore[misc]


def test_what_rounding_takes_away_is_allowed_on_top() -> None:
    plain, wider = (tolerance(dtype="bfloat16", **EVEN | more) for more in ({}, {"lost": 0.5}))
    assert wider == Tolerance(exactly(plain.scale + 0.5), plain.noise, "bfloat16", 0.5)
    assert (plain.lost, Tolerance(0.5, 3.0, "float16").lost) == (0.0, 0.0)


def test_only_a_loss_that_matters_is_said() -> None:
    without = "2 roundings of the scale in bfloat16 + 6 sigma of the regression"
    assert Tolerance(10.0, 3.0, "bfloat16", 1.0).why() == without
    assert Tolerance(10.0, 3.0, "bfloat16", 2.0).why() == f"{without} + 2.0e+00 lost in rounding"
