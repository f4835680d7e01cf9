"""transformers' own text models, tiny: CLIP's text encoder and GPT-2, whose layers store [in, out]."""

from __future__ import annotations

import torch

from harness.benches.bench import Bench

_CLIP_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "token_embedding")
_CLIP_SEED = 23


def make_clip_text() -> torch.nn.Module:
    """Build the encoder: 2 layers, width 24, 40 tokens."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=20,
        max_position_embeddings=12,
        bos_token_id=38,
        eos_token_id=39,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_CLIP_SEED)
        model: torch.nn.Module = CLIPTextModelWithProjection(config)
    return model


def run_clip_text(model: torch.nn.Module) -> torch.Tensor:
    """Encode one fixed prompt of 6 tokens; returns [1, 6, 24]."""
    output: torch.Tensor = model(torch.tensor([[38, 3, 1, 4, 1, 39]])).last_hidden_state
    return output


_GPT2_TARGETS = ("c_attn", "c_proj", "c_fc", "wte")
_GPT2_SEED = 24


def make_gpt2() -> torch.nn.Module:
    """Build the language model: 2 layers, width 24, 40 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=12, n_embd=24, n_layer=2, n_head=2, bos_token_id=38, eos_token_id=39)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_GPT2_SEED)
        model: torch.nn.Module = GPT2LMHeadModel(config)
    return model


def run_gpt2(model: torch.nn.Module) -> torch.Tensor:
    """Predict after one fixed sentence of 6 tokens; returns [1, 6, 40]."""
    output: torch.Tensor = model(torch.tensor([[38, 3, 1, 4, 1, 39]])).logits
    return output


BENCHES = (
    Bench("clip-text", make_clip_text, _CLIP_TARGETS, run_clip_text, component="text_encoder"),
    Bench("gpt2", make_gpt2, _GPT2_TARGETS, run_gpt2, (("c_attn", 3),), component=""),
)
