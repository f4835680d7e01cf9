"""What of a LoRA would apply: to a base, and in PEFT by the words of its own configuration; from headers alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from harness.doctor.in_memory import in_file
from harness.doctor.inspect.declared import declared, lost, lost_hazard, names_saved
from harness.doctor.spelling import core
from harness.files import LoraAdapter
from harness.files.architectures import Shape, looks_like
from harness.files.config import LORA_METHODS, PAIRED, Budget, ConfigError, Patterns, changing_init, method_of
from harness.files.format import CONFIG_NAME, WEIGHTS_NAME
from harness.text import count, first_of, printable
from harness.verdict.blocks import family_of
from harness.verdict.file_record import BaseFit, Hazard

if TYPE_CHECKING:
    from harness.doctor.checkpoint import Checkpoint
    from harness.doctor.match import Placement

_SHOWN = 50
_PREFIX = "base_model.model."
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_EMBEDDING = re.compile(r"(?!embed_out)\w*embed\w*|wte|wpe|shared")
_ADAPTER = re.compile(r"\.lora_(?:[AB]|embedding_[AB]|magnitude_vector)\.([^.]+)\.weight$")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_HEAD = re.compile(r"\.(lm_head|embed_out|output)$")
_TOWERS = frozenset({"visual", "vision_model", "vision_tower", "vision_encoder", "audio_tower", "vision_embed_tokens"})
_REPEATED = ("pissa", "olora", "loftq")  # by PEFT, when it loads the file; CorDA and LoRA-GA need data of the training
_INDEX = r"(?P<idx>\d+)\."
_SPEAKING = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name", "base_model_name_or_path")
Chosen = Callable[[str], bool]


def fit_of(adapter: LoraAdapter, base: Checkpoint, placed: Placement) -> BaseFit:
    """Return how much of a LoRA applies to a base, where its modules are placed so."""
    missing = list(_left_out(base, placed))
    return BaseFit(
        base=printable(base.path, 200),
        applied=len(placed.slots),
        modules=sum(map(len, (placed.slots, placed.missing, placed.ambiguous, placed.misfits))),
        foreign=tuple(printable(name, 120) for name in placed.missing[:_SHOWN]),
        foreign_total=len(placed.missing),
        misfits=_reasons(placed.misfits),
        unplaced=_reasons(placed.ambiguous),
        missing=tuple(printable(name, 120) for name in missing[:_SHOWN]),
        missing_total=len(missing),
        replaced=tuple(
            f"{count(times, 'module')} matched after replacing {_quoted(old)} by {_quoted(new)}"
            for old, new, times in placed.replaced
        ),
        names=placed.families,
    )


def _reasons(some: Mapping[str, str]) -> dict[str, str]:
    return {printable(name, 120): printable(why, 200) for name, why in list(some.items())[:_SHOWN]}


def _quoted(prefix: str) -> str:
    return repr(printable(prefix, 80)) if prefix else "nothing"


def _left_out(base: Checkpoint, placed: Placement) -> Iterator[str]:
    """Yield the layers of the kinds that a LoRA adapts which it leaves alone."""
    taken = {slot.layer for slots in placed.slots.values() for slot in slots}
    kinds = {family_of(layer) for layer in taken if family_of(layer) != layer}
    return (layer for layer in base.layers if layer not in taken and family_of(layer) in kinds)


def _kinds_left_out(adapter: LoraAdapter, base: Checkpoint, placed: Placement) -> Iterator[str]:
    """Yield the layers of the kinds that a LoRA leaves alone altogether, as far as PEFT has them in memory as well.

    Of several towers one may have been trained alone; experts of their own are often stacked when a model is loaded.
    """
    taken = {slot.layer for slots in placed.slots.values() for slot in slots}
    kinds = {family_of(layer) for layer in taken}
    if _towers(base) or not placed.slots or adapter.kind != "lora":
        return
    saved = names_saved(adapter.config)
    for layer, shape in base.shapes.items():
        known = (
            layer in taken or family_of(layer) in kinds or _EXPERT.search(f".{layer}.") or _is_tied_head(layer, base)
        )
        if (
            not known
            and shape is not None
            and len(shape) == 2
            and not any(f".{layer}".endswith(f".{s}") for s in saved)
        ):
            yield layer


def base_hazards(adapter: LoraAdapter, base: Checkpoint, placed: Placement, fit: BaseFit) -> Iterator[Hazard]:
    """Yield LH719 for a base that this LoRA is not for, LH718 where a part has no layer, and what PEFT would ignore."""
    if fit.modules and not fit.applied and not fit.unplaced:
        yield Hazard(code="LH719", what=f"{_other_model(adapter, base)}{fit.said}")
    elif fit.misfits:
        other = _other_model(adapter, base) if fit.applied < len(placed.misfits) else ""
        yield Hazard(code="LH719", what=f"{other}{fit.said}")
    elif any(_is_asked_of(adapter, base, placed, name) for name in placed.missing) or any(
        adapter.modules[name].variant != "experts" for name in placed.ambiguous
    ):
        yield Hazard(code="LH718", what=fit.said)
    yield from _peft_against(adapter, base, placed, fit)


def _is_tied_head(name: str, base: Checkpoint) -> bool:
    """Tell whether a name is that of an output layer that shares the embedding's weight, which no file has twice."""
    tied = base.config.get("tie_word_embeddings", "model_type" in base.config)
    return bool(tied) and bool(_HEAD.search(f".{name}")) and any(map(_EMBEDDING.fullmatch, _lasts(base.layers)))


