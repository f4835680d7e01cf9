"""The files that `benchmarks.peers` asks about: a small language model of random shape, its adapters and merges."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from tests.doctor.peft_merges import drawn, lora, lost, scaled

if TYPE_CHECKING:
    from benchmarks.peers import Case

ADAPTER = "adapter_model.safetensors"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
RANKS = {"r": 32, "lora_alpha": 8, "target_modules": TARGETS}
# how alpha and rank are told
SCALES: dict[str, dict[str, Any]] = {
    "alpha / rank": {},
    "rsLoRA": {"use_rslora": True},
    "other ranks and alphas in some layers": {"rank_pattern": {"up_proj": 12}, "alpha_pattern": {"q_proj": 50}},
}
MERGES = {
    "right": None,
    "a layer left out": lost("layers.1.self_attn.v_proj"),
    "one layer twice": scaled("layers.2.mlp.up_proj", 2),
    "alpha ignored": scaled("layers", RANKS["r"] / RANKS["lora_alpha"]),  # type: ignore[operator]
}


def model(draw: random.Random, *, quick: bool) -> Any:
    """Return a Llama model in bfloat16, of some 100 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    heads = draw.randrange(4, 8) * 2
    hidden, wide, layers = 64 * heads, draw.randrange(2048, 4096), 3 if quick else draw.randrange(6, 9)
    sizes = {"hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers, "vocab_size": 1000}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=2)).bfloat16()


def merges(folder: Path, draw: random.Random, *, quick: bool) -> list[Case]:
    """Write the base, the adapter of every kind, and merges of the first by PEFT, right and wrong."""
    from peft import get_peft_model

    from benchmarks.peers import Case

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        bare = model(draw, quick=quick)
        bare.save_pretrained(folder / "base")
        base = {name: tensor.clone() for name, tensor in bare.state_dict().items()}
        for number, fields in enumerate(SCALES.values()):
            bare.load_state_dict(base)
            adapted = get_peft_model(bare, lora(**{**RANKS, **fields}))
            drawn(adapted, 0.01)
            adapted.save_pretrained(folder / f"lora-{number}")
            if number == 0:
                (folder / "norms").mkdir()
                cases = [written(folder, adapted, base, what, change) for what, change in MERGES.items()]
            bare = adapted.unload()
    return [Case(what, {"base": folder / "base", **paths}, what == "right") for what, paths in cases]


def written(folder: Path, adapted: Any, base: Any, what: str, change: Callable[..., None] | None) -> Any:
    """Write one merge, and leave the model as it was."""
    adapted.merge_adapter()
    merged = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.clone()
        for name, tensor in adapted.state_dict().items()
        if "lora_" not in name
    }
    adapted.unmerge_adapter()
    if change:
        change(merged, base)
    place = folder / what.replace(" ", "-")
    place.mkdir()
    save_file(merged, place / "model.safetensors")
    (place / "config.json").write_bytes((folder / "base" / "config.json").read_bytes())
    return what, {"merged": place, "lora": folder / "lora-0"}


def scaled_files(folder: Path) -> list[Case]:
    """Return the adapters and the norm of every update, from the dense product in float64."""
    from benchmarks.peers import Case
    from harness.files import read_lora

    cases = []
    for number, what in enumerate(SCALES):
        adapter = read_lora(folder / f"lora-{number}")
        norms = {}
        for name, module in adapter.modules.items():
            a, b = (half.double() for half in adapter.tensors(name))
            norms[name] = module.trained_scale * float((b @ a).square().sum().sqrt())
        cases.append(Case(what, {"base": folder / "base", "lora": folder / f"lora-{number}"}, norms))
    return cases


def broken_files(folder: Path) -> list[Case]:
    """Write the first adapter in order, with a NaN, without effect, and cut off in the middle."""
    from benchmarks.peers import Case

    source = folder / "lora-0"
    tensors = load_file(source / ADAPTER)
    last = [name for name in tensors if "lora_B" in name][-1]
    changed = {
        "in order": tensors,
        "a NaN": {**tensors, last: tensors[last].index_fill(0, torch.tensor([3]), float("nan"))},
        "B all zero": {name: tensor * ("lora_B" not in name) for name, tensor in tensors.items()},
    }
    for what, each in changed.items():
        copied(source, folder / what)
        save_file(each, folder / what / ADAPTER)
    copied(source, folder / "cut off")
    whole = (source / ADAPTER).read_bytes()
    (folder / "cut off" / ADAPTER).write_bytes(whole[: len(whole) // 2])
    return [Case(what, {"lora": folder / what}, what == "in order") for what in (*changed, "cut off")]


def copied(source: Path, target: Path) -> None:
    target.mkdir()
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
