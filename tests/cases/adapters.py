"""PEFT folders, right and ill, over one tiny Llama: what a person finds, with the hazards that `inspect` must name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

Weights = dict[str, Tensor]
KEY = "base_model.model.model.layers.3.self_attn.q_proj.lora_%s.weight"
DOWN = "base_model.model.model.layers.3.mlp.down_proj.lora_B.weight"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Case:
    """One folder: how PEFT writes it, what is done to it, and the codes that say so (of `inspect --base`).

    `exit` is inspect's exit code.
    """

    name: str
    exit: int = 0
    codes: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    weights: Callable[[Weights], Weights] = lambda weights: weights
    config: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config
    folder: Callable[[Path], None] = lambda folder: None


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=96,
        )
    )


def write(case: Case, folder: Path) -> Path:
    wanted = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base_model(), LoraConfig(**{**wanted, **case.options}))
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            parameter.data = torch.randn_like(parameter) * 0.02
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that embeddings are saved too
        model.save_pretrained(folder)
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = case.weights(load_file(file))
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})
    config.write_text(json.dumps(case.config(json.loads(config.read_text()))))
    case.folder(folder)
    return folder


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key.replace(old, new): value for key, value in weights.items()}


def changed(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, key: change(weights[key].clone())}


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: value for key, value in weights.items() if part not in key}


def at(place: Any, value: float) -> Callable[[Tensor], Tensor]:
    def put(tensor: Tensor) -> Tensor:
        tensor[place] = value
        return tensor

    return put


def with_fields(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda config: {**config, **fields}


def only_bin(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def stale_bin(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    torch.save({key: value * 0 for key, value in weights.items()}, folder / "adapter_model.bin")


def cut_short(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 12345\n"
    (folder / "adapter_model.safetensors").write_text(text)


def cut_config(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(file.read_text()[:100])


CASES = (
    Case("ok"),
    Case("no_config", 1, ("LH701", "LH720"), folder=lambda d: (d / "adapter_config.json").unlink()),
    Case("bad_json", 2, ("LH799",), folder=cut_config),
    Case("no_alpha", config=lambda c: {key: value for key, value in c.items() if key != "lora_alpha"}),
    Case("r_mismatch", 1, ("LH706",), config=with_fields(r=16)),
    Case("targets_wrong", 1, ("LH720",), config=with_fields(target_modules=["k_proj"])),
    Case(
        "targets_foreign", 0, ("LH718",), weights=renamed("self_attn.q_proj", "attn.c_attn"),
        config=with_fields(target_modules=["c_attn", "v_proj", "down_proj"]),
    ),
    Case("prefix_vlm", 1, ("LH720",), weights=renamed("model.model.layers", "model.model.language_model.layers")),
    Case("prefix_none", 1, ("LH720",), weights=renamed(PREFIX, "")),
    Case("prefix_orig_mod", 1, ("LH712",), weights=renamed("model.model.layers", "model._orig_mod.model.layers")),
    Case("default_in_keys", weights=lambda w: {k.replace(".weight", ".default.weight"): v for k, v in w.items()}),
    Case("layer_99", 0, ("LH718", "LH721"), weights=renamed("layers.5.", "layers.99.")),
    Case("missing_B", 1, ("LH706",), weights=without(KEY % "B")),
    Case("missing_layer", 0, ("LH721",), weights=without("layers.3.self_attn.q_proj")),
    Case("wrong_shape", 1, ("LH719",), weights=changed(KEY % "A", lambda t: torch.cat([t, t], 1))),
    Case("shapes_ab", 1, ("LH706",), weights=changed(KEY % "A", lambda t: t[:4])),
    Case("nan", 1, ("LH707",), weights=changed(KEY % "B", at((3, 4), float("nan")))),
    Case("inf", 1, ("LH707",), weights=changed(KEY % "B", at((3, 4), float("inf")))),
    Case("all_B_zero", 1, ("LH713",), weights=lambda w: {k: v * ("lora_B" not in k) for k, v in w.items()}),
    Case("one_B_zero", 0, ("LH714",), weights=changed(KEY % "B", lambda t: t * 0)),
    Case("spike", 0, ("LH717",), weights=changed(KEY % "B", at((3, 4), 200.0))),
    Case("spike_row", 0, ("LH717",), weights=changed(DOWN, at((slice(0, 4), 0), 2.0))),
    Case("huge", 0, ("LH717",), weights=changed(KEY % "B", lambda t: t * 100)),
    Case("r64", options={"r": 64, "lora_alpha": 64, "target_modules": ["q_proj"]}),
    Case("r48", options={"r": 48, "lora_alpha": 48}),
    Case("dora", options={"use_dora": True}),
    Case("rslora", options={"use_rslora": True}),
    Case("rslora_r64", options={"use_rslora": True, "r": 64, "lora_alpha": 64}),
    Case("bias_all", options={"bias": "all"}),
    Case("lora_bias", 0, ("LH721",), config=with_fields(lora_bias=True)),
    Case("mts_head", options={"modules_to_save": ["lm_head"]}),
    Case("mts_embed_head", options={"modules_to_save": ["lm_head", "embed_tokens"]}),
    Case("lora_embed_head", options={"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    Case("tti", options={"trainable_token_indices": [1, 2]}),
    Case(
        "rank_pattern", 0, ("LH703",),
        options={"rank_pattern": {"layers.3.self_attn.q_proj": 32}, "alpha_pattern": {"v_proj": 4}},
    ),
    Case("target_o_only", options={"target_modules": ["o_proj"]}),
    Case("all_linear", options={"target_modules": "all-linear"}),
    Case("fp8_store", weights=lambda w: {k: v.to(torch.float8_e4m3fn) for k, v in w.items()}),
    Case("pissa", 0, ("LH723",), options={"init_lora_weights": "pissa"}),
    Case("alora", 0, ("LH723",), options={"alora_invocation_tokens": [3, 4]}),
    Case("unk_field", config=with_fields(quantum_lora=True, peft_version="9.9.9")),
    Case("peft_type", 1, ("LH720",), config=with_fields(peft_type="OFT")),
    Case("bin_only", 2, ("LH799",), folder=only_bin),
    Case("both_files", 0, ("LH722",), folder=stale_bin),
    Case("truncated", 2, ("LH799",), folder=cut_short),
    Case("lfs_pointer", 2, ("LH797",), folder=pointer),
    Case("base_other", config=with_fields(base_model_name_or_path="meta-llama/Llama-3.1-8B")),
    Case("unquoted_alpha", 1, ("LH705",), config=with_fields(lora_alpha="16")),
    Case("alpha0", 1, ("LH705",), config=with_fields(lora_alpha=0)),
)  # fmt: skip
