"""PEFT's folders, for which `benchmarks.prescriptions` holds the answers against PEFT and transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.lora_file import MIXED, UNIFORM, Deltas, File, Low, Reader
from harness.files import LoraWeights, write_lora
from harness.files.format import CONFIG_NAME, WEIGHTS_NAME

WIDTH = 32
NEGATIVE, ZERO = ((4, -2.0),), ((4, 0.0),)
Change = Callable[[Path], object]


def language_model() -> Any:
    """Return a tiny causal language model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 3, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def _renamed(folder: Path, before: str, after: str) -> None:
    file = folder / WEIGHTS_NAME
    save_file({key.replace(before, after): tensor for key, tensor in load_file(file).items()}, file)


def _configured(folder: Path, **changes: Any) -> None:
    file = folder / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")


# what stands in the table, ranks and alphas, rslora, what is done to the folder afterwards
FOLDERS: tuple[tuple[str, Any, bool, Change], ...] = (
    ("alpha / rank 0.5", UNIFORM, False, lambda folder: None),
    ("alpha / rank differs", MIXED, False, lambda folder: None),
    ("rsLoRA", UNIFORM, True, lambda folder: None),
    ("rsLoRA, alphas differ", MIXED, True, lambda folder: None),
    ("negative alpha", NEGATIVE, False, lambda folder: None),
    ("saved inside torch.compile", UNIFORM, False, lambda folder: _renamed(folder, "model.model.", "model._orig_mod.")),
    ("saved inside DDP", UNIFORM, False, lambda folder: _renamed(folder, "base_model.model.", "module.")),
    ("without adapter_config.json", UNIFORM, False, lambda folder: (folder / CONFIG_NAME).unlink()),
    ("half of the modules targeted", UNIFORM, False, lambda folder: _configured(folder, target_modules=["q_proj"])),
)


def folders(place: Path) -> Iterator[tuple[str, Path, File]]:
    """Write every folder, and yield what is in it and what a right loader makes of it."""
    layers = {name: layer for name, layer in language_model().named_modules() if isinstance(layer, torch.nn.Linear)}
    layers.pop("lm_head")
    for what, numbers, rslora, change in FOLDERS:
        generator, modules, expected = torch.Generator().manual_seed(5), {}, {}
        for index, (name, layer) in enumerate(layers.items()):
            rank, alpha = numbers[index % len(numbers)]
            a = torch.randn(rank, layer.in_features, generator=generator) / 8
            b = torch.randn(layer.out_features, rank, generator=generator) / 8
            modules[name] = LoraWeights(a, b, alpha)
            expected[name] = (Low(b, a), alpha / (rank**0.5 if rslora else rank))
        shutil.rmtree(place, ignore_errors=True)
        write_lora(place, "peft", modules, rslora=rslora)
        change(place)
        yield what, place, File({}, {}, expected, {name: name for name in expected})


def peft_reader(folder: Path) -> Reader:
    """Return what loads the folder with PEFT and reads PEFT's own delta of each layer."""

    def read(_: Path, strength: float) -> Deltas:
        from peft import PeftModel

        return _deltas(PeftModel.from_pretrained(language_model(), str(folder)), strength)

    return read


def transformers_reader(folder: Path) -> Reader:
    """Return what loads the folder with transformers' `load_adapter` and reads the delta of each layer."""

    def read(_: Path, strength: float) -> Deltas:
        model = language_model()
        model.load_adapter(str(folder))
        return _deltas(model, strength)

    return read


def _deltas(model: Any, strength: float) -> Deltas:
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    for layer in layers.values():
        if strength != 1:
            layer.set_scale("default", strength)
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(next(iter(layer.lora_A)))
        for name, layer in layers.items()
    }


READERS = {"peft": peft_reader, "transformers": transformers_reader}
