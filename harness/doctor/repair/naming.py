"""Where every module goes in the new file: the prefix of its component there, and its name behind it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from harness.doctor.checkpoint import Checkpoint
from harness.doctor.match import match_layers
from harness.errors import UserError
from harness.files import FORMATS, LoraAdapter, LoraModule
from harness.text import count, printable

_DENOISER = frozenset({"", "unet", "transformer", "diffusion_model", "lycoris"})
_UNET_LAYERS = ("down_blocks.", "up_blocks.", "mid_block.", "down_blocks_", "up_blocks_", "mid_block_")
_PLACES = (
    ("te1", "te", "text_encoder"),
    ("te2", "text_encoder_2"),
    ("te3", "text_encoder_3"),
)  # what formats call the first, second and third text encoder, the better name first
_COMFY = "text_encoders"
_ENCODER = re.compile(r"(clip_l|clip_g|clip_h|t5xxl)\.transformer\.(.+)", re.DOTALL)
_FLUX, _SD3 = re.compile(r"single_(transformer_)?blocks"), re.compile(r"joint_blocks|transformer_blocks")
_CLIP_WIDTHS = {768: "clip_l", 1024: "clip_h", 1280: "clip_g"}
_FLATTENED = (
    re.compile(r"(text_model)_(encoder)_(layers)_(\d+)_(self_attn)_([qkv]_proj|out_proj)"),
    re.compile(r"(text_model)_(encoder)_(layers)_(\d+)_(mlp)_(fc[12])"),
    re.compile(r"(encoder)_(block)_(\d+)_(layer)_(\d+)_(SelfAttention)_([qkvo])"),
    re.compile(r"(encoder)_(block)_(\d+)_(layer)_(\d+)_(DenseReluDense)_(wi_[01]|wi|wo)"),
)  # CLIP and T5 as transformers names them: no model is needed to put the dots back


class Home(NamedTuple):
    """The prefix of a module's component in the new file, and the module's name behind it."""

    prefix: str
    name: str


def homes(adapter: LoraAdapter, to: str, model_names: Collection[str] | None) -> dict[str, Home]:
    """Return the place of every module of the adapter in a file of the format `to`.

    Raises:
        UserError: flattened names without the model's own, names that fit no layer of the model, or a component that
            the format has no place for.
    """
    components = {module.component for module in adapter.modules.values()}
    if len(components) > 1 and len(FORMATS[to].prefixes) < 2:
        listed = ", ".join(sorted(component or "no prefix" for component in components))
        raise UserError(f"{adapter.path}: adapts several components ({listed}); a {to} file holds one")
    names = _names(adapter, to, model_names)
    places = {name: _home(adapter, name, names[name], to) for name in adapter.modules}
    prefixes = {home.prefix for home in places.values()}
    if len(prefixes) < len(components - _DENOISER):
        raise UserError(f"{adapter.path}: {to} cannot keep its components {', '.join(sorted(components))} apart")
    return places


def _names(adapter: LoraAdapter, to: str, model_names: Collection[str] | None) -> dict[str, str]:
    """Return {module of the adapter: its name in the new file}."""
    names = {name: module.name for name, module in adapter.modules.items()}
    matched = _matched(adapter, model_names)
    if not adapter.flattened or (FORMATS[to].flattened and model_names is None):
        return names
    spelled = {name: _dotted(adapter.modules[name]) or full for name, full in names.items()}
    found = {name: matched.get(name) or (spelled[name] if spelled[name] != names[name] else "") for name in names}
    lost = [name for name, spelling in found.items() if not spelling]
    if lost and model_names is None:
        raise UserError(
            f"{adapter.path}: its names are flattened; {to} needs the model's layers: --model-names or --base"
        )
    if lost and not FORMATS[to].flattened:
        what = f"{count(len(lost), 'module')} fit no single layer of the model, such as {printable(lost[0])}"
        raise UserError(f"{adapter.path}: {what}")
    return {name: spelling or names[name] for name, spelling in found.items()}


def _matched(adapter: LoraAdapter, model_names: Collection[str] | None) -> dict[str, str]:
    if model_names is None:
        return {}
    matched = match_layers(adapter, model_names)
    if not matched:
        first = printable(next(iter(adapter.modules)))
        what = f"none of its {count(len(adapter.modules), 'module')} fits a layer of the model, such as {first}"
        raise UserError(f"{adapter.path}: {what}")
    return {name: match.spelling for name, match in matched.items()}


def _dotted(module: LoraModule) -> str | None:
    """Return the name of a text encoder's layer with its dots, None for any other."""
    if module.component in _DENOISER:
        return None
    found = next((match for pattern in _FLATTENED if (match := pattern.fullmatch(module.name))), None)
    return ".".join(found.groups()) if found else None


