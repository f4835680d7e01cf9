"""Where every module goes in the new file: the prefix of its component there, and its name behind it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from harness.errors import UserError
from harness.files import FORMATS, LoraAdapter, LoraModule
from harness.text import count, printable

if TYPE_CHECKING:  # the models' layers are read with torch, which a question about names alone does not need
    from harness.files.architectures import Rows, Shape, Slot

_CHECKPOINT = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
_DENOISER = frozenset({"", "unet", "transformer", "diffusion_model", "lycoris"})
_UNET_LAYERS = ("down_blocks.", "up_blocks.", "mid_block.", "down_blocks_", "up_blocks_", "mid_block_")
_PLACES = (
    ("te1", "te", "text_encoder", "clip_l"),
    ("te2", "text_encoder_2", "clip_g"),
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
    """Where rows of a module go: the prefix of its component in the new file, and a name behind it.

    `part` are rows of the module's own product, `rows` those of the layer [`height`, in] where they go (None: all).
    """

    prefix: str
    name: str
    rows: Rows | None = None
    part: Rows | None = None
    height: int | None = None


Homes = dict[str, tuple[Home, ...]]
Layers = Mapping[str, "Shape | None"]
# PEFT takes what these start from out of the base's weight
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_ACTING = (
    "alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora", "velora_config", "kasa_config",
    "monteclora_config", "arrow_config",
)  # fmt: skip


def refuse_what_would_change(adapter: LoraAdapter, to: str) -> None:
    """Refuse what a repair would change: a scale beside alpha, and in other formats what PEFT's configuration does.

    Raises:
        UserError: naming the key or the field.
    """
    scale = next((key for key in adapter.unused_keys if key.endswith(".scale")), None)
    if scale and adapter.format == "kohya":
        what = f"{printable(scale, 120)} stands in place of alpha / rank in A1111, and other tools pass it over"
        raise UserError(f"{adapter.path}: {what}: take such keys out, or put the scale into alpha")
    if str(adapter.config.get("init_lora_weights", "")).lower().startswith("olora"):
        what = (
            "init_lora_weights is olora: PEFT takes the start from the base times alpha / rank, which a repair changes"
        )
        raise UserError(f"{adapter.path}: {what}; save it with path_initial_model_for_weight_conversion")
    config = adapter.config if to != adapter.format else {}
    starts = str(config.get("init_lora_weights", "")).lower().startswith(_CHANGE_THE_BASE)
    fields = [name for name in _ACTING if config.get(name)] + ["init_lora_weights"] * starts
    if fields:
        what = f"{fields[0]}={printable(config[fields[0]], 40)} changes what the pairs do, and no {to} file says so"
        raise UserError(f"{adapter.path}: {what}; --to {adapter.format} keeps it")


def homes(adapter: LoraAdapter, to: str, layers: Layers | None) -> Homes:
    """Return the place of every module of the adapter in a file of the format `to`.

    `layers` are the model's, with their shapes as far as they are known: names without dots get theirs back, and what
    the model splits or stacks goes to the layers that it has.

    Raises:
        UserError: flattened names without the model's own, names that fit no layer of the model, or a component that
            the format has no place for.
    """
    components = {module.component for module in adapter.modules.values()}
    denoisers = components & _DENOISER if to != adapter.format else ()
    if len(components) > 1 and (len(FORMATS[to].prefixes) < 2 or len(denoisers) > 1):
        listed = ", ".join(sorted(component or "no prefix" for component in components))
        raise UserError(f"{adapter.path}: adapts several components ({listed}); a {to} file cannot keep them apart")
    names, known = _names(adapter, to, layers), _Prefixes.of(adapter, to)
    return {name: tuple(_home(adapter, name, home, known) for home in names[name]) for name in adapter.modules}


class _Prefixes(NamedTuple):
    """What a format calls the components of an adapter: those that have a prefix there, and that of the denoiser."""

    to: str
    by_component: Mapping[str, str]
    denoiser: str

    @classmethod
    def of(cls, adapter: LoraAdapter, to: str) -> _Prefixes:
        row = FORMATS[to]
        by_component = {owner: prefix for prefix, owner in reversed(tuple(row.prefixes.items()))}
        unet = to == "diffusers" and any(one.name.startswith(_UNET_LAYERS) for one in adapter.modules.values())
        return cls(to, by_component, by_component["unet"] if unet else row.write_prefix)


def _names(adapter: LoraAdapter, to: str, layers: Layers | None) -> Homes:
    """Return {module of the adapter: where it goes, without its prefix}."""
    placed = _placed(adapter, layers) if layers is not None else {}
    names: Homes = {}
    for key, module in adapter.modules.items():
        dotted = _dotted(module) if adapter.flattened else module.name
        if dotted is not None and not placed.get(key, ()):
            names[key] = (Home("", dotted),)
        elif key in placed:
            names[key] = placed[key]
        elif FORMATS[to].flattened:
            names[key] = (Home("", module.name),)
    lost = [key for key in adapter.modules if key not in names]
    if lost and layers is None:
        raise UserError(
            f"{adapter.path}: its names are flattened; {to} needs the model's layers: --model-names or --base"
        )
    if lost:
        what = f"{count(len(lost), 'module')} fit no single layer of the model, such as {printable(lost[0])}"
        raise UserError(f"{adapter.path}: {what}")
    return names


def _placed(adapter: LoraAdapter, layers: Layers) -> Homes:
    """Return where the model has the modules, for those that it has.

    Raises:
        UserError: it has none.
    """
    from harness.doctor.match import place

    found = place(adapter, layers)
    if not found.slots:
        first = printable(next(iter(adapter.modules)))
        what = f"none of its {count(len(adapter.modules), 'module')} fits a layer of the model, such as {first}"
        why = next(iter([*found.misfits.values(), *found.ambiguous.values()]), "")
        raise UserError(f"{adapter.path}: {what}{f' ({printable(why)})' if why else ''}")
    placed: Homes = {}
    for key, slots in found.slots.items():
        module = adapter.modules[key]
        if not adapter.flattened or not _dotted(module):
            placed[key] = tuple(dict.fromkeys(_slot_home(adapter, module, slot, layers) for slot in slots))
            _refuse_gaps(adapter, module, placed[key])
    return placed


def _refuse_gaps(adapter: LoraAdapter, module: LoraModule, homes: Sequence[Home]) -> None:
    """Refuse a module of which some rows have no layer in the model.

    Raises:
        UserError: naming the module.
    """
    parts = sorted(home.part for home in homes if home.part)
    ends = [0, *(end for _, end in parts)]
    if parts and ([start for start, _ in parts] != ends[:-1] or ends[-1] != module.out_features):
        raise UserError(f"{adapter.path}: some rows of {printable(module.name)} have no layer in the model")


def _slot_home(adapter: LoraAdapter, module: LoraModule, slot: Slot, layers: Layers) -> Home:
    """Return the model's own name for a layer that it calls otherwise than the file, else the file's, with dots."""
    shape = layers[slot.layer]
    if slot.rows and not shape:
        raise UserError(f"{adapter.path}: {printable(slot.layer)} holds rows of others too: --base tells how many")
    height = shape[0] if shape and slot.rows else None
    if "experts" in slot.layer.split(".") and (slot.rows or slot.part):
        return Home("", module.name)  # how a model keeps its experts is the reader's concern: PEFT converts them
    if slot.rows is None and slot.part is None and _same_naming(module.name, slot.layer, adapter.flattened):
        return Home("", slot.spelling if adapter.flattened else module.name)
    bare = next((start for start in _CHECKPOINT if slot.layer.startswith(start)), "")
    return Home("", slot.layer.removeprefix(bare), slot.rows, slot.part, height)


def _same_naming(name: str, layer: str, flattened: bool) -> bool:
    """Tell whether two names end alike from the word before their first number on."""
    parts = layer.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts))
    tail = ".".join(parts[max(first - 1, 0) :])
    return f"_{name}".endswith(f"_{tail.replace('.', '_')}") if flattened else f".{name}".endswith(f".{tail}")


def _dotted(module: LoraModule) -> str | None:
    """Return the name of a text encoder's layer with its dots, None for any other."""
    if module.component in _DENOISER:
        return None
    found = next((match for pattern in _FLATTENED if (match := pattern.fullmatch(module.name))), None)
    return ".".join(found.groups()) if found else None


