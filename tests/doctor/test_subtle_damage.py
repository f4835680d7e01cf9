"""Subtle faults of a merge, each in one place of one layer: `verify --full` finds each and names the layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.doctor.verify.verify import MergeReport, verify_merge

BF16 = torch.bfloat16
RANK, ALPHA, WIDE, TALL = 8, 16.0, 96, 128
Tensors = dict[str, Tensor]


@dataclass
class Merge:
    """A base, the merge of a LoRA into it that is right, and the LoRA's own tensors."""

    base: Tensors = field(default_factory=dict)
    merged: Tensors = field(default_factory=dict)
    lora: Tensors = field(default_factory=dict)
    deltas: Tensors = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.draw = torch.Generator().manual_seed(11)

    def random(self, *shape: int, std: float = 0.02) -> Tensor:
        return torch.randn(*shape, generator=self.draw) * std

    def keep(self, key: str, *shape: int, dtype: torch.dtype = BF16) -> None:
        """Give the base a tensor that the LoRA leaves alone."""
        self.base[key] = self.random(*shape).to(dtype)

    def adapt(self, key: str, delta: Tensor, dtype: torch.dtype = BF16) -> None:
        """Give the base a weight and merge `delta` into it."""
        self.base[key] = self.random(*delta.shape).to(dtype)
        self.deltas[key] = delta
        self.merged[key] = (self.base[key].float() + delta).to(dtype)

    def pair(self, out: int, inputs: int, *kernel: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
        b = self.random(out, rank, *(1 for _ in kernel), std=0.03).to(BF16)
        return self.random(rank, inputs, *kernel, std=0.1).to(BF16), b

    def verified(self, folder: Path, name: str = "lora.safetensors") -> MergeReport:
        save_file(self.base, folder / "base.safetensors")
        save_file({**self.base, **self.merged}, folder / "merged.safetensors")
        (folder / name).parent.mkdir(exist_ok=True)
        save_file(self.lora, folder / name)
        if self.config:
            (folder / name).parent.joinpath("adapter_config.json").write_text(json.dumps(self.config))
        lora = (folder / name).parent if self.config else folder / name
        return verify_merge(folder / "base.safetensors", folder / "merged.safetensors", lora, full=True)


def product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return scale * (b.float().flatten(1) @ a.float().flatten(1)).reshape(*b.shape[:1], *a.shape[1:])


def language_model() -> Merge:
    """A language model's PEFT folder: pairs, a trained bias, token rows and a saved head."""
    made = Merge(config={
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "lora_only", "modules_to_save": ["lm_head"],
        "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], "rank_pattern": {"down_proj": 4},
        "alpha_pattern": {"down_proj": 2.0}, "trainable_token_indices": {"embed_tokens": [3, 9]},
    })  # fmt: skip
    for layer in range(2):
        for name, out, inputs in (("q_proj", WIDE, WIDE), ("k_proj", WIDE, WIDE), ("v_proj", WIDE, WIDE)):
            _add(made, f"model.layers.{layer}.self_attn.{name}", out, inputs, ALPHA / RANK)
        _add(made, f"model.layers.{layer}.mlp.down_proj", WIDE, TALL, 0.5, rank=4)
        made.keep(f"model.layers.{layer}.mlp.up_proj.weight", TALL, WIDE)
        made.keep(f"model.layers.{layer}.input_layernorm.weight", WIDE)
    key = "model.layers.1.self_attn.q_proj"
    made.base[f"{key}.bias"] = made.random(WIDE).to(BF16)
    made.lora[f"base_model.model.{key}.bias"] = bias = made.random(WIDE).to(BF16)
    made.merged[f"{key}.bias"] = bias.clone()
    made.keep("model.embed_tokens.weight", 40, WIDE)
    rows = made.random(2, WIDE).to(BF16)
    made.lora["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = rows
    made.merged["model.embed_tokens.weight"] = made.base["model.embed_tokens.weight"].clone()
    made.merged["model.embed_tokens.weight"][[3, 9]] = rows
    made.keep("lm_head.weight", 40, WIDE)
    made.lora["base_model.model.lm_head.weight"] = head = made.random(40, WIDE).to(BF16)
    made.merged["lm_head.weight"] = head.clone()
    return made


def _add(made: Merge, layer: str, out: int, inputs: int, scale: float, *, rank: int = RANK) -> None:
    a, b = made.pair(out, inputs, rank=rank)
    made.lora |= {f"base_model.model.{layer}.lora_A.weight": a, f"base_model.model.{layer}.lora_B.weight": b}
    made.adapt(f"{layer}.weight", product(a, b, scale))


def transformer() -> Merge:
    """A LoRA in diffusers' names, with q, k and v apart, merged into a model that stacks them."""
    made = Merge()
    for block in range(2):
        delta = []
        for name in ("to_q", "to_k", "to_v"):
            a, b = made.pair(WIDE, WIDE)
            stem = f"transformer.transformer_blocks.{block}.attn.{name}"
            made.lora |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b, f"{stem}.alpha": torch.tensor(ALPHA)}
            delta.append(product(a, b, ALPHA / RANK))
        made.adapt(f"double_blocks.{block}.img_attn.qkv.weight", torch.cat(delta))
        made.keep(f"double_blocks.{block}.img_attn.proj.weight", WIDE, WIDE)
        made.keep(f"double_blocks.{block}.img_attn.qkv.bias", 3 * WIDE)
    return made


def convolutions() -> Merge:
    """Kohya's LoCon: 3x3 and 1x1 convolutions and a linear layer of a U-Net."""
    made = Merge()
    layers = {"resnets_0_conv1": (3, 3), "resnets_1_conv1": (3, 3), "attentions_0_proj_in": (1, 1)}
    for flat, kernel in layers.items():
        a, b = made.pair(WIDE, 64, *kernel)
        stem = f"lora_unet_down_blocks_0_{flat}"
        made.lora |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(4.0)}
        name = f"down_blocks.0.{flat.replace('_0_', '.0.').replace('_1_', '.1.')}"
        made.adapt(f"{name}.weight", product(a, b, 4.0 / RANK))
        made.keep(f"{name}.bias", WIDE)
    return made