def _home(adapter: LoraAdapter, key: str, name: str, to: str) -> Home:
    module, row = adapter.modules[key], FORMATS[to]
    by_component = {owner: prefix for prefix, owner in reversed(tuple(row.prefixes.items()))}
    if to == adapter.format and module.component in by_component:
        return Home(_own_prefix(adapter, module), name)
    if module.component in _DENOISER:
        unet = to == "diffusers" and any(one.name.startswith(_UNET_LAYERS) for one in adapter.modules.values())
        return Home(by_component["unet"] if unet else row.write_prefix, name)
    if not row.prefixes or row.write_prefix in ("", "base_model.model."):
        return Home(row.write_prefix, name)
    place, name = _place(adapter, module, name)
    if to == "comfyui" and place is not None:
        return Home(by_component[_COMFY], f"{_encoder(module, name, adapter)}.transformer.{name}")
    wanted = module.component if place is None else _called(adapter, place, by_component)
    if wanted not in by_component:
        raise UserError(f"{adapter.path}: {to} has no place for the component {module.component}")
    return Home(by_component[wanted], name)


def _own_prefix(adapter: LoraAdapter, module: LoraModule) -> str:
    """Return the prefix that the module has; the doubled underscore is a misspelling."""
    key = next(iter(module.keys.values()))
    mine = [prefix for prefix, owner in FORMATS[adapter.format].prefixes.items() if owner == module.component]
    fits = [prefix for prefix in mine if prefix in key and not prefix.endswith("__")]
    return max(fits, key=len, default=mine[0])


def _place(adapter: LoraAdapter, module: LoraModule, name: str) -> tuple[int | None, str]:
    """Return which text encoder a module is of (0, 1, 2; None: of none that formats share), and its name there."""
    if module.component != _COMFY:
        return next((place for place, names in enumerate(_PLACES) if module.component in names), None), name
    if not (found := _ENCODER.fullmatch(name)):
        return None, name
    if found[1] != "t5xxl":
        return int(found[1] == "clip_g"), found[2]
    names = [one.name for one in adapter.modules.values() if one.component in _DENOISER]
    if any(map(_FLUX.search, names)):
        return 1, found[2]
    return (2 if any(map(_SD3.search, names)) else None), found[2]


def _called(adapter: LoraAdapter, place: int, by_component: Mapping[str, str]) -> str:
    """Return what a format calls a text encoder: kohya says `te` beside a U-Net that has one, else `te1`."""
    known = [name for name in _PLACES[place] if name in by_component]
    return "te" if "te" in known and _has_one_encoder(adapter) else next(iter(known), "")


def _has_one_encoder(adapter: LoraAdapter) -> bool:
    """Tell whether the U-Net attends to a text of Stable Diffusion 1 or 2, which have a single text encoder."""
    keys = (one for one in adapter.modules.values() if one.component in _DENOISER)
    widths = {one.in_features for one in keys if one.name.endswith(("attn2.to_k", "attn2_to_k"))}
    return bool(widths) and widths <= {768, 1024}


def _encoder(module: LoraModule, name: str, adapter: LoraAdapter) -> str:
    """Return what ComfyUI calls the text encoder that has this layer, told by its names and its width."""
    if "SelfAttention" in name or "DenseReluDense" in name:
        return "t5xxl"
    width = module.out_features if name.endswith("fc2") else module.in_features
    if name.startswith("text_model.") and width in _CLIP_WIDTHS:
        return _CLIP_WIDTHS[width]
    raise UserError(f"{adapter.path}: nothing tells which text encoder of ComfyUI has {printable(module.name)}")


def missing_from(adapter: LoraAdapter, model_names: Collection[str] | None) -> Iterator[str]:
    """Yield a note about the modules whose names fit no layer of the model."""
    if model_names is not None:
        matched = match_layers(adapter, model_names)
        lost = [name for name in adapter.modules if name not in matched]
        if lost:
            yield f"{len(lost)} of {len(adapter.modules)} modules have no layer in the model, such as {lost[0]}"


def names_from(path: Path) -> list[str]:
    """Return module names: one per line of a text file, or the layers of a checkpoint (file, folder or index).

    Raises:
        UserError: the file cannot be read or names nothing.
    """
    if path.is_dir() or path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
        return list(Checkpoint.open(path).layers)
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no list of names can be read ({printable(error, 80)})") from None
    if not any(names):
        raise UserError(f"{path}: names no module")
    return [name for name in names if name]
