"""Intervals always hold the true scale, and a verdict follows from them for any shape and dtype."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from harness.doctor.verify.verify import MergeReport
from harness.doctor.verify.vote import bounds, half_step, vote, vote_within
from harness.files import LoraWeights, write_lora
from harness.law.diagnosis import diagnose
from harness.law.probe import Probe
from tests.doctor.merging import (
    DTYPES,
    Case,
    Merge,
    delta_rounded_too,
    rounded_once,
    trained,
    weights,
)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]),
    exponent=st.floats(-3, 2),
    scale=st.floats(0.05, 4),
    seed=st.integers(0, 10**6),
)
def test_the_true_scale_is_always_inside_every_interval(dtype: str, exponent: float, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    kind = getattr(torch, dtype)
    base = (torch.randn(2000) * 0.05).to(kind).float()
    product = torch.randn(2000) * 0.05 * 10**exponent
    merged = (base.double() + scale * product.double()).float().clamp(-400, 400).to(kind).float()
    inside = (base + scale * product).abs() < 400
    arrays = [x[inside].numpy() for x in (base, product, merged)]
    low, high = bounds(arrays[2] - arrays[0], arrays[1], half_step(arrays[2], dtype))
    told = arrays[1] != 0
    single = 2.0**-24 * np.abs(arrays[2][told] / arrays[1][told])  # the sum was rounded to float32 before
    slack = single + 1e-5 * (1 + np.abs(low) + np.abs(high))
    assert np.all((low - slack <= scale) & (scale <= high + slack))
    window = (scale - 1.0, scale + 1.0)
    narrow = vote_within(low.copy(), high.copy(), window)
    assert vote(low, high).coverage > 0.999
    assert narrow.low - 1e-4 <= scale <= narrow.high + 1e-4


def test_laws_that_the_file_cannot_tell_apart_are_ambiguous() -> None:
    found = diagnose([Probe("a", 1.0, 0, (8.0,), (8,), 1.0, 1e-3)])
    assert found.code is None
    assert found.law is not None
    assert "strength" in found.law.alternatives


DTYPE = st.sampled_from(DTYPES)
VAGUE = (torch.float8_e4m3fn, torch.float32, (16, 16), 1, 16.0, -0.9375, -0.5)


def merged_once(
    folder: Path,
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    shape: tuple[int, int],
    rank: int,
    alpha: float,
    size: float,
    strength: float,
    error: float,
    merge: Merge = rounded_once,
    full: bool = False,
    seed: int = 0,
) -> MergeReport:
    """Return what `verify` says of one layer; ||update|| / ||W|| = 10^size, merged `error` times too strongly."""
    torch.manual_seed(seed)
    base = {"layer.weight": (torch.randn(*shape) * 0.02).to(dtype)}
    drawn = weights(*shape, rank, alpha, seed, 10**size)
    lora = {"layer": LoraWeights(drawn.a.to(lora_dtype), drawn.b.to(lora_dtype), alpha)}
    save_file(base, folder / "base.safetensors")
    write_lora(folder / "lora.safetensors", "diffsynth", lora)
    wide = {"layer": LoraWeights(lora["layer"].a.float(), lora["layer"].b.float(), alpha)}
    merged = Case(folder, base, wide).merged(merge, lambda w: error * strength * trained(w))
    return Case(folder, base, lora).verify(merged, strength=strength, full=full)


@settings(max_examples=40, deadline=None)
@given(
    dtype=DTYPE,
    lora_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shape=st.tuples(*[st.sampled_from([16, 48, 144, 320])] * 2),
    rank=st.integers(1, 16),
    alpha=st.sampled_from([0.5, 3.7, 7.0, 16.0]),
    size=st.floats(-1.5, 0.5),
    strength=st.sampled_from([1.0, 0.7, -0.5]),
    error=st.sampled_from([1.0, 1.03, 0.5, 3.0]),
    merge=st.sampled_from([rounded_once, delta_rounded_too]),
    full=st.booleans(),
    seed=st.integers(0, 10**6),
)
@example(*VAGUE, 1.03, rounded_once, False, 0)
@example(*VAGUE, 1.0, rounded_once, False, 0)
@example(torch.float8_e4m3fn, torch.float32, (144, 320), 1, 0.5, -1.5, 1.0, 1.0, rounded_once, True, 189)
def test_any_right_merge_passes_and_a_wrong_scale_fails_unless_the_merge_cannot_tell(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    shape: tuple[int, int],
    rank: int,
    alpha: float,
    size: float,
    strength: float,
    error: float,
    merge: Merge,
    full: bool,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    report = merged_once(folder, dtype, lora_dtype, shape, rank, alpha, size, strength, error, merge, full, seed)
    (module,) = report.modules
    expected = strength * alpha / rank
    if module.data["fits"] is None:
        assert not report.ok, "what rounding hides is no pass"
        return
    low, high = module.data["fits"]
    assert low <= error * expected <= high, "the scale that was used is always in the interval"
    assert report.ok or not low <= expected <= high, report.overall.text()
    assert report.ok or error != 1.0, report.overall.text()
    told_apart = "cannot tell" not in module.title
    assert told_apart == (not report.ok or high - low <= 0.02 * abs(expected))
    assert not told_apart or report.ok == (error == 1.0), report.overall.text()


@pytest.mark.parametrize("error", [1.0, 1.03])
def test_a_merge_that_fits_two_scales_names_both(tmp_path: Path, error: float) -> None:
    report = merged_once(tmp_path, *VAGUE, error)
    (module,) = report.modules
    low, high = (f"{end:.4g}" for end in module.data["fits"])
    said = f"{low} to {high} all fit"
    assert module.title.startswith(f"scale {module.measured_scale:.4g}, expected -8; cannot tell -8 from ")
    assert module.title.endswith(f" here: {said}")
    assert said in dict(report.overall.rows)["vague"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("merge", [rounded_once, delta_rounded_too])
def test_a_layer_of_some_size_tells_one_and_a_half_per_cent_apart(
    tmp_path: Path, dtype: torch.dtype, merge: Merge
) -> None:
    for error in (1.0, 1.015):
        report = merged_once(tmp_path, dtype, torch.float32, (320, 144), 4, 16.0, -1.0, 1.0, error, merge)
        assert report.ok == (error == 1.0)
        assert "vague" not in dict(report.overall.rows)


def test_the_more_elements_the_nearer_scales_are_told_apart(tmp_path: Path) -> None:
    dtype, lora_dtype, _, *rest = VAGUE
    report = merged_once(tmp_path, dtype, lora_dtype, (144, 144), *rest, 1.03)
    assert not report.ok
    assert "vague" not in dict(report.overall.rows)