def _lasts(layers: Iterable[str]) -> Iterator[str]:
    return (layer.rpartition(".")[2] for layer in layers)


def _is_asked_of(adapter: LoraAdapter, base: Checkpoint, placed: Placement, name: str) -> bool:
    """Tell whether the base should have a layer for a module: no layer used twice, no text encoder beside its model."""
    if adapter.config.get("layer_replication") or _is_tied_head(adapter.modules[name].name, base):
        return False
    return adapter.modules[name].component in {adapter.modules[other].component for other in placed.slots}


def _other_model(adapter: LoraAdapter, base: Checkpoint) -> str:
    """Say what the file and the base look like, as far as names, widths and metadata tell it and they differ."""
    modules = {module.name: _shape(module.out_features, module.in_features) for module in adapter.modules.values()}
    mine, other = looks_like(modules), looks_like(base.shapes)
    named = {**adapter.metadata, **{key: str(value) for key, value in adapter.config.items() if value}}
    says = next((f"{key} = {printable(named[key], 80)}" for key in _SPEAKING if named.get(key)), None)
    told = f" (it says {says})" if says else ""
    if mine and mine != other:
        return (
            f"the file looks like a LoRA of {mine}{told}, the base {f'looks like {other}' if other else 'does not'}: "
        )
    return f"the file says {says}: " if says else ""


def _shape(outputs: int, inputs: int) -> Shape | None:
    return (outputs, inputs) if outputs and inputs else None


def _peft_against(adapter: LoraAdapter, base: Checkpoint, placed: Placement, fit: BaseFit) -> Iterator[Hazard]:
    """Yield what PEFT would leave out, as far as the names in the base's file tell those in memory."""
    if adapter.format != "peft" or not adapter.config:
        return
    names = names_saved(adapter.config)
    there = [name for name in lost(adapter, names) if any(f".{layer}".endswith(f".{name}") for layer in base.layers)]
    if there and len(lost(adapter, names)) < len(names):  # all of them are said without a base
        yield lost_hazard(there)
    yield from _by_default(adapter, base)
    whole = {name: s[0].layer for name, s in placed.slots.items() if s[0][2:] == (None, None) and not fit.names}
    reached = _reached(adapter, base)
    odd = [
        name
        for name, layer in whole.items()
        if not _wrapped(name) and name not in placed.converted and not reached(adapter.modules[name].name, layer)
    ]
    if odd:
        what = f"{_share(len(odd), fit.modules)}, whose names are none of this base ({first_of(odd)})"
        yield _ignored(len(odd), fit.modules, what, fit.replaced)
    elif not fit.misfits and not adapter.problems and (chosen := targeted(adapter)):
        yield from _holes(adapter, base, placed, chosen)


def _holes(adapter: LoraAdapter, base: Checkpoint, placed: Placement, chosen: Chosen) -> Iterator[Hazard]:
    """Yield the layers that PEFT adapts and the file has nothing for; not where it adapts none that the file has."""
    if not any(chosen(module.name) for module in adapter.modules.values()):
        return
    left = (*_left_out(base, placed), *_kinds_left_out(adapter, base, placed))
    if not (holes := [layer for layer in left if chosen(layer)]):
        return
    memory = {filed: name for name, filed in in_file(base.config, len(base.layers)).items()}
    if holes := [layer for layer in holes if chosen(memory.get(layer, layer))]:
        what = f"the configuration targets {count(len(holes), 'layer')} more of this base, for which there are no "
        yield Hazard(code="LH721", what=f"{what}tensors ({first_of(holes)}): PEFT leaves them untrained")


def _by_default(adapter: LoraAdapter, base: Checkpoint) -> Iterator[Hazard]:
    """Yield what PEFT leaves out where nothing says what it targets: it takes what its table has for the model."""
    config, kind = adapter.config, base.config.get("model_type")
    if config.get("target_modules") is not None or config.get("target_parameters") or method_of(config) != "lora":
        return
    try:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS
    except ImportError:
        return
    if listed := TARGETS.get(str(kind)):
        asked = replace(adapter, config={**config, "target_modules": [*listed]})
        yield from _not_targeted(asked, f"target_modules is not said, PEFT's own for {printable(kind, 40)}")


def _wrapped(name: str) -> bool:
    return any(f".{wrapper}" in f".{name}" for wrapper in _WRAPPERS)


def towers_note(adapter: LoraAdapter, base: Checkpoint) -> Iterator[str]:
    """Say that names are not judged where the base has several towers."""
    if adapter.format == "peft" and adapter.config and _towers(base):
        what = "this base has several towers, whose layers transformers names otherwise in memory than in the file"
        yield f"{what}, depending on its version: whether PEFT finds all names is not judged"


