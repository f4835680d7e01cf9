"""Merges of quantised models: judged in real weights, or not judged by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from harness.doctor import verify_merge  # noqa: E402
from harness.doctor.checkpoint import Checkpoint  # noqa: E402

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


Stored = dict[str, Any]
ROWS, COLUMNS, GROUP = 96, 128, 32


def _int8(weight: Any, maxima: Any) -> tuple[Any, Any]:
    step = (maxima / 127).clamp_min(1e-12)
    return (weight / step).round().clamp(-127, 127).to(torch.int8), step


def _by_group(weight: Any) -> Any:
    return weight.reshape(len(weight), -1, GROUP)


def _mlx(weight: Any, bits: int) -> Stored:
    """MLX: codes from the low end of 32-bit words, a scale and a bias for each group of columns."""
    groups = _by_group(weight)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = ((high - low) / (2**bits - 1)).half().float()
    low = low.half().float()
    codes = ((groups - low) / step).round().clamp(0, 2**bits - 1).reshape(len(weight), -1).long()
    per = 32 // bits
    words = (codes.reshape(len(weight), -1, per) << (torch.arange(per) * bits)).sum(2)
    return {"weight": words.to(torch.uint32), "scales": step[..., 0].half(), "biases": low[..., 0].half()}


def _of_group(weight: Any) -> Stored:
    codes, step = _int8(_by_group(weight), _by_group(weight).abs().amax(2, keepdim=True))
    return {"weight": codes.reshape(weight.shape), "weight_scale": step[..., 0]}


def _of_row(weight: Any, name: str = "weight_scale") -> Stored:
    codes, step = _int8(weight, weight.abs().amax(1, keepdim=True))
    return {"weight": codes, name: step}


def _of_tensor(weight: Any) -> Stored:
    codes, step = _int8(weight, weight.abs().max())
    return {"weight": codes, "weight_scale": step}


def _bnb(weight: Any) -> Stored:
    return {"weight": _of_row(weight)["weight"], "SCB": weight.abs().amax(1)}


def _quanto(weight: Any) -> Stored:
    stored = _of_row(weight)
    return {"weight._data": stored["weight"], "weight._scale": stored["weight_scale"]}


def _of_tensor(weight):
    return dict(zip(("weight", "weight_scale"), _int8(weight, weight.abs().max()), strict=True))


STORAGES = {
    "int8 of rows": _of_row,
    "int8 of the tensor": _of_tensor,
    "int8 of groups": _of_group,
    "bitsandbytes": _bnb,
    "quanto": _quanto,
    "mlx 4": lambda weight: _mlx(weight, 4),
    "mlx 8": lambda weight: _mlx(weight, 8),
}  # fmt: skip


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("what", "scale"), [("right", 1.0), ("twice", 2.0), ("half", 0.5), ("part", 1.0)])
@pytest.mark.parametrize("base", ["full", "codes"])
@pytest.mark.parametrize("storage", ["nf4_double", "nf4_single", "fp4_double", "fp4_single"])
def test_a_merge_that_bitsandbytes_stored_in_four_bits_is_judged(
    storage: str, base: str, what: str, scale: float, full: bool, tmp_path: Path
) -> None:
    """`tests/cases/stored_in_4_bits.safetensors` was written by bitsandbytes (its header has the version)."""
    stored = load_file(CASES.parent / "stored_in_4_bits.safetensors")
    layer = "model.layers.0.self_attn.v_proj"
    start = "base." if base == "full" else f"{storage}.base."
    for file, begin in (("base", start), ("merged", f"{storage}.{base}.{what}.")):
        parts = {f"{layer}.{key[len(begin) :]}": tensor for key, tensor in stored.items() if key.startswith(begin)}
        save_file(parts, tmp_path / f"{file}.safetensors")
    halves = {f"diffusion_model.{layer}.{half}.weight": stored[half] for half in ("lora_A", "lora_B")}
    save_file({**halves, f"diffusion_model.{layer}.alpha": torch.tensor(4.0)}, tmp_path / "lora.safetensors")
    report = verify_merge(*(tmp_path / f"{name}.safetensors" for name in ("base", "merged", "lora")), full=full)
    assert report.exit_code == int(what != "right"), report.overall.text()
    assert what == "part" or report.overall.measured_scale == pytest.approx(scale, rel=0.02)
    assert what != "part" or report.overall.code in ("LH102", "LH401")  # double quantisation moves rows left alone


def test_a_base_in_four_bits_is_no_merge(tmp_path: Path) -> None:
    stored = load_file(CASES.parent / "stored_in_4_bits.safetensors")
    start, layer = "nf4_double.base.", "model.layers.0.self_attn.v_proj"
    parts = {f"{layer}.{key[len(start) :]}": tensor for key, tensor in stored.items() if key.startswith(start)}
    save_file({f"{layer}.weight": stored["base.weight"]}, tmp_path / "base.safetensors")
    save_file(parts, tmp_path / "merged.safetensors")
    halves = {f"diffusion_model.{layer}.{half}.weight": stored[half] for half in ("lora_A", "lora_B")}
    save_file({**halves, f"diffusion_model.{layer}.alpha": torch.tensor(4.0)}, tmp_path / "lora.safetensors")
    report = verify_merge(*(tmp_path / f"{name}.safetensors" for name in ("base", "merged", "lora")), full=True)
    assert (report.exit_code, report.overall.code) == (1, "LH101"), report.overall.text()


HEAD = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(9))
TIMES = {(1, 1): (0, None), (2, 2): (1, "LH202"), (0.5, 0.5): (1, "LH209"), (0, 0): (1, "LH101"), (1, 0): (1, "LH102")}


def _update(generator: Any) -> tuple[Any, Any]:
    return torch.randn(8, COLUMNS, generator=generator) / 10, 0.05 * torch.randn(ROWS, 8, generator=generator)


def _drawn(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the weights of three layers, and what the LoRA adds to them; write the LoRA."""
    generator = torch.Generator().manual_seed(5)
    names = [f"model.layers.{layer}.self_attn.v_proj" for layer in range(3)]
    weights = {name: 0.02 * torch.randn(ROWS, COLUMNS, generator=generator) for name in names}
    halves = {name: _update(generator) for name in names}
    lora = {f"base_model.model.{name}.lora_{half}.weight": part
            for name, pair in halves.items() for half, part in zip("AB", pair, strict=True)}  # fmt: skip
    (folder / "lora").mkdir()
    save_file(lora, folder / "lora" / "adapter_model.safetensors")
    (folder / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 4}')
    return weights, {name: 0.5 * b @ a for name, (a, b) in halves.items()}


