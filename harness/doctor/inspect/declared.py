"""What the configuration of a PEFT adapter declares beside its pairs, held against the tensors of the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from harness.files import LoraAdapter
from harness.files.config import PAIRED, method_of
from harness.files.format import CONFIG_NAME
from harness.text import first_of, printable
from harness.verdict.file_record import Hazard


def declared(adapter: LoraAdapter) -> Iterator[Hazard]:
    """Yield LH720 for what PEFT refuses, LH721 for trained tensors that it passes over or starts anew."""
    yield from (Hazard(code="LH720", what=f"{what}: PEFT refuses it") for what in _refused(adapter.config))
    yield from (*_saved(adapter), *_tokens(adapter), *_biases(adapter), *_magnitudes(adapter))


def _refused(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a configuration, whatever the tensors."""
    kind = config.get("peft_type")
    if "peft_type" not in config:
        yield f"{CONFIG_NAME} has no peft_type"
    elif isinstance(kind, str) and kind != kind.upper():
        yield f"peft_type is {printable(kind, 40)}, which PEFT writes {printable(kind.upper(), 40)}"
    if config.get("target_modules") == [] and not config.get("target_parameters") and method_of(config) in PAIRED:
        yield "target_modules is empty, and there are no target_parameters"
    if "rank_pattern" in config and config["rank_pattern"] is None and method_of(config) in PAIRED:
        yield "rank_pattern is null, an object is needed"


def _saved(adapter: LoraAdapter) -> Iterator[Hazard]:
    """For classifiers PEFT names `classifier` and `score`, of which a model has one: all must be missing."""
    names = names_saved(adapter.config)
    if names and len(lost(adapter, names)) == len(names):
        yield lost_hazard(names)


def names_saved(config: Mapping[str, Any]) -> list[str]:
    """Return the names of `modules_to_save`."""
    value = config.get("modules_to_save")
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def lost(adapter: LoraAdapter, names: Iterable[str]) -> list[str]:
    """Return those of `names` of which the file has no tensor."""
    return [name for name in names if not any(f".{name}." in f".{key}" for key in adapter.file.keys)]


def lost_hazard(names: list[str]) -> Hazard:
    """Return what is said of saved modules without a tensor."""
    what = f"modules_to_save names {first_of([printable(name, 60) for name in names])}, of which the file has no tensor"
    return Hazard(code="LH720", what=f"{what}: PEFT refuses it")


def _tokens(adapter: LoraAdapter) -> Iterator[Hazard]:
    names = [name for name, module in adapter.modules.items() if "token_rows" in module.keys]
    indices = adapter.config.get("trainable_token_indices")
    if indices and not names:
        what = "trainable_token_indices names rows of an embedding, of which the file has none"
        yield Hazard(code="LH720", what=f"{what}: PEFT refuses it")
    if names and not indices and method_of(adapter.config) != "trainable_tokens":
        what = f"the file has trained token rows ({first_of(names)}), no trainable_token_indices say which"
        yield Hazard(code="LH721", what=f"{what}: PEFT ignores them")


def _biases(adapter: LoraAdapter) -> Iterator[Hazard]:
    names = [name for name, module in adapter.modules.items() if "bias" in module.keys]
    if names and method_of(adapter.config) == "lora" and not adapter.config.get("lora_bias"):
        what = f"the file has biases of B ({first_of(names)}), lora_bias is not set"
        yield Hazard(code="LH721", what=f"{what}: PEFT ignores them")


def _magnitudes(adapter: LoraAdapter) -> Iterator[Hazard]:
    if method_of(adapter.config) != "lora":
        return
    pairs = {name: module for name, module in adapter.modules.items() if {"A", "B"} <= module.keys.keys()}
    able = [name for name, module in pairs.items() if module.variant != "experts"]
    having = [name for name in able if "magnitude" in pairs[name].keys]
    without = [name for name in able if name not in having]
    if adapter.config.get("use_dora") and without:
        what = f"use_dora is set, and {len(without)} of {len(able)} modules have no magnitude ({first_of(without)})"
        yield Hazard(code="LH721", what=f"{what}: PEFT starts them at the norms of the base")
    if having and not adapter.config.get("use_dora"):
        what = f"the file has DoRA magnitudes ({first_of(having)}), use_dora is not set"
        yield Hazard(code="LH721", what=f"{what}: PEFT ignores them and applies a plain LoRA")
