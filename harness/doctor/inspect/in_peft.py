"""What PEFT refuses or passes over in a folder, by its files, its names and the words of its configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from harness.doctor.inspect.declared import declared
from harness.doctor.inspect.targeting import targeted
from harness.files import LoraAdapter
from harness.files.config import LORA_METHODS, PAIRED, ConfigError, changing_init, method_of
from harness.files.format import CONFIG_NAME, WEIGHTS_NAME
from harness.text import count, first_of, printable
from harness.verdict.file_record import Hazard

HEAD = re.compile(r"\.(lm_head|embed_out|output)$")
_PREFIX = "base_model.model."
_ADAPTER = re.compile(r"\.lora_(?:[AB]|embedding_[AB]|magnitude_vector)\.([^.]+)\.weight$")
_REPEATED = ("pissa", "olora", "loftq")  # by PEFT, when it loads the file; CorDA and LoRA-GA need data of the training


def share(some: int, total: int, who: str = "PEFT") -> str:
    """Say how many of all modules PEFT, or another tool, ignores."""
    which = f"all {total} modules" if some == total else f"{some} of {count(total, 'module')}"
    return f"{who} ignores {which}"


def ignored(some: int, total: int, what: str, more: tuple[str, ...] = ()) -> Hazard:
    """Return LH720 where PEFT ignores every module, LH721 where it ignores some."""
    return Hazard(code="LH720" if some == total else "LH721", what="; ".join([what, *more]))


def peft_hazards(adapter: LoraAdapter) -> Iterator[Hazard]:
    """Yield LH720 for a PEFT folder that PEFT refuses or ignores, LH721 where it takes a part, LH722 and LH723."""
    folder = adapter.file.path.parent
    if adapter.format != "peft" or adapter.file.path.name != WEIGHTS_NAME:
        return
    if not (folder / CONFIG_NAME).exists():
        yield Hazard(code="LH720", what=f"PEFT refuses a folder without {CONFIG_NAME}")
        return
    if (folder / "adapter_model.bin").exists():
        what = (
            "adapter_model.bin lies beside: PEFT takes the safetensors, older readers the other, which is not read here"
        )
        yield Hazard(code="LH722", what=what)
    yield from (*_wrong_type(adapter), *_wrong_names(adapter), *not_targeted(adapter), *_no_difference(adapter.config))
    yield from declared(adapter)


def transformers_hazards(adapter: LoraAdapter) -> Iterator[Hazard]:
    """Yield LH720 or LH721 for what `load_adapter` of transformers passes over: it renames the keys in its own way."""
    keys = {name: next(iter(module.keys.values())) for name, module in adapter.modules.items()}
    if named := [name for name, key in keys.items() if _ADAPTER.search(key)]:
        what = share(len(named), len(keys), "transformers")
        yield ignored(len(named), len(keys), f"{what}, whose keys have an adapter's name in them ({first_of(named)})")
    yield from (*_wrong_type(adapter), *not_targeted(adapter))


def _wrong_type(adapter: LoraAdapter) -> Iterator[Hazard]:
    kind = method_of(adapter.config)
    pairs = [name for name, module in adapter.modules.items() if {"A", "B"} & set(module.keys)]
    if pairs and (kind not in ("lora", "xlora", "poly", *LORA_METHODS) or kind in PAIRED - {"lora"}):
        what = f"peft_type is {printable(adapter.config.get('peft_type'), 40)}, the tensors are LoRA's"
        yield Hazard(code="LH720", what=f"{what} ({first_of(pairs)}): PEFT refuses or ignores them")
    if adapter.config.get("lora_bias") and pairs and not any("bias" in adapter.modules[name].keys for name in pairs):
        what = "lora_bias is set, and no module has a bias: PEFT starts them at zero"
        yield Hazard(code="LH721", what=what)


def _wrong_names(adapter: LoraAdapter) -> Iterator[Hazard]:
    """PEFT looks for `base_model.model.` and the model's own names, and passes over what it does not find."""
    keys = {name: next(iter(module.keys.values())) for name, module in adapter.modules.items()}
    bare = [name for name, key in keys.items() if not key.startswith("base_model.") and not key.startswith("prompt_")]
    if bare:
        yield ignored(len(bare), len(keys), f"{share(len(bare), len(keys))} without {_PREFIX} ({first_of(bare)})")
    named = {name: hit[1] for name, key in keys.items() if (hit := _ADAPTER.search(key)) and hit[1] != "default"}
    if named:
        word = printable(next(iter(named.values())), 40)
        what = f"{share(len(named), len(keys))} with an adapter's name in them ({first_of([*named])})"
        yield ignored(len(named), len(keys), f"{what}: it loads them under adapter_name={word!r} alone")


def not_targeted(adapter: LoraAdapter, said: str = "target_modules and what limits it") -> Iterator[Hazard]:
    """PEFT makes layers where its configuration says so, and passes over tensors of others."""
    if not (chosen := targeted(adapter)):
        return
    pairs = [module.name for module in adapter.modules.values() if "A" in module.keys and module.variant != "experts"]
    if adapter.config.get("ensure_weight_tying"):  # PEFT targets the layer that shares an embedding's weight itself
        pairs = [name for name in pairs if not HEAD.search(f".{name}")]
    try:
        lost = [name for name in pairs if not chosen(name)]
    except ConfigError:
        return  # said by the reader
    if lost:
        what = f"{share(len(lost), len(pairs))}: {said} leave them out ({first_of(lost)})"
        yield ignored(len(lost), len(pairs), what)


def _no_difference(config: Mapping[str, Any]) -> Iterator[Hazard]:
    if config.get("alora_invocation_tokens"):
        what = "an activated LoRA acts behind its invocation tokens alone: merged it would act everywhere"
        yield Hazard(code="LH723", what=what)
    if config.get("kasa_config"):
        what = "KaSA takes the smallest singular values from the base too: its update is no difference to the base"
        yield Hazard(code="LH723", what=what)
    if init := changing_init(config):
        what = f"init_lora_weights is {printable(init, 40)}, which changes the base too: B @ A is no difference to it"
        repeats = "PEFT repeats the decomposition, or saves" if init.startswith(_REPEATED) else "PEFT can save"
        way = f"{repeats} a plain LoRA with path_initial_model_for_weight_conversion"
        yield Hazard(code="LH723", what=f"{what}; {way}")
