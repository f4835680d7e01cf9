"""One per cent of the scale is an error; rounding is not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.measure.compare import fit, fit_slices, low_rank, norm
from harness.measure.tolerance import UNIT_ROUNDOFF


def merged(scale: float, dtype: torch.dtype, rank: int = 8, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    w = (torch.randn(48, 64, generator=g) / 8).to(dtype)
    a, b = torch.randn(rank, 64, generator=g) / 8, torch.randn(48, rank, generator=g) / (2 * rank)
    return w, (w.double() + scale * (b.double() @ a.double())).to(dtype), a, b


@given(st.sampled_from(["float32", "bfloat16", "float16"]), st.integers(1, 64), st.floats(0.1, 4), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_a_merge_rounded_once_is_right(dtype: str, rank: int, scale: float, seed: int) -> None:
    w, after, a, b = merged(scale, getattr(torch, dtype), rank, seed)
    found = fit(w, after, low_rank(a, b), expected=scale, dtype=dtype)
    assert found.scale_right
    assert found.direction_right


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("error", [0.99, 1.01])
def test_a_scale_one_per_cent_off_is_wrong(dtype: str, error: float) -> None:
    w, after, a, b = merged(2.0 * error, getattr(torch, dtype))
    assert not fit(w, after, low_rank(a, b), expected=2.0, dtype=dtype).scale_right


def test_a_fault_in_one_slice_shows_in_that_slice_alone() -> None:
    w, after, a, b = merged(1.0, torch.float32)
    after[:16] += 0.02 * (b @ a)[:16]
    slices = (slice(0, 16), slice(16, 32), slice(32, 48))
    parts = fit_slices(w, after, low_rank(a, b), slices, expected=1.0, dtype="float32")
    assert [part.scale_right for part in parts] == [False, True, True]


def test_noise_beyond_the_dtype_is_a_wrong_direction() -> None:
    w, after, a, b = merged(1.0, torch.float32)
    rounded = w + (after - w).to(torch.bfloat16).float()
    found = fit(w, rounded, low_rank(a, b), expected=1.0, dtype="float32")
    assert found.scale_right is False or found.direction_right is False
    assert found.relative_residual < 0.01


def test_an_unchanged_layer_is_seen_as_unchanged() -> None:
    w, _, a, b = merged(1.0, torch.bfloat16)
    assert fit(w, w, low_rank(a, b), expected=1.0, dtype="bfloat16").unchanged


def test_the_norm_of_a_large_layer_is_accumulated_in_float64() -> None:
    x = torch.full((3072, 4096), 0.1)
    exact = float(torch.tensor(0.1).double()) * (3072 * 4096) ** 0.5
    assert norm(x) == pytest.approx(exact, rel=1e-9)


def test_unit_roundoffs_are_those_of_the_dtypes() -> None:
    for name, u in UNIT_ROUNDOFF.items():
        assert u == torch.finfo(getattr(torch, name)).eps / 2
