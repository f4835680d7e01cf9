"""The real weights behind quantised ones: what the libraries' own dequantisers say is in the fixture beside them.

`tests/cases/quantised.safetensors` was written by bitsandbytes, optimum-quanto and mlx (its header has the versions):
`<case>.weight…` as the library saves it, `truth.<case>` what it dequantises to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from harness.doctor.checkpoint import Checkpoint  # noqa: E402
from harness.doctor.inspect.describe import inspect_file  # noqa: E402
from harness.errors import LoraFileError  # noqa: E402

CASES = Path(__file__).parents[1] / "cases" / "quantised.safetensors"
BITS = {f"mlx_{bits}": {"bits": bits, "group_size": 32} for bits in (2, 3, 4, 5, 6, 8)}
READ = (
    "nf4_single", "nf4_double", "fp4_single", "fp4_double", "int8", "quanto_int8", "quanto_fp8", *BITS,
)  # fmt: skip


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(CASES)


def _saved(folder: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None) -> Checkpoint:
    import json

    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return Checkpoint.open(folder)


def _case(stored: dict[str, Any], case: str) -> dict[str, Any]:
    return {f"layer.{key[len(case) + 1 :]}": tensor for key, tensor in stored.items() if key.startswith(f"{case}.")}


@pytest.mark.parametrize("case", READ)
def test_the_real_weights_are_those_of_the_library(case: str, stored: dict[str, Any], tmp_path: Path) -> None:
    base = _saved(tmp_path, _case(stored, case), {"quantization": BITS.get(case, {})})
    truth = stored[f"truth.{case}"]
    name = base.layers["layer"]
    assert base.info(name).shape == tuple(truth.shape)
    pieces = [base.rows(name, start, min(start + 4, len(truth))) for start in range(0, len(truth), 4)]
    torch.testing.assert_close(torch.cat(pieces), truth, rtol=1e-6, atol=1e-7)
    assert base.norm(name) == pytest.approx(float(truth.double().norm()), rel=1e-6)


@pytest.mark.parametrize("case", READ)
def test_scales_are_parts_of_their_layer(case: str, stored: dict[str, Any], tmp_path: Path) -> None:
    base = _saved(tmp_path, _case(stored, case), {"quantization": BITS.get(case, {})})
    assert list(base.layers) == ["layer"]
    assert base.owned >= {name for name in base.names if name != base.layers["layer"]}


def test_bits_that_nobody_says_are_not_guessed(stored: dict[str, Any], tmp_path: Path) -> None:
    base = _saved(tmp_path, _case(stored, "mlx_4"))
    assert "bits are not said" in (base.unreadable("layer.weight") or "")
    with pytest.raises(LoraFileError, match="bits are not said"):
        base.rows("layer.weight", 0, 1)


def test_packed_weights_are_named(stored: dict[str, Any], tmp_path: Path) -> None:
    base = _saved(tmp_path, _case(stored, "quanto_int4"))
    assert "quanto" in (base.unreadable("layer.weight") or "")


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ({"qweight": (8, 16), "qzeros": (2, 2), "scales": (2, 16), "g_idx": (64,)}, "GPTQ"),
        ({"weight_packed": (16, 8), "weight_scale": (16, 2), "weight_global_scale": (1,)}, "NVFP4"),
        ({"weight_packed": (16, 8), "weight_scale": (16, 2), "weight_shape": (2,)}, "compressed-tensors"),
        ({"qweight": (16, 8), "wscales": (2, 16), "proj_down": (16, 4), "smooth_factor": (16,)}, "SVDQuant"),
        ({"W_q": (16, 8), "scale": (16, 1), "zero": (16, 1)}, "HQQ"),
    ],
)
def test_what_is_not_dequantised_is_named(tensors: dict[str, tuple[int, ...]], name: str, tmp_path: Path) -> None:
    base = _saved(tmp_path, {f"a.{key}": torch.zeros(shape, dtype=torch.uint8) for key, shape in tensors.items()})
    assert name in (base.unreadable("a.weight") or "")


SPREADS = {
    "tensor": ((), lambda s: s),
    "one": ((1,), lambda s: s),
    "rows": ((40,), lambda s: s[:, None]),
    "columns of one": ((40, 1), lambda s: s),
    "groups": ((40, 3), lambda s: s.repeat_interleave(32, 1)),
    "blocks": ((3, 6), lambda s: s.repeat_interleave(16, 0)[:40].repeat_interleave(16, 1)),
}


@pytest.mark.parametrize("tail", ["scale_weight", "weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("spread", SPREADS)
def test_codes_are_multiplied_by_their_scale(spread: str, dtype: Any, tail: str, tmp_path: Path) -> None:
    shape, wide = SPREADS[spread]
    generator = torch.Generator().manual_seed(1)
    codes = (20 * torch.randn(40, 96, generator=generator)).to(dtype)
    scale = torch.rand(shape, generator=generator) + 0.5
    base = _saved(tmp_path, {"a.weight": codes, f"a.{tail}": scale, "a.input_scale": torch.ones(())})
    wanted = codes.float() * wide(scale)
    torch.testing.assert_close(base.rows("a.weight", 0, 40), wanted)
    torch.testing.assert_close(base.rows("a.weight", 5, 21), wanted[5:21])
    assert base.owned == {"a.weight", f"a.{tail}", "a.input_scale"} - {"a.weight"}


def _fp8(weight: Any) -> dict[str, Any]:
    scale = weight.abs().max() / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "scale_weight": scale}


def test_the_share_of_a_lora_is_of_the_real_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(3)
    base, lora, real = {}, {}, 0.0
    for layer in range(3):
        weight = 0.02 * torch.randn(64, 64, generator=generator)
        a, b = torch.randn(8, 64, generator=generator) / 8, 0.05 * torch.randn(64, 8, generator=generator)
        base |= {f"blocks.{layer}.q.{key}": tensor for key, tensor in _fp8(weight).items()}
        key = f"diffusion_model.blocks.{layer}.q"
        lora |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, f"{key}.alpha": torch.tensor(8.0)}
        real = float((b @ a).norm() / weight.norm())
    save_file({**base, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "base.safetensors")
    save_file({key: tensor.contiguous() for key, tensor in lora.items()}, tmp_path / "lora.safetensors")
    record = inspect_file(tmp_path / "lora.safetensors", base=tmp_path / "base.safetensors")
    assert record.energy is not None
    assert record.energy["blocks.2.q"] == pytest.approx(real, rel=0.02)
    assert record.advice is not None
    assert record.advice.outlook == "too strong"


def test_a_base_that_cannot_be_dequantised_is_not_judged(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    packed = {"qweight": (8, 16), "qzeros": (2, 2), "scales": (2, 16)}
    base = {f"model.layers.0.q_proj.{key}": torch.zeros(shape, dtype=torch.int32) for key, shape in packed.items()}
    save_file(base, tmp_path / "base.safetensors")
    key = "base_model.model.model.layers.0.q_proj"
    lora = {f"{key}.lora_A.weight": torch.randn(4, 64), f"{key}.lora_B.weight": torch.randn(16, 4)}
    save_file(lora, tmp_path / "lora.safetensors")
    record = inspect_file(tmp_path / "lora.safetensors", base=tmp_path / "base.safetensors", lora_alpha=4)
    assert record.advice is None
    assert any("GPTQ" in note and "not judged" in note for note in record.notes)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_a_gguf_model_is_a_base(kind: str, tmp_path: Path) -> None:
    gguf, quants = pytest.importorskip("gguf"), pytest.importorskip("gguf.quants")
    from safetensors.torch import save_file

    weight = 0.02 * torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", [f"t{number}" for number in range(70_000)])
    for layer in range(2):
        quantised = quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
        writer.add_tensor(f"blk.{layer}.attn_q.weight", quantised, raw_dtype=gguf.GGMLQuantizationType[kind])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    a, b = torch.randn(4, 128), torch.randn(64, 4)
    key = "base_model.model.model.layers.1.self_attn.q_proj"
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, tmp_path / "lora.safetensors")
    record = inspect_file(tmp_path / "lora.safetensors", base=tmp_path / "base.gguf", lora_alpha=4)
    assert record.energy is not None
    assert list(record.energy.values()) == pytest.approx([float((b @ a).norm() / weight.norm())], rel=0.02)


@pytest.mark.parametrize(("name", "said"), [("unsloth/llama-3-8b-bnb-4bit", True), ("meta/llama-3-8b", False)])
def test_a_lora_of_a_four_bit_base_beside_full_weights_is_said(name: str, said: bool, tmp_path: Path) -> None:
    import json

    from safetensors.torch import save_file

    layer = "model.layers.0.q_proj"
    _saved(tmp_path, {f"{layer}.weight": torch.randn(16, 32)})
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4, "base_model_name_or_path": name}))
    halves = {"lora_A": torch.randn(4, 32), "lora_B": torch.randn(16, 4)}
    tensors = {f"base_model.model.{layer}.{half}.weight": tensor for half, tensor in halves.items()}
    save_file(tensors, lora / "adapter_model.safetensors")
    record = inspect_file(lora, base=tmp_path / "model.safetensors")
    assert any("trained on" in note and "4bit" in note for note in record.notes) == said


def test_blocks_of_experts_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (3, 40, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (3, 40, 2), dtype=torch.uint8, generator=generator)
    name = "model.layers.0.mlp.experts.down_proj"
    base = _saved(tmp_path, {f"{name}_blocks": blocks, f"{name}_scales": scales})
    truth = mxfp4._convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    weight = base.layers[name]
    assert base.info(weight).shape == tuple(truth.shape) == (3, 64, 40)
    torch.testing.assert_close(base.rows(weight, 1, 3), truth[1:].flatten(1), rtol=0, atol=0)


def test_packed_blocks_of_another_layout_are_named(tmp_path: Path) -> None:
    shapes = {"a_blocks": (40, 2, 16), "a_scales": (40, 2)}
    base = _saved(tmp_path, {key: torch.zeros(shape, dtype=torch.uint8) for key, shape in shapes.items()})
    assert "MXFP4" in (base.unreadable("a.weight") or "")
