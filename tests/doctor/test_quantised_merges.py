"""Merges of quantised models: judged in real weights, or not judged by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from harness.doctor import verify_merge  # noqa: E402

CASES = Path(__file__).parents[1] / "cases" / "quantised.safetensors"
LAYERS = [f"blocks.{layer}.{name}" for layer in range(2) for name in ("q", "v")]


def _fp8(weight: Any, step: Any = None) -> dict[str, Any]:
    step = weight.abs().max() / 448 if step is None else step
    return {"weight": (weight / step).to(torch.float8_e4m3fn), "scale_weight": step}


def _ignored(codes: Any, step: Any, delta: Any) -> dict[str, Any]:
    return {"weight": (codes.float() + delta).to(codes.dtype), "scale_weight": step}


def _files(folder: Path, merge: Any) -> tuple[Path, Path, Path]:
    """Write a scaled fp8 base, what `merge(codes, step, delta)` returns for each layer, and the LoRA."""
    generator = torch.Generator().manual_seed(5)
    base, merged, lora = {}, {}, {}
    for layer in LAYERS:
        stored = _fp8(0.02 * torch.randn(64, 96, generator=generator))
        a, b = torch.randn(8, 96, generator=generator) / 10, 0.05 * torch.randn(64, 8, generator=generator)
        base |= {f"{layer}.{key}": tensor for key, tensor in stored.items()}
        update = merge(stored["weight"], stored["scale_weight"], 0.5 * b @ a)
        merged |= {f"{layer}.{key}": tensor for key, tensor in update.items()}
        key = f"diffusion_model.{layer}"
        lora |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, f"{key}.alpha": torch.tensor(4.0)}
    paths = [folder / name for name in ("base.safetensors", "merged.safetensors", "lora.safetensors")]
    for path, tensors in zip(paths, (base, merged, lora), strict=True):
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return paths[0], paths[1], paths[2]


RIGHT = {
    "a scale of its own": lambda codes, step, delta: _fp8(codes.float() * step + delta),
    "the scale of the base": lambda codes, step, delta: _fp8(codes.float() * step + delta, 4 * step),
    "16 bits": lambda codes, step, delta: {"weight": (codes.float() * step + delta).bfloat16()},
    "32 bits": lambda codes, step, delta: {"weight": codes.float() * step + delta},
}
WRONG = {
    "the scale ignored": _ignored,
    "twice": lambda codes, step, delta: _fp8(codes.float() * step + 2 * delta),
    "twice in 16 bits": lambda codes, step, delta: {"weight": (codes.float() * step + 2 * delta).bfloat16()},
    "nothing": lambda codes, step, delta: {"weight": codes, "scale_weight": step},
}  # fmt: skip


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("merge", RIGHT)
def test_a_right_merge_of_scaled_codes_passes(merge: str, full: bool, tmp_path: Path) -> None:
    assert verify_merge(*_files(tmp_path, RIGHT[merge]), full=full).exit_code == 0


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("merge", WRONG)
def test_a_wrong_merge_of_scaled_codes_fails(merge: str, full: bool, tmp_path: Path) -> None:
    assert verify_merge(*_files(tmp_path, WRONG[merge]), full=full).exit_code == 1


@pytest.mark.parametrize("case", ["nf4_double", "fp4_single", "int8", "quanto_int8"])
@pytest.mark.parametrize(("times", "code"), [(1.0, 0), (2.0, 1)])
def test_a_merge_of_a_library_s_codes_into_full_weights_is_judged(
    case: str, times: float, code: int, tmp_path: Path
) -> None:
    stored = load_file(CASES)
    truth = stored[f"truth.{case}"]
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(4, truth.shape[1], generator=generator), 0.05 * torch.randn(len(truth), 4, generator=generator)
    codes = {f"x.q{key[len(case) :]}": tensor for key, tensor in stored.items() if key.startswith(f"{case}.")}
    save_file(codes, tmp_path / "base.safetensors")
    save_file({"x.q.weight": truth + times * (b @ a)}, tmp_path / "merged.safetensors")
    lora = {"lora_A": a, "lora_B": b}
    tensors = {f"diffusion_model.x.q.{half}.weight": tensor for half, tensor in lora.items()}
    tensors["diffusion_model.x.q.alpha"] = torch.tensor(4.0)
    save_file(tensors, tmp_path / "lora.safetensors")
    report = verify_merge(*(tmp_path / f"{name}.safetensors" for name in ("base", "merged", "lora")))
    assert report.exit_code == code, report.overall.title


def test_what_cannot_be_dequantised_is_not_judged_by_name(tmp_path: Path) -> None:
    packed = {"qweight": (8, 16), "qzeros": (2, 2), "scales": (2, 16)}
    base = {f"x.q.{key}": torch.zeros(shape, dtype=torch.int32) for key, shape in packed.items()}
    for name in ("base", "merged"):
        save_file(base, tmp_path / f"{name}.safetensors")
    lora = {"lora_A": torch.randn(4, 64), "lora_B": torch.randn(16, 4)}
    tensors = {f"diffusion_model.x.q.{half}.weight": tensor for half, tensor in lora.items()}
    save_file({**tensors, "diffusion_model.x.q.alpha": torch.tensor(4.0)}, tmp_path / "lora.safetensors")
    report = verify_merge(*(tmp_path / f"{name}.safetensors" for name in ("base", "merged", "lora")))
    assert report.exit_code == 3
    assert "GPTQ" in str(report.overall)
