"""Key layouts that tools write: those seen in public places (`layouts.jsonl`), and more by the rules of each tool.

`layouts.jsonl` has the names, dtypes, metadata and configurations as they were seen; sides of tensors are cut to 128,
and of many layers alike a few are left.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fixtures.build_malformed import tensors_file

_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """One file: its name, where it was seen, its tensors as (key, dtype, shape, constant or None)."""

    name: str
    source: str
    tensors: tuple[tuple[str, str, tuple[int, ...], float | None], ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    file: str | None = None

    def write(self, folder: Path) -> Path:
        """Write the file, or the folder with its configuration, and return it."""
        path = folder / f"{self.name}.safetensors"
        if self.config is not None:
            (folder / self.name).mkdir()
            (folder / self.name / "adapter_config.json").write_text(json.dumps(self.config), encoding="utf-8")
            path = folder / self.name / (self.file or "adapter_model.safetensors")
        entries = {
            key: (dtype, list(shape), _bytes(key, dtype, shape, fill)) for key, dtype, shape, fill in self.tensors
        }
        path.write_bytes(tensors_file(entries, dict(self.metadata)))
        return folder / self.name if self.config is not None else path


def _bytes(key: str, dtype: str, shape: tuple[int, ...], fill: float | None) -> bytes:
    number = math.prod(shape)
    values = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(number).astype("<f4") * np.float32(0.02)
    if fill is not None:
        values = np.full(number, fill, "<f4")
    if dtype == "BF16":
        return (values.view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype("<f2" if dtype == "F16" else "<f4").tobytes()


def seen() -> Iterator[Layout]:
    """Yield the layouts that were seen in public places."""
    for line in Path(__file__).with_name("layouts.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        row["tensors"] = tuple(
            (key, dtype, tuple(shape), *fill, *[None][len(fill) :]) for key, dtype, shape, *fill in row["tensors"]
        )
        yield Layout(**row)


def of(name: str, shapes: Shapes, **fields: Any) -> Layout:
    """Return a layout of float32 tensors; alpha is 4."""
    rows = ((key, "F32", shape, 4.0 if key.endswith("alpha") else None) for key, shape in shapes.items())
    return Layout(name, "the tool's own code", tuple(rows), **fields)


def pairs(names: str, down: str = "lora_A.weight", up: str = "lora_B.weight", *, alpha: bool = False) -> Shapes:
    """Return the shapes of pairs of rank 8 for names separated by blanks."""
    found: dict[str, tuple[int, ...]] = {}
    for name in names.split():
        found |= {f"{name}.{down}": (8, 32), f"{name}.{up}": (48, 8)} | ({f"{name}.alpha": ()} if alpha else {})
    return found


KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": True}
_LLM = "base_model.model.model.layers.0"
_CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 4, "target_modules": ["q_proj"]}
_MLX = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0}}


BUILT = (
    of(
        "sd3_sd_scripts",
        pairs(
            "lora_unet_joint_blocks_0_x_block_attn_qkv lora_te1_text_model_encoder_layers_0_mlp_fc1 "
            "lora_te2_text_model_encoder_layers_0_mlp_fc1 lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            **KOHYA,
        ),
    ),
    of("lumina_sd_scripts", pairs("lora_unet_layers_0_attention_qkv lora_te_layers_0_self_attn_q_proj", **KOHYA)),
    of("wan22_musubi_high_noise", pairs("lora_unet_blocks_0_self_attn_q lora_unet_blocks_0_ffn_0", **KOHYA)),
    of(
        "stable_cascade_onetrainer",
        pairs(
            "lora_prior_unet_down_blocks_0_1_attention_attn_to_q lora_prior_te_text_model_encoder_layers_0_mlp_fc1",
            **KOHYA,
        ),
    ),
    of(
        "onetrainer_sdxl_omi",
        {
            **pairs(
                "unet.output_blocks.0.1.transformer_blocks.0.attn1.to_q clip_l.text_model.encoder.layers.0.mlp.fc1 "
                "clip_g.text_model.encoder.layers.0.mlp.fc1",
                **KOHYA,
            ),
            "bundle_emb.cat.clip_l": (2, 32),
            "bundle_emb.cat.clip_g": (2, 48),
        },
    ),
    of(
        "ltx2_connectors",
        {
            **pairs(
                "diffusion_model.transformer_blocks.0.attn1.to_q diffusion_model.connectors.video.0.attn.to_q", **KOHYA
            ),
            **pairs("text_embedding_projection.aggregate_embed", **KOHYA),
        },
    ),
    of(
        "lightx2v_distilled",
        {
            **pairs(
                "diffusion_model.blocks.0.self_attn.q diffusion_model.blocks.0.ffn.0",
                "lora_down.weight",
                "lora_up.weight",
            ),
            "diffusion_model.blocks.0.self_attn.q.diff_b": (48,),
            "diffusion_model.blocks.0.norm3.diff": (32,),
        },
    ),
    of("qwen_lightning_bare", pairs("transformer_blocks.0.attn.to_q transformer_blocks.1.attn.to_q", **KOHYA)),
    of(
        "simpletuner_lycoris_lokr",
        {
            "lycoris_transformer_blocks_0_attn_to_q.lokr_w1": (4, 4),
            "lycoris_transformer_blocks_0_attn_to_q.lokr_w2": (8, 8),
            "lycoris_transformer_blocks_0_attn_to_q.alpha": (),
        },
    ),
    of(
        "lycoris_loha_tucker",
        {
            f"lora_unet_down_blocks_0_resnets_0_conv1.{part}": shape
            for part, shape in {
                "hada_w1_a": (8, 48),
                "hada_w1_b": (8, 32),
                "hada_w2_a": (8, 48),
                "hada_w2_b": (8, 32),
                "hada_t1": (8, 8, 3, 3),
                "hada_t2": (8, 8, 3, 3),
                "alpha": (),
            }.items()
        },
    ),
    of("lycoris_full", {"lora_unet_mid_block_attentions_0_proj_in.diff": (48, 32)}),
    of(
        "lycoris_ia3",
        {"lora_unet_mid_block_attentions_0_to_k.weight": (32,), "lora_unet_mid_block_attentions_0_to_k.on_input": ()},
    ),
    of(
        "lycoris_glora",
        {
            f"lora_unet_mid_block_attentions_0_proj_in.{part}": shape
            for part, shape in {
                "a1.weight": (8, 32),
                "a2.weight": (32, 8),
                "b1.weight": (8, 32),
                "b2.weight": (48, 8),
                "alpha": (),
            }.items()
        },
    ),
    of(
        "lycoris_boft",
        {
            "lora_unet_mid_block_attentions_0_proj_in.oft_blocks": (2, 4, 8, 8),
            "lora_unet_mid_block_attentions_0_proj_in.alpha": (),
        },
    ),
    of(
        "musubi_torch_compile",
        pairs("lora_unet__orig_mod_blocks_0_self_attn_q lora_unet__orig_mod_blocks_0_ffn_0", **KOHYA),
    ),
    of("diffusers_torch_compile", pairs("transformer._orig_mod.transformer_blocks.0.attn.to_q")),
    of("peft_ddp", pairs("base_model.model.module.model.layers.0.self_attn.q_proj"), config=_CONFIG),
    of(
        "peft_fsdp",
        pairs("_fsdp_wrapped_module.base_model.model.model.layers.0._checkpoint_wrapped_module.mlp.up_proj"),
        config=_CONFIG,
    ),
    of(
        "peft_in_memory",
        pairs(f"{_LLM}.self_attn.q_proj", "lora_A.default.weight", "lora_B.default.weight"),
        config=_CONFIG,
    ),
    of(
        "unsloth_vision",
        pairs(
            "base_model.model.model.language_model.layers.0.self_attn.q_proj "
            "base_model.model.model.visual.blocks.0.attn.qkv"
        ),
        config={**_CONFIG, "target_modules": r"(?:.*?(?:language|visual).*?)"},
    ),
    of(
        "llama_factory_head",
        {
            **pairs(f"{_LLM}.self_attn.q_proj"),
            "base_model.model.model.embed_tokens.weight": (64, 32),
            "base_model.model.lm_head.weight": (64, 32),
        },
        config={**_CONFIG, "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    of(
        "axolotl_dora",
        {
            **pairs(f"{_LLM}.self_attn.q_proj"),
            f"{_LLM}.self_attn.q_proj.lora_magnitude_vector": (48,),
        },
        config={**_CONFIG, "use_dora": True},
    ),
    of(
        "peft_bias_all",
        {
            **pairs(f"{_LLM}.self_attn.q_proj"),
            f"{_LLM}.self_attn.q_proj.base_layer.bias": (48,),
            f"{_LLM}.norm.bias": (32,),
        },
        config={**_CONFIG, "bias": "all"},
    ),
    of("peft_bare_ia3", {f"{_LLM}.self_attn.k_proj.ia3_l": (32, 1)}, config={"peft_type": "IA3"}),
    of(
        "peft_vera",
        {
            f"{_LLM}.self_attn.k_proj.vera_lambda_b": (48,),
            f"{_LLM}.self_attn.k_proj.vera_lambda_d": (8,),
            "base_model.vera_A": (8, 32),
            "base_model.vera_B": (48, 8),
        },
        config={"peft_type": "VERA", "r": 8},
    ),
    of("peft_prompt_tuning", {"prompt_embeddings": (8, 32)}, config={"peft_type": "PROMPT_TUNING"}),
    of(
        "peft_adalora",
        {
            f"{_LLM}.self_attn.q_proj.lora_A": (8, 32),
            f"{_LLM}.self_attn.q_proj.lora_B": (48, 8),
            f"{_LLM}.self_attn.q_proj.lora_E": (8, 1),
        },
        config={
            "peft_type": "ADALORA",
            "r": 8,
            "lora_alpha": 4,
            "rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True] * 8},
        },
    ),
    of(
        "automodel_experts",
        {
            f"{_LLM}.mlp.experts.lora_gate_and_up_A": (4, 32, 8),
            f"{_LLM}.mlp.experts.lora_gate_and_up_B": (4, 8, 96),
            f"{_LLM}.mlp.experts.lora_down_A": (4, 48, 8),
            f"{_LLM}.mlp.experts.lora_down_B": (4, 8, 32),
            **pairs(f"{_LLM}.self_attn.q_proj"),
        },
        config=_CONFIG,
    ),
    of("torchtune", pairs("layers.0.attn.q_proj layers.1.attn.q_proj", "lora_a.weight", "lora_b.weight")),
    of("loralib", pairs("h.0.attn.c_attn h.1.attn.c_attn", "lora_A", "lora_B")),
    of(
        "nemo_bridge",
        pairs("decoder.layers.0.self_attention.linear_qkv", "adapter.linear_in.weight", "adapter.linear_out.weight"),
    ),
    of(
        "nunchaku",
        {"transformer_blocks.0.qkv_proj.lora_down": (32, 16), "transformer_blocks.0.qkv_proj.lora_up": (96, 16)},
    ),
    of(
        "mlx_step",
        {"model.layers.0.self_attn.q_proj.lora_a": (32, 8), "model.layers.0.self_attn.q_proj.lora_b": (8, 48)},
        config=_MLX,
        file="0000200_adapters.safetensors",
    ),
    of(
        "mlx_before_june_2024",
        {"model.layers.0.self_attn.q_proj.lora_a": (32, 8), "model.layers.0.self_attn.q_proj.lora_b": (8, 48)},
        config={**_MLX, "lora_parameters": {"rank": 8, "alpha": 16.0, "dropout": 0.0, "scale": 10.0}},
        file="adapters.safetensors",
    ),
    of(
        "mlx_vlm",
        {
            "language_model.model.layers.0.self_attn.q_proj.A": (32, 8),
            "language_model.model.layers.0.self_attn.q_proj.B": (8, 48),
        },
        config={"rank": 8, "alpha": 0.1, "dropout": 0.1},
        file="adapters.safetensors",
    ),
    of(
        "fused_beside_split",
        pairs("diffusion_model.layers.0.attention.qkv diffusion_model.layers.0.attention.to_q", **KOHYA),
    ),
    of(
        "old_diffusers_bare",
        pairs("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "lora.down.weight", "lora.up.weight"),
    ),
)
"""Layouts written by the rules of the tools that write them."""


def foreign() -> Iterator[tuple[Layout, str]]:
    """Yield intact files that are no LoRA, with what they must be called."""
    yield (
        of("full_llm", {"model.embed_tokens.weight": (64, 32), "model.layers.0.self_attn.q_proj.weight": (48, 32)}),
        "full checkpoint",
    )
    yield (
        of("full_flux", {"double_blocks.0.img_attn.qkv.weight": (96, 32), "double_blocks.0.img_attn.qkv.bias": (96,)}),
        "full checkpoint",
    )
    yield of("vae", {"decoder.conv_in.weight": (4, 4, 3, 3), "decoder.conv_in.bias": (4,)}), "full checkpoint"
    yield (
        of("krea2_full", {"blocks.0.mlp.down.weight": (32, 64), "blocks.0.mlp.up.weight": (64, 32)}),
        "full checkpoint",
    )
    yield of("embedding_sdxl", {"clip_l": (4, 32), "clip_g": (4, 48)}), "textual-inversion"
    yield of("embedding_sd15", {"emb_params": (4, 32)}), "textual-inversion"
    yield of("embedding_diffusers", {"<cat>": (32,)}), "textual-inversion"
    yield of("ip_adapter", {"image_proj.proj.weight": (64, 32), "ip_adapter.1.to_k_ip.weight": (48, 32)}), "IP-Adapter"
    yield of("soft_prompt", {"prompt_embeddings": (8, 32)}), "prompt tuning"
