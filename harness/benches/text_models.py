"""transformers' own text models, tiny: CLIP's text encoder, GPT-2, whose layers store [in, out], and Llama."""

from __future__ import annotations

from typing import Any

import torch

from harness.benches.bench import Bench, Noise

_TOKENS = [[38, 3, 1, 4, 1, 39]]
_SPECIAL = {"vocab_size": 40, "bos_token_id": 38, "eos_token_id": 39}


def make_clip_text() -> Any:
    """Build the encoder: 2 layers, width 24, 40 tokens."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=20,
        max_position_embeddings=12,
        **_SPECIAL,
    )
    return CLIPTextModelWithProjection(config)


def run_clip_text(model: Any, noise: Noise) -> Any:
    """Encode one fixed prompt of 6 tokens; returns [1, 6, 24]."""
    return model(torch.tensor(_TOKENS)).last_hidden_state


def make_gpt2() -> Any:
    """Build the language model: 2 layers, width 24, 40 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_positions=12, n_embd=24, n_layer=2, n_head=2, **_SPECIAL))


def run_gpt2(model: Any, noise: Noise) -> Any:
    """Predict after one fixed sentence of 6 tokens; returns [1, 6, 40]."""
    return model(torch.tensor(_TOKENS)).logits


def make_tiny_llama() -> Any:
    """Build the language model: 2 layers, width 32, 4 heads of which 2 have keys, 40 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.15,
        bos_token_id=38,
        eos_token_id=39,
    )
    return LlamaForCausalLM(config)


def run_tiny_llama(model: Any, noise: Noise) -> Any:
    """Predict after each of 6 tokens; returns [1, 6, 40]."""
    return model(torch.tensor(_TOKENS)).logits


_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_CLIP_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "token_embedding")
_GPT2 = ("c_attn", "c_proj", "c_fc", "wte")
BENCHES = (
    Bench("clip-text", 23, make_clip_text, _CLIP_TEXT, run_clip_text, component="text_encoder"),
    Bench("gpt2", 24, make_gpt2, _GPT2, run_gpt2, (("c_attn", 3),), component=""),
    Bench("tiny-llama", 27, make_tiny_llama, _LLAMA, run_tiny_llama, component=""),
)