def _towers(base: Checkpoint) -> bool:
    return any(not _TOWERS.isdisjoint(layer.split(".")) for layer in base.layers)


def _reached(adapter: LoraAdapter, base: Checkpoint) -> Callable[[str, str], bool]:
    """Return what tells whether a name is that of a layer in memory, where its name in the file is another.

    transformers puts the name of the inner model before the layers of a checkpoint without a head, whose embeddings
    stand outermost, and takes it away where a model without a head is asked for. Models of several towers have other
    names in memory than in their files, and not the same in every version: only foreign words tell.
    """
    if _towers(base):
        return lambda name, layer: core(name) == core(layer)
    bare = any(_EMBEDDING.fullmatch(layer.partition(".")[0]) for layer in base.layers)
    headless = not adapter.config.get("task_type")

    def same(name: str, layer: str) -> bool:
        longer = (bare and name.partition(".")[2] == layer) or (headless and layer.partition(".")[2] == name)
        return name == layer or longer

    return same


def _share(some: int, total: int) -> str:
    return f"PEFT ignores all {total} modules" if some == total else f"PEFT ignores {some} of {count(total, 'module')}"


def _ignored(some: int, total: int, what: str, more: tuple[str, ...] = ()) -> Hazard:
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
    yield from (*_wrong_type(adapter), *_wrong_names(adapter), *_not_targeted(adapter), *_no_difference(adapter.config))
    yield from declared(adapter)


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
        yield _ignored(len(bare), len(keys), f"{_share(len(bare), len(keys))} without {_PREFIX} ({first_of(bare)})")
    named = {name: hit[1] for name, key in keys.items() if (hit := _ADAPTER.search(key)) and hit[1] != "default"}
    if named:
        word = printable(next(iter(named.values())), 40)
        what = f"{_share(len(named), len(keys))} with an adapter's name in them ({first_of([*named])})"
        yield _ignored(len(named), len(keys), f"{what}: it loads them under adapter_name={word!r} alone")


def _not_targeted(adapter: LoraAdapter, said: str = "target_modules and what limits it") -> Iterator[Hazard]:
    """PEFT makes layers where its configuration says so, and passes over tensors of others."""
    if not (chosen := targeted(adapter)):
        return
    pairs = [module.name for module in adapter.modules.values() if "A" in module.keys and module.variant != "experts"]
    if adapter.config.get("ensure_weight_tying"):  # PEFT targets the layer that shares an embedding's weight itself
        pairs = [name for name in pairs if not _HEAD.search(f".{name}")]
    try:
        lost = [name for name in pairs if not chosen(name)]
    except ConfigError:
        return  # said by the reader
    if lost:
        what = f"{_share(len(lost), len(pairs))}: {said} leave them out ({first_of(lost)})"
        yield _ignored(len(lost), len(pairs), what)


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


def targeted(adapter: LoraAdapter) -> Chosen | None:
    """Return what tells whether PEFT would adapt a module of that name; None where the configuration does not say."""
    config = adapter.config
    wanted = config.get("target_modules")
    if isinstance(wanted, str) and wanted == "all-linear":
        return None
    words = config.get("layers_pattern")
    if not all(re.fullmatch(r"[\w.]*", word) for word in [words, *_names(words)] if isinstance(word, str)):
        return None
    if not isinstance(wanted, str) and not _names(wanted):
        return None
    budget = Budget()
    named = _names_of(wanted, "target_modules", budget)
    barred = _names_of(config.get("exclude_modules"), "exclude_modules", budget)
    limited = (lambda name: True) if isinstance(wanted, str) else _in_layers(config)
    return lambda name: named(name) and not barred(name) and limited(name)


def _names(value: object) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list | tuple) else []


def _names_of(wanted: object, key: str, budget: Budget) -> Chosen:
    """Return PEFT's test of a name: a whole expression, or a list of names and endings."""
    if isinstance(wanted, str):
        patterns = Patterns({f"^(?:{wanted})": True}, key, budget)
        return lambda name: bool(patterns.get(name, False))
    listed = frozenset(_names(wanted))
    return lambda name: any(end in listed for end in _ends(name))


def _ends(name: str) -> Iterator[str]:
    """Yield a name and what stands behind each of its dots."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _in_layers(config: Mapping[str, Any]) -> Chosen:
    """Return PEFT's test of `layers_to_transform`: the first number behind one of `layers_pattern`."""
    wanted, words = config.get("layers_to_transform"), config.get("layers_pattern")
    if wanted is None or wanted == []:
        return lambda name: True
    numbers = frozenset([wanted] if isinstance(wanted, int) else wanted if isinstance(wanted, list) else ())
    words = [words] if isinstance(words, str) and words else _names(words)
    starts = [rf"(?:^|.*?\.){re.escape(word)}\." for word in words] or [r".*?\.[^.]*\."]

    def inside(name: str) -> bool:
        found = next(filter(None, (re.match(start + _INDEX, name) for start in starts)), None)
        return found is not None and int(found["idx"]) in numbers

    return inside
