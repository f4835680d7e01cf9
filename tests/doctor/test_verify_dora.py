"""DoRA: the scale stands inside a norm, and whether the magnitude was applied is a question of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.doctor.verify.verify import MergeReport, verify_merge
from harness.reference.closed_form import dora_weight

RANK, ALPHAS = 4, {"blocks_0_x": 2.0, "blocks_1_x": 12.0}
NOISE = {torch.float8_e4m3fn: 0.05, torch.bfloat16: 0.01, torch.float16: 5e-3, torch.float32: 1e-3}
Merge = Callable[[Tensor, Tensor, Tensor], Tensor]  # W, s * B @ A, m -> W'


@dataclass
class Case:
    """Two layers [out, in] with a pair and a magnitude each."""

    folder: Path
    base: dict[str, Tensor]
    products: dict[str, Tensor]
    magnitudes: dict[str, Tensor]

    def verify(self, scale: Callable[[float], float], merge: Merge, **options: float | bool) -> MergeReport:
        merged = {
            f"{name}.weight": merge(weight, scale(ALPHAS[name]) * self.products[name], self.magnitudes[name])
            for name, weight in self.base.items()
        }
        dtype = next(iter(self.base.values())).dtype
        save_file(
            {key: value.to(dtype).contiguous() for key, value in merged.items()}, self.folder / "merged.safetensors"
        )
        paths = (self.folder / f"{name}.safetensors" for name in ("base", "merged", "lora"))
        return verify_merge(*paths, **options)  # type: ignore[arg-type]


def make(
    folder: Path, dtype: torch.dtype, *, size: float = 0.1, spread: float = 0.05, axis: int = 0, inputs: int = 120
) -> Case:
    """`size` is |s B A| / |W|; the magnitude is the norm of W times 1 plus or minus `spread`, as training leaves it."""
    torch.manual_seed(0)
    base, products, magnitudes, lora = {}, {}, {}, {}
    for name, alpha in ALPHAS.items():
        w = (torch.randn(144, inputs) * 0.02).to(dtype)
        a, b = torch.randn(RANK, inputs), torch.randn(144, RANK)
        b *= size * w.float().norm() / (b @ a).norm() / (alpha / RANK)
        norm = w.float().norm(dim=1 - axis, keepdim=True)
        magnitude = norm * (1 + spread * torch.randn(norm.shape))
        base[name], products[name], magnitudes[name] = w, b.double() @ a.double(), magnitude
        parts = {"lora_down.weight": a, "lora_up.weight": b, "alpha": torch.tensor(alpha), "dora_scale": magnitude}
        lora |= {f"lora_unet_{name}.{role}": part for role, part in parts.items()}
    save_file({f"{name}.weight": w for name, w in base.items()}, folder / "base.safetensors")
    save_file(lora, folder / "lora.safetensors")
    return Case(folder, base, products, magnitudes)


def along_outputs(w: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    return dora_weight(w, delta, magnitude)


def along_inputs(w: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    return dora_weight(w, delta, magnitude, axis=1)


def trained(alpha: float) -> float:
    return alpha / RANK


@pytest.mark.parametrize("dtype", NOISE, ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.05])
@pytest.mark.parametrize(("axis", "merge"), [(0, along_outputs), (1, along_inputs)])
def test_the_scale_inside_the_norm_is_found(
    tmp_path: Path, dtype: torch.dtype, spread: float, axis: int, merge: Merge
) -> None:
    case = make(tmp_path, dtype, spread=spread, axis=axis)
    for full in (False, True):
        report = case.verify(trained, merge, full=full)
        assert report.ok, report.overall.text()
        assert report.overall.ratio == pytest.approx(1.0, abs=NOISE[dtype])
    for code, scale in (("LH201", lambda alpha: alpha), ("LH202", lambda alpha: 1.0)):
        overall = case.verify(scale, merge).overall
        assert (overall.outcome, overall.code) == ("failed", code), overall.text()


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_a_small_update_is_read_through_its_rounding(tmp_path: Path, spread: float) -> None:
    case = make(tmp_path, torch.bfloat16, size=2e-3, spread=spread)
    overall = case.verify(trained, along_outputs).overall
    assert overall.ok, overall.text()
    assert overall.ratio == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("dtype", NOISE, ids=str)
def test_a_magnitude_that_was_ignored_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    case = make(tmp_path, dtype, spread=0.3)
    overall = case.verify(trained, lambda w, delta, magnitude: w.double() + delta).overall
    assert overall.code == "LH304"
    assert "the sum was stored as it is" in overall.title
    assert overall.ratio == pytest.approx(1.0, abs=NOISE[dtype])


def test_a_norm_taken_before_the_update_is_named(tmp_path: Path) -> None:
    case = make(tmp_path, torch.float32, size=0.5)
    before = lambda w, delta, m: m.double() * (w.double() + delta) / w.double().norm(dim=1, keepdim=True)  # noqa: E731
    overall = case.verify(trained, before).overall
    assert overall.code == "LH304"
    assert "the factor is 1." in overall.title


@pytest.mark.parametrize("dtype", NOISE, ids=str)
def test_a_strength_may_stand_inside_the_norm_or_outside(tmp_path: Path, dtype: torch.dtype) -> None:
    case = make(tmp_path, dtype, size=0.3, spread=0.2)
    assert case.verify(lambda alpha: 0.5 * alpha / RANK, along_outputs, strength=0.5).ok

    def blended(w: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
        return w.double() + 0.5 * (dora_weight(w, delta, magnitude) - w.double())

    report = case.verify(trained, blended, strength=0.5)
    assert report.ok, report.overall.text()
    assert "blends W with its DoRA weight" in report.modules[0].text()
    assert not case.verify(lambda alpha: alpha, blended, strength=0.5).ok


def test_nothing_merged_and_a_half_of_the_rows_are_named(tmp_path: Path) -> None:
    case = make(tmp_path, torch.bfloat16, spread=0.3)
    assert case.verify(trained, lambda w, delta, magnitude: w).overall.code == "LH101"

    def upper(w: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
        return torch.cat([dora_weight(w, delta, magnitude)[:36], w[36:].double()])

    overall = case.verify(trained, upper).overall
    assert overall.code == "LH102"
    assert "rows 36 to 143" in overall.title


@pytest.mark.parametrize(("axis", "merge"), [(0, along_outputs), (1, along_inputs)])
def test_the_axis_of_a_square_weight_is_told_by_the_shape_of_its_magnitude(
    tmp_path: Path, axis: int, merge: Merge
) -> None:
    case = make(tmp_path, torch.float32, spread=0.2, axis=axis, inputs=144)
    assert case.verify(trained, merge).ok
    other = along_inputs if axis == 0 else along_outputs
    turned = lambda w, delta, magnitude: other(w, delta, magnitude.reshape(magnitude.shape[::-1]))  # noqa: E731
    assert not case.verify(trained, turned).ok


def test_another_dora_is_not_taken_for_this_one(tmp_path: Path) -> None:
    case = make(tmp_path, torch.bfloat16)
    other = {name: torch.randn_like(product).double() * 0.002 for name, product in case.products.items()}
    case.products = other
    assert case.verify(trained, along_outputs).overall.code == "LH101"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("alpha", [4, 32])
def test_merges_of_peft_pass(tmp_path: Path, dtype: torch.dtype, alpha: int) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    layers = {"q": torch.nn.Linear(96, 64), "conv": torch.nn.Conv2d(8, 48, 3)}
    model = torch.nn.ModuleDict(layers).to(dtype)
    save_file({name: t.clone() for name, t in model.state_dict().items()}, tmp_path / "base.safetensors")
    config = LoraConfig(r=8, lora_alpha=alpha, use_dora=True, target_modules=["q", "conv"])
    trainee = get_peft_model(model, config)
    for name, parameter in trainee.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.04 * 8 / alpha)
        elif "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
    trainee.save_pretrained(str(tmp_path / "lora"))
    fresh = torch.nn.ModuleDict({"q": torch.nn.Linear(96, 64), "conv": torch.nn.Conv2d(8, 48, 3)}).to(dtype)
    from safetensors.torch import load_file

    fresh.load_state_dict(load_file(tmp_path / "base.safetensors"))
    merged = PeftModel.from_pretrained(fresh, str(tmp_path / "lora")).merge_and_unload(safe_merge=True)
    save_file({k: t.contiguous() for k, t in merged.state_dict().items()}, tmp_path / "merged.safetensors")
    report = verify_merge(tmp_path / "base.safetensors", tmp_path / "merged.safetensors", tmp_path / "lora")
    assert report.ok, report.overall.text()
    assert report.overall.ratio == pytest.approx(1.0, abs=0.01)