def quantised() -> Merge:
    """Scaled fp8, base and merge, each weight with its own scale beside."""
    made = Merge()
    for block in range(2):
        key = f"diffusion_model.blocks.{block}.self_attn.q"
        a, b = made.pair(WIDE, WIDE)
        made.lora |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(ALPHA)}
        weight, delta = made.random(WIDE, WIDE), product(a, b, ALPHA / RANK)
        for store, full in ((made.base, weight), (made.merged, None)):
            full = _read(made.base, f"blocks.{block}.self_attn.q") + delta if full is None else full
            _store(store, f"blocks.{block}.self_attn.q", full)
    return made


def _store(store: Tensors, layer: str, weight: Tensor) -> None:
    scale = weight.abs().max() / 448
    store |= {f"{layer}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{layer}.scale_weight": scale}


def _read(store: Tensors, layer: str) -> Tensor:
    return store[f"{layer}.weight"].float() * store[f"{layer}.scale_weight"]


def experts() -> Merge:
    """A mixture of experts, one by one."""
    made = Merge(
        config={"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["gate_proj", "up_proj"]}
    )
    for expert in range(4):
        for name in ("gate_proj", "up_proj"):
            _add(made, f"model.layers.0.mlp.experts.{expert}.{name}", TALL, WIDE, ALPHA / RANK)
    made.keep("model.layers.0.mlp.gate.weight", 4, WIDE)
    return made


BUILDERS: dict[str, Callable[[], Merge]] = {
    "llm": language_model, "dit": transformer, "conv": convolutions, "fp8": quantised, "moe": experts,
}  # fmt: skip
Q1, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
QKV, CONV = "double_blocks.1.img_attn.qkv.weight", "down_blocks.0.resnets.1.conv1.weight"
EXPERT = "model.layers.0.mlp.experts.2.gate_proj.weight"


def rows(key: str, start: int, stop: int, times: float) -> Callable[[Merge], str]:
    """Merge some rows of a layer `times` times."""

    def damage(made: Merge) -> str:
        part = made.base[key][start:stop].float() + times * made.deltas[key][start:stop]
        made.merged[key][start:stop] = part.to(made.merged[key].dtype)
        return key

    return damage


def delta_of(key: str, other: str, times: float = 1.0) -> Callable[[Merge], str]:
    """Merge another layer's change, or the own one with another alpha."""

    def damage(made: Merge) -> str:
        made.merged[key] = (made.base[key].float() + times * made.deltas[other]).to(made.merged[key].dtype)
        return key

    return damage


def element(key: str, value: float) -> Callable[[Merge], str]:
    def damage(made: Merge) -> str:
        made.merged[key].view(-1)[777] = value
        return key

    return damage


def base_of(key: str, index: int | None = None) -> Callable[[Merge], str]:
    """Take a tensor, or a row of it, of the base in place of the trained one."""

    def damage(made: Merge) -> str:
        at = slice(None) if index is None else index
        made.merged[key][at] = made.base[key][at]
        return key

    return damage


def slices(first: int, second: int) -> Callable[[Merge], str]:
    """Exchange what q, k or v changes."""

    def damage(made: Merge) -> str:
        parts = list(made.deltas[QKV].chunk(3))
        parts[first], parts[second] = parts[second], parts[first]
        made.merged[QKV] = (made.base[QKV].float() + torch.cat(parts)).to(BF16)
        return QKV

    return damage


def alone(key: str) -> Callable[[Merge], str]:
    """Change one element of a tensor that the LoRA leaves alone."""

    def damage(made: Merge) -> str:
        made.merged[key] = made.base[key].clone()
        made.merged[key].view(-1)[5] += 0.25
        return key

    return damage


def one_of(key: str) -> Callable[[Merge], str]:
    """Change one element of a tensor that the LoRA brings."""

    def damage(made: Merge) -> str:
        made.merged[key][5] += 0.25
        return key

    return damage


def transposed(made: Merge) -> str:
    made.merged[Q1] = (made.base[Q1].float() + made.deltas[Q1].T).to(BF16)
    return Q1


def turned_kernel(made: Merge) -> str:
    made.merged[CONV] = (made.base[CONV].float() + made.deltas[CONV].transpose(2, 3)).to(BF16)
    return CONV


def _fp8(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Merge], str]:
    def damage(made: Merge) -> str:
        layer = "blocks.1.self_attn.q"
        base = _read(made.base, layer)
        _store(made.merged, layer, change(base, _read(made.merged, layer) - base))
        return f"{layer}.weight"

    return damage


