"""What of a LoRA would apply to a base, and what of it PEFT would take there; from headers alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from harness.doctor.in_memory import in_file
from harness.doctor.inspect.declared import lost, lost_hazard, names_saved
from harness.doctor.inspect.in_peft import HEAD, ignored, not_targeted, share
from harness.doctor.inspect.targeting import Chosen, targeted
from harness.doctor.spelling import core
from harness.files import LoraAdapter
from harness.files.architectures import Shape, looks_like
from harness.files.config import method_of
from harness.text import count, first_of, printable
from harness.verdict.blocks import family_of
from harness.verdict.file_record import BaseFit, Hazard

if TYPE_CHECKING:
    from harness.doctor.checkpoint import Checkpoint
    from harness.doctor.match import Placement

_SHOWN = 50
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_EMBEDDING = re.compile(r"(?!embed_out)\w*embed\w*|wte|wpe|shared")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_TOWERS = frozenset({"visual", "vision_model", "vision_tower", "vision_encoder", "audio_tower", "vision_embed_tokens"})
_SPEAKING = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name", "base_model_name_or_path")


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
    elif any(is_asked_of(adapter, base, placed, name) for name in placed.missing) or any(
        adapter.modules[name].variant != "experts" for name in placed.ambiguous
    ):
        yield Hazard(code="LH718", what=fit.said)
    yield from _peft_against(adapter, base, placed, fit)


def _is_tied_head(name: str, base: Checkpoint) -> bool:
    """Tell whether a name is that of an output layer that shares the embedding's weight, which no file has twice."""
    tied = base.config.get("tie_word_embeddings", "model_type" in base.config)
    return bool(tied) and bool(HEAD.search(f".{name}")) and any(map(_EMBEDDING.fullmatch, _lasts(base.layers)))


def _lasts(layers: Iterable[str]) -> Iterator[str]:
    return (layer.rpartition(".")[2] for layer in layers)


def is_asked_of(adapter: LoraAdapter, base: Checkpoint, placed: Placement, name: str) -> bool:
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
        what = f"{share(len(odd), fit.modules)}, whose names are none of this base ({first_of(odd)})"
        yield ignored(len(odd), fit.modules, what, fit.replaced)
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
        yield from not_targeted(asked, f"target_modules is not said, PEFT's own for {printable(kind, 40)}")


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
