"""What was done to a merged checkpoint is named, whatever dtype it was rounded to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.doctor import verify_merge
from harness.errors import UserError
from harness.files import LoraWeights, write_lora
from tests.doctor.merging import (
    DTYPES,
    QKV,
    Case,
    Merge,
    delta_rounded_too,
    make,
    rounded_once,
    trained,
    twice,
    weights,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("merge", [rounded_once, delta_rounded_too])
@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_a_right_merge_passes_in_every_dtype(tmp_path: Path, dtype: torch.dtype, merge: Merge, scale: float) -> None:
    case = make(tmp_path, dtype, size=0.1, alphas=(8 * scale, 16 * scale))
    report = case.verify(case.merged(merge, trained))
    assert report.ok, report.overall.text()
    assert report.overall.measured_scale == pytest.approx(scale, rel=0.02 if dtype.itemsize == 1 else 0.005)
    assert report.overall.worst_module is None
    assert len(report.modules) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("code", "formula", "scale"),
    [
        ("LH201", "strength * alpha", lambda w: w.alpha),
        ("LH202", "strength", lambda w: 1.0),
        ("LH203", "strength * alpha / sqrt(rank)", lambda w: w.alpha / w.rank**0.5),
        ("LH206", "2 * strength * alpha / rank", lambda w: 2 * w.alpha / w.rank),
        ("LH204", "strength * alpha(first) / rank", lambda w: 16 / w.rank),
        ("LH209", "0.7 * strength * alpha / rank", lambda w: 0.7 * w.alpha / w.rank),
    ],
)
def test_the_law_of_a_wrong_merge_is_named(
    tmp_path: Path, dtype: torch.dtype, code: str, formula: str, scale: Callable[[LoraWeights], float]
) -> None:
    case = make(tmp_path, dtype, size=0.1)
    overall = case.verify(case.merged(rounded_once, scale)).overall
    assert (overall.outcome, overall.code) == ("failed", code)
    assert overall.law is not None
    assert overall.law.formula.startswith(formula[:3] if code == "LH209" else formula)


def test_another_factor_may_be_the_strength_that_somebody_wanted(tmp_path: Path) -> None:
    case = make(tmp_path)
    overall = case.verify(case.merged(rounded_once, lambda w: 0.7 * trained(w))).overall
    assert "pass --strength 0.7" in overall.text()


def test_a_squared_scale_is_named_before_a_factor_that_happens_to_differ_by_kind(tmp_path: Path) -> None:
    case = make(tmp_path, alphas=(4, 2))
    overall = case.verify(case.merged(rounded_once, lambda w: trained(w) ** 2)).overall
    assert overall.code == "LH206"
    assert "strength * alpha^2 / rank^2" in overall.title
    assert "merge again at strength * alpha / rank of each module" in overall.text()
    assert "--strength" not in overall.text()


def test_factors_that_differ_between_modules_are_given_as_a_range(tmp_path: Path) -> None:
    case = make(tmp_path)
    overall = case.verify(case.merged(rounded_once, lambda w: trained(w) * (1.3 if w.alpha == 16 else 1.7))).overall
    assert overall.code == "LH209"
    assert "1.3 to 1.7 times the expected scale" in overall.title


def test_a_scale_one_percent_off_fails_and_an_exact_one_is_exact(tmp_path: Path) -> None:
    case = make(tmp_path, size=0.02)
    assert case.verify(case.merged(rounded_once, lambda w: 1.012 * trained(w))).overall.outcome == "failed"
    exact = case.verify(case.merged(rounded_once, trained)).overall
    assert exact.ratio == pytest.approx(1.0, abs=2e-3)


def test_an_update_that_rounding_mostly_loses_is_still_the_right_scale(tmp_path: Path) -> None:
    """The plain projection says 0.55 of the scale here; the vote says 1.00, and 0.55 is what survived."""
    case = make(tmp_path, size=1e-3)
    overall = case.verify(case.merged(rounded_once, trained)).overall
    assert overall.ok
    assert overall.ratio == pytest.approx(1.0, abs=0.01)
    assert overall.survived is not None
    assert 0.4 < overall.survived < 0.7
    assert "merge in float32" in overall.text()


def test_nothing_merged_is_said(tmp_path: Path) -> None:
    case = make(tmp_path)
    overall = case.verify(case.merged(lambda base, product, scale: base, trained)).overall
    assert (overall.code, overall.outcome) == ("LH101", "failed")
    assert "byte-identical" in overall.title


def test_an_update_below_every_rounding_step_is_told_from_nothing_merged(tmp_path: Path) -> None:
    case = make(tmp_path, torch.float8_e4m3fn, size=1e-4)
    report = case.verify(case.merged(rounded_once, trained))
    assert (report.exit_code, report.overall.code, report.overall.outcome) == (3, None, "skipped")
    assert "below half a step of float8_e4m3fn" in report.overall.title
    assert {verdict.outcome for verdict in report.modules} == {"skipped"}
    assert case.verify(tmp_path / "merged.safetensors", allow_unjudged=("hidden",)).exit_code == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0.1, 3e-3])
def test_a_double_merge_is_named(tmp_path: Path, dtype: torch.dtype, size: float) -> None:
    case = make(tmp_path, dtype, size=size)
    overall = case.verify(case.merged(twice, trained)).overall
    assert overall.code == "LH206"
    assert overall.ratio == pytest.approx(2.0, abs=0.01)
    assert "merged twice" in overall.title


@pytest.mark.parametrize("full", [False, True])
def test_a_merge_of_q_and_k_but_not_v_is_named(tmp_path: Path, full: bool) -> None:
    def only_q_and_k(base: Tensor, product: Tensor, scale: float) -> Tensor:
        merged = rounded_once(base, product, scale)
        return torch.cat([merged[:192], base[192:]]) if len(base) == 288 else merged

    case = make(tmp_path)
    report = case.verify(case.merged(only_q_and_k, trained), full=full)
    assert report.overall.code == "LH102"
    wrong = [verdict for verdict in report.modules if not verdict.ok]
    assert [verdict.worst_module for verdict in wrong] == [QKV]
    assert "not merged in v;" in wrong[0].title


def test_full_finds_a_few_rows_that_sampling_passes_over(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {"layer.weight": (torch.randn(4096, 512) * 0.02).bfloat16()}
    lora = {"layer": weights(4096, 512, 4, 2.0, 3, 0.05)}
    save_file(base, tmp_path / "base.safetensors")
    write_lora(tmp_path / "lora.safetensors", "diffsynth", lora)
    case = Case(tmp_path, base, lora)

    def leave_the_end(base: Tensor, product: Tensor, scale: float) -> Tensor:
        return torch.cat([rounded_once(base, product, scale)[:3072], base[3072:]])

    found = case.verify(case.merged(leave_the_end, trained), full=True).modules[0]
    assert found.data["unmerged_rows"] == [[3072, 4096]]
    assert found.survived == pytest.approx(1.0, abs=0.05)


def test_a_lora_of_another_file_is_named(tmp_path: Path) -> None:
    case = make(tmp_path)
    other = {name: weights(*w.b.shape[:1], w.a.shape[1], w.rank, w.alpha, 77, 0.02) for name, w in case.lora.items()}
    merged = Case(tmp_path, case.base, other).merged(rounded_once, trained)
    overall = case.verify(merged).overall
    assert overall.code == "LH101"
    assert "another LoRA" in overall.title


def test_another_lora_on_top_is_named_and_the_scale_still_found(tmp_path: Path) -> None:
    case = make(tmp_path)
    other = {name: weights(*w.b.shape[:1], w.a.shape[1], w.rank, w.alpha, 77, 0.02) for name, w in case.lora.items()}
    both = {name: (case.lora[name].b @ case.lora[name].a, other[name].b @ other[name].a) for name in case.lora}
    changes = {}
    for name, (own, added) in both.items():
        changes[f"{name}.weight"] = rounded_once(case.base[f"{name}.weight"], own + added, trained(case.lora[name]))
    report = case.verify(case.merged(rounded_once, trained, **changes))
    assert report.overall.code == "LH401"
    assert "other changes besides this LoRA" in report.overall.title
    assert all(v.ratio == pytest.approx(1.0, abs=0.1) for v in report.modules)


def test_another_base_is_named(tmp_path: Path) -> None:
    case = make(tmp_path)
    merged = case.merged(rounded_once, trained)
    save_file(
        {name: torch.randn(t.shape).to(t.dtype) * 0.02 for name, t in case.base.items()}, tmp_path / "base.safetensors"
    )
    overall = case.verify(merged).overall
    assert overall.code == "LH401"
    assert "wrong base" in overall.title


def test_a_base_rounded_from_what_was_merged_passes_with_a_word(tmp_path: Path) -> None:
    torch.manual_seed(5)
    master = {"layer.weight": torch.randn(256, 256) * 0.02}
    lora = {"layer": weights(256, 256, 4, 2.0, 3, 0.05)}
    save_file({"layer.weight": master["layer.weight"].bfloat16()}, tmp_path / "base.safetensors")
    write_lora(tmp_path / "lora.safetensors", "diffsynth", lora)
    to_half = lambda base, product, scale: (base + scale * product).bfloat16()  # noqa: E731
    case = Case(tmp_path, master, lora)
    report = case.verify(case.merged(to_half, trained))
    assert report.ok
    assert report.modules[0].data["state"] == "two roundings"


def test_other_edits_and_missing_tensors_are_named(tmp_path: Path) -> None:
    case = make(tmp_path)
    edited = case.base["blocks.1.norm_proj.weight"] * 2
    merged = case.merged(rounded_once, trained, **{"blocks.1.norm_proj.weight": edited, "new.weight": torch.ones(2, 2)})
    overall = case.verify(merged).overall
    assert overall.code == "LH401"
    assert overall.data["other_changed"] == ["blocks.1.norm_proj.weight"]
    assert overall.data["other_extra"] == ["new.weight"]


def test_nan_in_the_merged_file_is_named(tmp_path: Path) -> None:
    case = make(tmp_path)
    broken = torch.full((288, 96), float("nan")).bfloat16()
    assert case.verify(case.merged(rounded_once, trained, **{f"{QKV}.weight": broken})).overall.code == "LH502"


def test_strength_is_part_of_the_expectation(tmp_path: Path) -> None:
    case = make(tmp_path)
    merged = case.merged(rounded_once, lambda w: 0.5 * trained(w))
    assert case.verify(merged, strength=0.5).ok
    ignored = case.verify(case.merged(rounded_once, trained), strength=0.5).overall
    assert (ignored.code, ignored.law and ignored.law.formula) == ("LH207", "alpha / rank")


def test_a_device_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="device 'nonsense'"):
        verify_merge(tmp_path / "base", tmp_path / "merged", tmp_path / "lora", device="nonsense")