def _home(adapter: LoraAdapter, key: str, home: Home, known: _Prefixes) -> Home:
    """Return a place with the prefix of the module's component."""
    module, (to, by_component, denoiser), name = adapter.modules[key], known, home.name
    row = FORMATS[to]
    if to == adapter.format and module.component in by_component:
        return home._replace(prefix=_own_prefix(adapter, module))
    if module.component in _DENOISER:
        return home._replace(prefix=denoiser)
    if not row.prefixes or row.write_prefix in ("", "base_model.model."):
        return home._replace(prefix=row.write_prefix)
    encoder, name = _encoder_place(adapter, module, name)
    if to == "comfyui" and encoder is not None:
        return Home(by_component[_COMFY], f"{_encoder(module, name, adapter)}.transformer.{name}")
    wanted = module.component if encoder is None else _called(adapter, encoder, by_component)
    if wanted not in by_component:
        raise UserError(f"{adapter.path}: {to} has no place for the component {module.component}")
    return home._replace(prefix=by_component[wanted], name=name)


def _own_prefix(adapter: LoraAdapter, module: LoraModule) -> str:
    """Return the prefix that the module has; the doubled underscore is a misspelling."""
    key = next(iter(module.keys.values()))
    mine = [prefix for prefix, owner in FORMATS[adapter.format].prefixes.items() if owner == module.component]
    fits = [prefix for prefix in mine if prefix in key and not prefix.endswith("__")]
    return max(fits, key=len, default=mine[0])


