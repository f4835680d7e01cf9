"""Merges stored as llama.cpp's models: its names, its order of the rows of q and k, its quantisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")
torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from harness.doctor import inspect_file, verify_merge  # noqa: E402
from harness.files.gguf_file import _CODES, read_gguf  # noqa: E402

HEADS, WIDE, BLOCKS = 4, 64, 2
TYPES = gguf.GGMLQuantizationType
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
}  # fmt: skip
State = dict[str, Any]


def _drawn(folder: Path) -> tuple[State, State]:
    """Return the weights of a small Llama as transformers has them and what the LoRA adds to them; write the LoRA."""
    torch.manual_seed(0)
    weights: State = {"model.embed_tokens.weight": 0.02 * torch.randn(32, WIDE), "model.norm.weight": torch.ones(WIDE)}
    weights["lm_head.weight"] = 0.02 * torch.randn(32, WIDE)
    updates, lora = {}, {}
    for name in (f"model.layers.{block}.{part}" for block in range(BLOCKS) for part in NAMES):
        if "norm" in name:
            weights[f"{name}.weight"] = torch.ones(WIDE)
            continue
        a, b = 0.1 * torch.randn(8, WIDE), 0.03 * torch.randn(WIDE, 8)
        weights[f"{name}.weight"], updates[f"{name}.weight"] = 0.02 * torch.randn(WIDE, WIDE), 2 * b @ a
        lora |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    (folder / "lora").mkdir()
    save_file(lora, folder / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config))
    return weights, updates


def _called(key: str) -> str:
    if not key.startswith("model.layers."):
        return {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight", "lm_head": "output.weight"}[
            key.split(".")[-2]
        ]
    block, part = key.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{block}.{NAMES[part]}.weight"


def _permuted(weight: Any) -> Any:
    """llama.cpp's `LlamaModel.permute`."""
    return weight.reshape(HEADS, 2, len(weight) // HEADS // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _write(path: Path, weights: State, kind: str, architecture: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    for key, weight in weights.items():
        paired = architecture == "llama" and key.endswith(("q_proj.weight", "k_proj.weight"))
        array = (_permuted(weight) if paired else weight).contiguous().numpy()
        if array.ndim == 1 or kind == "F32":
            writer.add_tensor(_called(key), array)
        else:
            writer.add_tensor(_called(key), quants.quantize(array, TYPES[kind]), raw_dtype=TYPES[kind])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return path


def _merged(weights: State, updates: State, factor: float, without: str = "none") -> State:
    return {k: w + factor * updates[k] if k in updates and without not in k else w for k, w in weights.items()}


@pytest.mark.parametrize("base", ["gguf", "safetensors"])
@pytest.mark.parametrize(("kind", "architecture"), [("F16", "llama"), ("Q8_0", "llama"), ("Q4_0", "llama"),
                                                    ("Q5_1", "qwen2"), ("BF16", "qwen2")])  # fmt: skip
def test_a_merge_is_judged_through_names_order_and_rounding(
    kind: str, architecture: str, base: str, tmp_path: Path
) -> None:
    weights, updates = _drawn(tmp_path)
    before = tmp_path / f"base.{base}"
    if base == "gguf":
        _write(before, weights, kind, architecture)
    else:
        save_file(weights, before)
    for factor, without, code, title in (
        (1.0, "none", 0, "10 of 10 right"), (2.0, "none", 1, "merged twice"), (0.0, "none", 1, "nothing was merged"),
        (1.0, "layers.1.self_attn.q_proj", 1, "not merged: 1 of 10 modules (model.layers.1.self_attn.q_proj)"),
    ):  # fmt: skip
        after = _write(tmp_path / "merged.gguf", _merged(weights, updates, factor, without), kind, architecture)
        report = verify_merge(before, after, tmp_path / "lora")
        assert (report.exit_code, title in report.overall.title) == (code, True), report.overall.text()


def test_a_base_of_llama_cpp_has_every_module(tmp_path: Path) -> None:
    weights, _ = _drawn(tmp_path)
    record = inspect_file(tmp_path / "lora", base=_write(tmp_path / "base.gguf", weights, "Q8_0", "llama"))
    assert record.fit is not None
    assert (record.fit.applied, record.codes) == (10, ())


def test_the_order_of_an_unknown_architecture_is_not_judged(tmp_path: Path) -> None:
    weights, updates = _drawn(tmp_path)
    before = _write(tmp_path / "base.gguf", weights, "F16", "orion")
    after = _write(tmp_path / "merged.gguf", _merged(weights, updates, 1), "F16", "orion")
    report = verify_merge(before, after, tmp_path / "lora")
    assert report.exit_code == 3, report.overall.text()
    assert "another order in some models" in report.overall.text()


def _model(layers: dict[str, tuple[int, ...]], adapted: tuple[str, ...]) -> tuple[State, State, State]:
    """Return weights of these shapes, what a LoRA of some of them adds, and its tensors."""
    torch.manual_seed(1)
    weights = {key: 0.02 * torch.randn(shape) for key, shape in layers.items()}
    updates, lora = {}, {}
    for key in (key for key in layers if key.removesuffix(".weight").endswith(adapted)):
        out, into = layers[key]
        a, b = 0.1 * torch.randn(8, into), 0.03 * torch.randn(out, 8)
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        updates[key], lora[f"{stem}.lora_A.weight"], lora[f"{stem}.lora_B.weight"] = 2 * b @ a, a, b
    return weights, updates, lora


def _layer(*parts: tuple[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{block}.{name}.weight": shape for block in range(BLOCKS) for name, shape in parts}


def _gguf(path: Path, architecture: str, tensors: State, kind: str = "F32") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    for key, weight in tensors.items():
        array = weight.contiguous().float().numpy()
        raw = {} if array.ndim == 1 or kind == "F32" else {"raw_dtype": TYPES[kind]}
        writer.add_tensor(key, quants.quantize(array, TYPES[kind]) if raw else array, **raw)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return path


def _judge(folder: Path, base: Path, merged: Path, lora: State) -> Any:
    (folder / "lora").mkdir(exist_ok=True)
    save_file(lora, folder / "lora" / "adapter_model.safetensors")
    (folder / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16}))
    return verify_merge(base, merged, folder / "lora", full=True)


PHI3 = {"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm"}  # fmt: skip
GEMMA = {"self_attn.q_proj": "attn_q", "self_attn.o_proj": "attn_output", "mlp.up_proj": "ffn_up",
         "input_layernorm": "attn_norm", "post_feedforward_layernorm": "post_ffw_norm"}  # fmt: skip
PHI2 = {"self_attn.q_proj": "attn_q", "self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}
FAMILIES = {
    "phi3": (PHI3, ("qkv_proj", "gate_up_proj")),
    "phi2": (PHI2, ("q_proj", "dense", "fc1")),
    "gemma2": (GEMMA, ("q_proj", "up_proj")),
    "gemma3": (GEMMA, ("q_proj", "up_proj")),
}


def _as_llama_cpp_has_it(architecture: str, names: dict[str, str], weights: State) -> State:
    found = {}
    for key, weight in weights.items():
        block, part = key.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        more = 1.0 if architecture.startswith("gemma") and part.endswith("norm") else 0.0
        found[f"blk.{block}.{names[part]}.weight"] = weight + more
    return found


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_names_and_norms_of_other_families_are_those_of_transformers(
    architecture: str, kind: str, tmp_path: Path
) -> None:
    names, adapted = FAMILIES[architecture]
    sizes = {name: (WIDE,) if name.endswith("norm") else (2 * WIDE, WIDE) for name in names}
    weights, updates, lora = _model(_layer(*sizes.items()), adapted)
    save_file({key: weight.to(torch.bfloat16) for key, weight in weights.items()}, tmp_path / "base.safetensors")
    weights = {key: weight.to(torch.bfloat16).float() for key, weight in weights.items()}
    some = next(iter(updates))
    for without, code in (("none", 0), (some, 1)):
        merged = _as_llama_cpp_has_it(architecture, names, _merged(weights, updates, 1.0, without))
        after = _gguf(tmp_path / "merged.gguf", architecture, merged, kind)
        report = _judge(tmp_path, tmp_path / "base.safetensors", after, lora)
        assert report.exit_code == code, report.overall.text()
        assert report.untouched.missing == report.untouched.changed == (), report.untouched
    assert some.removesuffix(".weight") in report.overall.title


def test_a_norm_that_changed_is_seen_through_the_one_that_was_added(tmp_path: Path) -> None:
    names, adapted = FAMILIES["gemma2"]
    sizes = {name: (WIDE,) if name.endswith("norm") else (2 * WIDE, WIDE) for name in names}
    weights, updates, lora = _model(_layer(*sizes.items()), adapted)
    save_file(weights, tmp_path / "base.safetensors")
    merged = _as_llama_cpp_has_it("gemma2", names, _merged(weights, updates, 1.0))
    merged["blk.1.attn_norm.weight"][3] += 0.001
    after = _gguf(tmp_path / "merged.gguf", "gemma2", merged)
    report = _judge(tmp_path, tmp_path / "base.safetensors", after, lora)
    assert (report.exit_code, report.overall.code) == (1, "LH401")
    assert "layers.1.input_layernorm" in report.overall.title


@pytest.mark.parametrize("kind", ["F32", "F16"])
@pytest.mark.parametrize(
    ("architecture", "owner", "parts"),
    [
        ("qwen3moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
        ("qwen2moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
        ("llama", "block_sparse_moe", ("w1", "w3", "w2")),  # Mixtral
    ],
)
def test_experts_that_llama_cpp_stacks_are_judged_one_by_one(
    architecture: str, owner: str, parts: tuple[str, ...], kind: str, tmp_path: Path
) -> None:
    shapes = dict(zip(parts, ((96, WIDE), (96, WIDE), (WIDE, 96)), strict=True))
    layers = _layer(*((f"{owner}.experts.{e}.{part}", shape) for e in range(4) for part, shape in shapes.items()))
    weights, updates, lora = _model(layers, (parts[0], parts[2]))
    save_file(weights, tmp_path / "base.safetensors")
    some = f"model.layers.1.{owner}.experts.2.{parts[2]}.weight"
    for without, code in (("none", 0), (some, 1)):
        merged = _merged(weights, updates, 1.0, without)
        stacked = {
            f"blk.{block}.ffn_{name}_exps.weight": torch.stack(
                [merged[f"model.layers.{block}.{owner}.experts.{e}.{part}.weight"] for e in range(4)]
            )
            for block in range(BLOCKS) for name, part in zip(("gate", "up", "down"), parts, strict=True)
        }  # fmt: skip
        after = _gguf(tmp_path / "merged.gguf", architecture, stacked, kind)
        report = _judge(tmp_path, tmp_path / "base.safetensors", after, lora)
        assert report.exit_code == code, report.overall.text()
    assert f"experts.2.{parts[2]}" in report.overall.title


# where a block of each type keeps its scales in half precision: the rest may be any bytes
SCALES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q8_0": [0], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALES)
def test_weights_are_whole_numbers_of_steps(kind: str, tmp_path: Path) -> None:
    size, width = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    blocks = np.random.default_rng(0).integers(0, 256, (6, width), dtype=np.uint8)
    for at in SCALES[kind]:
        blocks[:, at : at + 2] = np.float16([0.01]).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", blocks.reshape(3, -1), raw_dtype=TYPES[kind])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    file = read_gguf(tmp_path / "x.gguf", model=True)
    step, offset = file.grid("blk.0.ffn_up.weight", 1, 3)
    weights = file.rows("blk.0.ffn_up.weight", 1, 3)
    assert weights.shape == step.shape == (2, 2 * size)
    codes = ((weights - offset) / step)[step != 0]
    assert torch.equal(codes, codes.round())
    assert codes.max() - codes.min() <= 255
    assert set(SCALES) == set(_CODES)
