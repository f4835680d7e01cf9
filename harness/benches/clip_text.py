"""transformers' own CLIP text encoder, tiny: two layers, and the embeddings that textual LoRAs may change.

The class with a projection (SDXL's second encoder) has its layers below `text_model`, as the keys of all LoRA files do;
the one without has not, since transformers 5.6.
"""

from __future__ import annotations

import torch

from harness.benches.bench import Bench

_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "token_embedding")
_WEIGHT_SEED = 23


def make() -> torch.nn.Module:
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
        torch.manual_seed(_WEIGHT_SEED)
        model: torch.nn.Module = CLIPTextModelWithProjection(config)
    return model


def run(model: torch.nn.Module) -> torch.Tensor:
    """Encode one fixed prompt of 6 tokens; returns [1, 6, 24]."""
    output: torch.Tensor = model(torch.tensor([[38, 3, 1, 4, 1, 39]])).last_hidden_state
    return output


BENCHES = (Bench("clip-text", make, _TARGETS, run, component="text_encoder"),)