def _encoder_place(adapter: LoraAdapter, module: LoraModule, name: str) -> tuple[int | None, str]:
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


def _called(adapter: LoraAdapter, encoder: int, by_component: Mapping[str, str]) -> str:
    """Return what a format calls a text encoder: kohya says `te` beside a U-Net that has one, else `te1`."""
    known = [name for name in _PLACES[encoder] if name in by_component]
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


def notes_on(adapter: LoraAdapter, layers: Layers | None) -> Iterator[str]:
    """Yield notes about modules whose names fit no layer of the model, or only after replacing a prefix."""
    if layers is None:
        return
    from harness.doctor.match import place

    found = place(adapter, layers)
    seen = {adapter.modules[name].component for name in found.slots} | _DENOISER
    lost = [name for name, one in adapter.modules.items() if name not in found.slots and one.component in seen]
    if lost:
        yield f"{len(lost)} of {len(adapter.modules)} modules have no layer in the model, such as {printable(lost[0])}"
    for old, new, modules in found.replaced if not adapter.flattened else ():
        yield (
            f"{count(modules, 'name')} fit the model after replacing {printable(old) or 'nothing'} by "
            f"{printable(new) or 'nothing'}: kept as they are"
        )


def layers_from(path: Path) -> dict[str, Shape | None]:
    """Return a model's layers: one name per line of a text file, or those of a checkpoint with their shapes.

    Raises:
        UserError: the file cannot be read or names nothing.
    """
    if path.is_dir() or path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
        from harness.doctor.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(path)
        return {layer: tuple(checkpoint.info(tensor).shape) for layer, tensor in checkpoint.layers.items()}
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no list of names can be read ({printable(error, 80)})") from None
    if not any(names):
        raise UserError(f"{path}: names no module")
    return {name: None for name in names if name}