def _written(folder: Path, weights: dict[str, Any], storage: Any) -> Path:
    folder.mkdir()
    tensors = {f"{name}.{key}": tensor for name, weight in weights.items() for key, tensor in storage(weight).items()}
    tensors |= {"model.norm.weight": torch.ones(COLUMNS), "model.embed_tokens.weight": torch.ones(4, COLUMNS)}
    tensors |= {f"lm_head.{key}": tensor for key, tensor in storage(HEAD).items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    bits = 4 if "4" in folder.name else 8
    (folder / "config.json").write_text(f'{{"quantization": {{"bits": {bits}, "group_size": {GROUP}}}}}')
    return folder


def _merged(weights: dict[str, Any], updates: dict[str, Any], times: tuple[float, float]) -> dict[str, Any]:
    factors = [times[0], *[times[1]] * (len(weights) - 1)]
    return {name: weights[name] + factor * updates[name] for name, factor in zip(weights, factors, strict=True)}


@pytest.mark.parametrize(
    ("base", "times"), [*(("in float32", times) for times in TIMES), ("in the same codes", (1, 1)), ("codes", (2, 2))]
)
@pytest.mark.parametrize("storage", STORAGES)
def test_a_merge_stored_in_whole_numbers_of_steps_is_judged(
    storage: str, times: tuple[float, float], base: str, tmp_path: Path
) -> None:
    weights, updates = _drawn(tmp_path)
    kind = storage.replace(" ", "_")
    before = _written(
        tmp_path / f"base_{kind}", weights, STORAGES[storage] if "codes" in base else lambda w: {"weight": w}
    )
    after = _written(tmp_path / f"merged_{kind}", _merged(weights, updates, times), STORAGES[storage])
    for full in (False, True):
        report = verify_merge(before, after, tmp_path / "lora", full=full)
        assert (report.exit_code, report.overall.code) == TIMES[times], report.overall.text()


@pytest.mark.parametrize("full", [False, True])
def test_damaged_rows_of_codes_are_found(full: bool, tmp_path: Path) -> None:
    weights, updates = _drawn(tmp_path)
    merged = _merged(weights, updates, (1, 1))
    for name in list(merged)[:1]:
        merged[name][40:56] = weights[name][40:56]
    before = _written(tmp_path / "base", weights, lambda weight: {"weight": weight})
    after = _written(tmp_path / "merged", merged, _of_row)
    report = verify_merge(before, after, tmp_path / "lora", full=full)
    assert report.exit_code == 1, report.overall.text()


@pytest.mark.parametrize("fault", ["", "not merged", "one expert"])
def test_a_merge_of_gpt_oss_is_held_against_its_packed_experts(fault: str, tmp_path: Path) -> None:
    """The base is as it is shared, in MXFP4; the merge is in bfloat16, with the experts the other way round."""
    generator = torch.Generator().manual_seed(0)
    name, (experts, out, inputs) = "model.layers.0.mlp.experts.down_proj", (3, 96, 64)
    blocks = torch.randint(0, 256, (experts, out, inputs // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 122, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
    (tmp_path / "base").mkdir()
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, tmp_path / "base" / "model.safetensors")
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    stored = Checkpoint.open(tmp_path / "base")
    real = stored.rows(stored.layers[name], 0, experts).reshape(experts, inputs, out)
    a, b = torch.randn(4 * experts, inputs, generator=generator), torch.randn(out, 4 * experts, generator=generator)
    updates = [b[:, expert::experts] @ a[4 * expert : 4 * expert + 4] for expert in range(experts)]
    share = {"": [0.02] * 3, "not merged": [0.0] * 3, "one expert": [0.02, 0.04, 0.02]}[fault]
    merged = torch.stack([real[e] + share[e] * updates[e].T for e in range(experts)]).bfloat16()
    save_file({name: merged.contiguous()}, tmp_path / "merged.safetensors")
    stem = f"base_model.model.{name.removesuffix('.down_proj')}"
    lora = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    (tmp_path / "lora").mkdir()
    save_file(lora, tmp_path / "lora" / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 0.08, "target_modules": [], "peft_version": "0.21.2"}
    said |= {"target_parameters": ["mlp.experts.down_proj"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    report = verify_merge(tmp_path / "base", tmp_path / "merged.safetensors", tmp_path / "lora", full=True)
    assert report.exit_code == int(bool(fault)), report.overall.text()
