"""Merges that PEFT itself makes of small language models: every kind of adapter, right ones and wrong ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

Tensors = dict[str, Tensor]
Change = Callable[[Tensors, Tensors], None]  # edits the merged tensors, given the base's
_LLAMA: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 160, "pad_token_id": 0,
}  # fmt: skip


def llama(*, tie: bool = False, bias: bool = False, classes: int = 0) -> PreTrainedModel:
    torch.manual_seed(1)
    config = LlamaConfig(**_LLAMA, tie_word_embeddings=tie, attention_bias=bias, num_labels=classes or 2)
    model = LlamaForSequenceClassification(config) if classes else LlamaForCausalLM(config)
    return with_biases(model)


def gpt2() -> PreTrainedModel:
    torch.manual_seed(1)
    return with_biases(GPT2LMHeadModel(GPT2Config(n_embd=96, n_layer=2, n_head=4, vocab_size=150)))


def with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """Draw the biases, which are zero at first."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.05)
    return model


def lora(**fields: Any) -> peft.PeftConfig:
    return peft.LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], **fields})


_TARGETS = ["q_proj", "down_proj"]
METHODS: dict[str, Callable[[], peft.PeftConfig]] = {
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj", "down_proj", "k_proj"], r=8),
    "vera without its projection": lambda: peft.VeraConfig(target_modules=_TARGETS, r=8, save_projection=False),
    "oft": lambda: peft.OFTConfig(target_modules=_TARGETS, oft_block_size=16, r=0),
    "boft": lambda: peft.BOFTConfig(target_modules=_TARGETS, boft_block_size=8, boft_n_butterfly_factor=1),
    "hra": lambda: peft.HRAConfig(target_modules=_TARGETS, r=4),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=_TARGETS, init_r=6, target_r=4, lora_alpha=12, total_step=10),
    "frod": lambda: peft.FrodConfig(target_modules=_TARGETS),
    "psoft": lambda: peft.PsoftConfig(target_modules=_TARGETS, r=4),
    "tinylora of one vector": lambda: peft.TinyLoraConfig(target_modules=_TARGETS, weight_tying=1.0),
    "fourierft": lambda: peft.FourierFTConfig(target_modules=_TARGETS, n_frequency=200, scaling=150.0),
    "loha": lambda: peft.LoHaConfig(target_modules=_TARGETS, r=4, alpha=8),
    "lokr": lambda: peft.LoKrConfig(target_modules=_TARGETS, r=4, alpha=8),
}


@torch.no_grad()
def drawn(model: Any, size: float) -> None:
    """Give every trained parameter values of its kind: small random steps from where training began."""
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or "ranknum" in name:
            continue
        noise = torch.randn_like(parameter, dtype=torch.float32) * size
        begun = parameter.float()
        if "lora_B" in name or "lora_embedding_A" in name or "hada_w" in name or "lokr_w" in name:
            begun = begun + noise
        elif "fourierft_spectrum" in name or "lora_E" in name or "lora_A" in name:
            begun = begun + 10 * noise
        else:
            begun = begun + noise
        parameter.copy_(begun.to(parameter.dtype))


def write(
    folder: Path,
    model: PreTrainedModel,
    config: peft.PeftConfig,
    *,
    dtype: torch.dtype = torch.float32,
    size: float = 0.05,
    change: Change | None = None,
    safe_merge: bool = False,
    before: Callable[[Any], None] = lambda model: None,
) -> tuple[Path, Path, Path]:
    """Write base, merged and lora; `change` edits the merged tensors, `before` the adapted model before it is saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model.to(dtype)
        model.save_pretrained(folder / "base")
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        adapted = peft.get_peft_model(model, config)
        drawn(adapted, size)
        before(adapted)
        adapted.save_pretrained(folder / "lora")
        merged: nn.Module = adapted.merge_and_unload(safe_merge=safe_merge)
        if change:
            tensors = dict(merged.state_dict())
            with torch.no_grad():
                change(tensors, base)
        merged.save_pretrained(folder / "merged")  # type: ignore[operator]
    return folder / "base", folder / "merged", folder / "lora"


def lost(name: str) -> Change:
    """Return a change that puts the base's tensor `name` back."""
    return lambda merged, base: [merged[key].copy_(base[key]) for key in merged if name in key and key in base] and None  # type: ignore[func-returns-value]


def scaled(name: str, factor: float) -> Change:
    """Return a change that applies the update of `name` `factor` times."""

    def change(merged: Tensors, base: Tensors) -> None:
        for key in merged:
            if name in key and key in base:
                merged[key].copy_(base[key] + factor * (merged[key] - base[key]))

    return change