def other_scale(made: Merge) -> str:
    made.merged["blocks.1.self_attn.q.scale_weight"] = made.merged["blocks.1.self_attn.q.scale_weight"] * 1.25
    return "blocks.1.self_attn.q.weight"


def _head_of(base: Tensor, change: Tensor) -> Tensor:
    return torch.cat([base[:8], (base + change)[8:]])


DAMAGES: dict[str, tuple[str, Callable[[Merge], str]]] = {
    "one row unmerged": ("llm", rows(Q1, 41, 42, 0.0)),
    "one row doubled": ("llm", rows(Q1, 41, 42, 2.0)),
    "the last row reversed": ("llm", rows(Q1, WIDE - 1, WIDE, -1.0)),
    "one NaN": ("llm", element(Q1, float("nan"))),
    "one infinite element": ("llm", element(DOWN, float("inf"))),
    "a neighbour's change": ("llm", delta_of(Q1, "model.layers.0.self_attn.q_proj.weight")),
    "v's change in k": (
        "llm",
        delta_of("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"),
    ),
    "the alpha of the other modules": ("llm", delta_of(DOWN, DOWN, ALPHA / 4 / 0.5)),
    "five percent too strong": ("llm", delta_of(DOWN, DOWN, 1.05)),
    "a transposed change": ("llm", transposed),
    "one token row of the base": ("llm", base_of("model.embed_tokens.weight", 9)),
    "one row of the saved head": ("llm", base_of("lm_head.weight", 17)),
    "a bias of the base": ("llm", base_of("model.layers.1.self_attn.q_proj.bias")),
    "one element of a bias": (
        "llm",
        one_of("model.layers.1.self_attn.q_proj.bias"),
    ),
    "a norm changed": ("llm", alone("model.layers.0.input_layernorm.weight")),
    "an untouched layer changed": ("llm", alone("model.layers.0.mlp.up_proj.weight")),
    "q and k exchanged": ("dit", slices(0, 1)),
    "k and v exchanged": ("dit", slices(1, 2)),
    "v unmerged": ("dit", rows(QKV, 2 * WIDE, 3 * WIDE, 0.0)),
    "the last row of k unmerged": ("dit", rows(QKV, 2 * WIDE - 1, 2 * WIDE, 0.0)),
    "the bias beside changed": ("dit", alone("double_blocks.0.img_attn.qkv.bias")),
    "one filter unmerged": ("conv", rows(CONV, 7, 8, 0.0)),
    "a filter doubled": ("conv", rows(CONV, 7, 8, 2.0)),
    "a turned kernel": ("conv", turned_kernel),
    "another convolution's change": ("conv", delta_of(CONV, "down_blocks.0.resnets.0.conv1.weight")),
    "eight rows of codes unmerged": ("fp8", _fp8(_head_of)),
    "codes merged twice": ("fp8", _fp8(lambda base, change: base + 2 * change)),
    "another scale beside the codes": ("fp8", other_scale),
    "one expert unmerged": ("moe", base_of(EXPERT)),
    "one row of one expert": ("moe", rows(EXPERT, 100, 101, 0.0)),
    "another expert's change": ("moe", delta_of(EXPERT, EXPERT.replace(".2.", ".3."))),
    "the router changed": ("moe", alone("model.layers.0.mlp.gate.weight")),
}


def name_of(case: str) -> str:
    return "lora/adapter_model.safetensors" if case in ("llm", "moe") else "lora.safetensors"


@pytest.mark.parametrize("case", BUILDERS)
def test_the_right_merge_passes(case: str, tmp_path: Path) -> None:
    report = BUILDERS[case]().verified(tmp_path, name_of(case))
    assert report.exit_code == 0, report.overall


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_subtle_fault_is_found_and_its_layer_named(damage: str, tmp_path: Path) -> None:
    case, apply = DAMAGES[damage]
    made = BUILDERS[case]()
    key = apply(made)
    report = made.verified(tmp_path, name_of(case))
    assert report.exit_code == 1, report.overall
    said = " ".join(str(verdict) for verdict in report.verdicts if verdict.outcome == "failed")
    layer = key.removesuffix(".weight").removesuffix(".bias").removeprefix("model.")
    names = {layer, layer.replace(".", "_"), f"transformer_blocks.{key.split('.')[1]}.attn."}  # as the LoRA spells it
    assert any(name in said for name in names), said
