"""transformers' own GPT-2, tiny: `Conv1D` layers that store [in, out], and an embedding tied to the output layer."""

from __future__ import annotations

import torch

from harness.benches.bench import Bench

_TARGETS = ("c_attn", "c_proj", "c_fc", "wte")
_WEIGHT_SEED = 24


def make() -> torch.nn.Module:
    """Build the language model: 2 layers, width 24, 40 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=12, n_embd=24, n_layer=2, n_head=2, bos_token_id=38, eos_token_id=39)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_WEIGHT_SEED)
        model: torch.nn.Module = GPT2LMHeadModel(config)
    return model


def run(model: torch.nn.Module) -> torch.Tensor:
    """Predict after one fixed sentence of 6 tokens; returns [1, 6, 40]."""
    output: torch.Tensor = model(torch.tensor([[38, 3, 1, 4, 1, 39]])).logits
    return output


BENCHES = (Bench("gpt2", make, _TARGETS, run, (("c_attn", 3),), component=""),)
