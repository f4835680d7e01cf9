"""Which layer of a model each module of a LoRA adapts: the one matcher of `inspect`, `verify` and `repair`."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from harness.doctor.experts import in_one, one_by_one
from harness.doctor.in_memory import in_file
from harness.doctor.spelling import Scope, core, flat_core
from harness.files import LoraAdapter, LoraModule
from harness.files.architectures import Alias, Shape, Slot, UnjudgedError, UnplacedError, sliced

# where a component of a pipeline lies in a checkpoint that holds several
_HOMES: Mapping[str, tuple[str, ...]] = {
    "te": ("cond_stage_model.", "conditioner.embedders.0.", "text_encoder.", "text_encoders.clip_l."),
    "te2": ("conditioner.embedders.1.", "text_encoder_2.", "text_encoders.clip_g.", "text_encoders.t5xxl."),
    "te3": ("text_encoder_3.", "text_encoders.t5xxl."),
}
_MAIN = frozenset({"", "transformer", "unet", "diffusion_model", "lycoris"})  # whose names begin the model's
_OF_BLOCKS = frozenset({"adaption_prompt", "shadow"})  # methods that adapt no layer of a block but all of it
_ALIKE = {"te1": "te", "text_encoder": "te", "text_encoder_2": "te2", "text_encoder_3": "te3"}


class Match(NamedTuple):
    """A layer by its name in the model, and that name as the LoRA spells it: with dots, behind the LoRA's prefix."""

    layer: str
    spelling: str


class Replaced(NamedTuple):
    """A prefix of the LoRA's names that had to be replaced by another for `modules` modules to fit."""

    old: str
    new: str
    modules: int


@dataclass(frozen=True)
class Placement:
    """Where every module of a LoRA goes.

    `slots` has the modules that fit, `missing` those without a layer, `ambiguous` those that fit several layers or
    share one, or whose rows in it cannot be told, and `misfits` those whose layer has another shape; both with the
    reason. `replaced` tells the prefixes without whose replacement names do not fit, `families` the architectures
    whose two names for a layer were needed, `suspects` the layers that ambiguous modules may be, `converted` the
    modules that have the names of layers in memory, which transformers gives other ones in files.
    """

    slots: Mapping[str, tuple[Slot, ...]]
    missing: tuple[str, ...] = ()
    ambiguous: Mapping[str, str] = field(default_factory=dict)
    misfits: Mapping[str, str] = field(default_factory=dict)
    replaced: tuple[Replaced, ...] = ()
    families: tuple[str, ...] = ()
    suspects: tuple[str, ...] = ()
    converted: frozenset[str] = frozenset()


def place(
    adapter: LoraAdapter, layers: Mapping[str, Shape | None], config: Mapping[str, Any] | None = None
) -> Placement:
    """Return where every module of `adapter` goes in a model; `layers` maps its layers to [out, in, ...], if known.

    `config` is that of the model, which tells its heads where q, k and v are interleaved by them.

    Tried in this order: the name with or without the prefix of a checkpoint; without wrappers (`_orig_mod.`) and the
    prefixes of larger models (`language_model.`); an architecture's other name; the longest ending that is one layer's;
    the name in the file of what transformers calls otherwise in memory.
    """
    found = _placed(adapter, layers, config or {})
    if not found.missing or adapter.format != "peft" or not config:
        return found
    names = in_file(config, len(layers))
    modules = {
        name: module.changed(name=names[module.name]) if name in found.missing and module.name in names else module
        for name, module in adapter.modules.items()
    }
    again = {name for name in found.missing if modules[name] is not adapter.modules[name]}
    if not again:
        return found
    return replace(_placed(replace(adapter, modules=modules), layers, config), converted=frozenset(again))


def _placed(adapter: LoraAdapter, layers: Mapping[str, Shape | None], config: Mapping[str, Any]) -> Placement:
    placer = _Placer(adapter, layers, config)
    for name, module in adapter.modules.items():
        placer.add(name, module)
    placer.ask_again()
    return placer.result()


def match_layers(adapter: LoraAdapter, layers: Collection[str]) -> dict[str, Match]:
    """Return {module of the adapter: its layer} for the modules that change the whole of one layer.

    A name that fits several layers and a layer that several modules claim are left out.
    """
    slots = place(adapter, dict.fromkeys(layers)).slots
    whole = {name: some[0] for name, some in slots.items() if len(some) == 1 and some[0][2:] == (None, None)}
    return {name: Match(slot.layer, slot.spelling) for name, slot in whole.items()}


class _Placer:
    """Place modules one by one, then tell which of them are in each other's way."""

    def __init__(self, adapter: LoraAdapter, layers: Mapping[str, Shape | None], config: Mapping[str, Any]) -> None:
        self.adapter, self.layers, self.config = adapter, layers, config
        self.slots: dict[str, tuple[Slot, ...]] = {}
        self.missing: list[str] = []
        self.ambiguous: dict[str, str] = {}
        self.misfits: dict[str, str] = {}
        self.replaced: Counter[tuple[str, str]] = Counter()
        self.by_ending: set[str] = set()
        self.families: dict[str, None] = {}
        self.suspects: dict[str, None] = {}
        self._scopes: dict[str, Scope] = {}

    def add(self, name: str, module: LoraModule) -> None:
        """Find the place of one module; what other methods share among all has no name, and none; a block is none."""
        if not module.name or (module.variant in _OF_BLOCKS and self._is_block(module.name)):
            return
        try:
            found = self._find(name, module)
            if found:
                self.slots[name] = self._fitted(module, found)
            elif experts := self._experts(module):
                self.slots[name] = experts
            else:
                self.missing.append(name)
        except UnjudgedError as why:
            self.ambiguous[name] = str(why)
            self.suspects |= dict.fromkeys(why.layers)
        except UnplacedError as why:
            self.misfits[name] = str(why)

    def ask_again(self) -> None:
        """Place what was ambiguous once more: by now it is known whose names the other modules have."""
        names = list(self.ambiguous) if self.families else []
        if names:
            self.ambiguous, self.suspects = {}, {}
        for name in names:
            self.add(name, self.adapter.modules[name])

    def _is_block(self, name: str) -> bool:
        return any(layer.startswith(f"{name}.") or f".{name}." in layer for layer in self.layers)

    def result(self) -> Placement:
        """Return the placement without the modules that claim the same rows."""
        guessed = {
            name for names in self._claims().values() for name in names & self.by_ending if names - self.by_ending
        }
        self.slots = {name: slots for name, slots in self.slots.items() if name not in guessed}
        self.missing += guessed
        for layer, names in self._claims().items():
            self.ambiguous |= dict.fromkeys(names, f"several modules claim {layer}")
            self.suspects |= {layer: None} if names else {}
        placed = {name: some for name, some in self.slots.items() if name not in self.ambiguous}
        replaced = tuple(Replaced(*pair, times) for pair, times in self.replaced.most_common())
        return Placement(
            placed,
            tuple(self.missing),
            self.ambiguous,
            self.misfits,
            replaced,
            tuple(self.families),
            tuple(self.suspects),
        )

    def _claims(self) -> dict[str, set[str]]:
        """Return the modules that claim the same rows, by the layer."""
        claims: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        for name, slots in self.slots.items():
            for slot in slots:
                claims[slot.layer].append((*(slot.rows or (0, math.inf)), name))
        return {layer: _meeting(some) for layer, some in claims.items() if len(some) > 1}

    def _scope(self, component: str) -> Scope:
        if component not in self._scopes:
            self._scopes[component] = Scope(self._of_component(component), self.adapter.flattened)
        return self._scopes[component]

    def _experts(self, module: LoraModule) -> tuple[Slot, ...]:
        """Return the slots of experts that the model keeps otherwise than the LoRA: one by one, or in one parameter."""
        scope = self._scope(module.component)

        def find(name: str) -> str | None:
            found = scope.exact.get(name, ())
            layers = {scope.names[scope.dotted[spelling]] for spelling in found}
            layers |= {scope.names[own] for own in scope.cores.get(core(name), ())} if not layers else set()
            return layers.pop() if len(layers) == 1 else None

        return (one_by_one if module.variant == "experts" else in_one)(module, find, self.layers)

    def _of_component(self, component: str) -> dict[str, str]:
        """Return the layers of a component by their names in it where a checkpoint holds several, else all of them."""
        own = _HOMES.get(_ALIKE.get(component, component), () if component in _MAIN else (f"{component}.",))
        if any(layer.startswith(own) for layer in self.layers if own):
            homes = {layer: next((home for home in own if layer.startswith(home)), None) for layer in self.layers}
            return {layer.removeprefix(home): layer for layer, home in homes.items() if home}
        others = tuple(home for homes in _HOMES.values() for home in homes if home not in own)
        left = {layer: layer for layer in self.layers if not layer.startswith(others)}
        return left or {layer: layer for layer in self.layers}

    def _find(self, key: str, module: LoraModule) -> tuple[Slot, ...]:
        scope, name = self._scope(module.component), module.name
        if spellings := scope.exact.get(name):
            return _one(name, [Slot(scope.names[scope.dotted[spelling]], spelling) for spelling in spellings])
        short = flat_core(name) if scope.flattened else core(name)
        for found in (short, *filter(None, [scope.ending(short)] if short not in scope.cores else [])):
            slots = self._by_core(scope, module, found)
            if slots:
                if found in scope.cores:
                    self._note(module, slots)
                self.by_ending |= {key} if found != short else set()
                return slots
        return ()

    def _by_core(self, scope: Scope, module: LoraModule, short: str) -> tuple[Slot, ...]:
        names = scope.cores.get(short, [])
        if names:
            spelling = core if scope.flattened else lambda _: module.name
            return _one(module.name, [Slot(scope.names[own], spelling(own)) for own in names])
        by_row: dict[tuple[object, ...], list[tuple[Alias, str]]] = defaultdict(list)
        for alias, layer in scope.others(short):
            by_row[alias.row, alias.values].append((alias, layer))
        return self._bridged(module, list(by_row.values()))

    def _bridged(self, module: LoraModule, groups: list[list[tuple[Alias, str]]]) -> tuple[Slot, ...]:
        """Return the slots of a module whose layer has another name, from the rows of the table that fit."""
        found: dict[tuple[Slot, ...], list[str]] = {}
        problems = []
        for group in groups:
            try:
                slots = tuple(sliced(module.out_features, module.in_features, group, self.layers, self.config))
                found.setdefault(self._fitted(module, slots), []).append(group[0][0].row.family)
            except UnplacedError as why:
                problems.append(why)
        if _differ(found):  # the names of one model's authors: those that other modules have
            of_others = {slots: names for slots, names in found.items() if not self.families.keys().isdisjoint(names)}
            found = of_others or found
        if _differ(found):
            several = [slots[0].layer for slots in found]
            raise UnjudgedError(f"it may be {' or '.join(several)}", [slot.layer for slots in found for slot in slots])
        if not found and problems:
            raise problems[0]
        names = next(iter(found.values()), [])
        if self.families.keys().isdisjoint(names):
            self.families |= dict.fromkeys(names[:1])
        return next(iter(found), ())

    def _note(self, module: LoraModule, slots: tuple[Slot, ...]) -> None:
        """Count the prefix that had to be replaced, where a whole layer was found by the end of its name."""
        scope = self._scope(module.component)
        name, layer = module.name, scope.key(slots[0].layer)
        if len(slots) == 1 and slots[0].rows is None and slots[0].spelling in (module.name, core(slots[0].layer)):
            end = _common_end(name, layer, "_" if scope.flattened else ".")
            self.replaced[name.removesuffix(end), layer.removesuffix(end)] += name != layer

    def _fitted(self, module: LoraModule, slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
        return tuple(_checked(self.adapter, module, slot, self.layers[slot.layer]) for slot in slots)


def _differ(found: Iterable[tuple[Slot, ...]]) -> bool:
    """Tell whether slots are of several layers or rows, however these are spelled."""
    return len({tuple(slot._replace(spelling="") for slot in slots) for slots in found}) > 1


def _common_end(name: str, other: str, mark: str) -> str:
    """Return the longest ending of whole words that two names share."""
    parts, others = name.split(mark)[::-1], other.split(mark)[::-1]
    same = next((at for at, (one, two) in enumerate(zip(parts, others, strict=False)) if one != two), None)
    return mark.join(parts[: min(len(parts), len(others)) if same is None else same][::-1])


def _one(name: str, slots: list[Slot]) -> tuple[Slot, ...]:
    if len({slot.layer for slot in slots}) > 1:
        names = [slot.layer for slot in slots]
        raise UnjudgedError(f"it may be {' or '.join(names[:3])}", names)
    return (slots[0],)


def _meeting(claims: list[tuple[float, float, str]]) -> set[str]:
    """Return the names of those of several (start, stop, name) that meet one of another name."""
    found: set[str] = set()
    open_: list[tuple[float, str]] = []
    for start, stop, name in sorted(claims):
        open_ = [(end, other) for end, other in open_ if end > start]
        others = {other for _, other in open_ if other != name}
        found |= others | ({name} if others else set())
        open_.append((stop, name))
    return found


def _checked(adapter: LoraAdapter, module: LoraModule, slot: Slot, shape: Shape | None) -> Slot:
    """Return the slot, with the rows of a module that adapts the first rows only.

    Raises:
        UnplacedError: the shapes do not fit.
    """
    if (
        not shape
        or not module.out_features
        or module.variant in ("experts", "set", "tokens")
        or _reshapes(adapter, module, shape)
    ):
        return slot
    wanted = slot.part[1] - slot.part[0] if slot.part else module.out_features
    rows = slot.rows[1] - slot.rows[0] if slot.rows else shape[0]
    if adapter.format == "xlabs" and wanted < rows and slot.rows is None and _columns_fit(module, shape):
        return slot._replace(rows=(0, wanted))
    if slot.rows and slot.rows[1] > shape[0]:
        raise UnplacedError(_misfit(module, slot, shape))
    turned = slot.rows is None and slot.part is None and shape[:2] == (module.in_features, module.out_features)
    if turned or (wanted == rows and _columns_fit(module, shape)):
        return slot
    raise UnplacedError(_misfit(module, slot, shape))


def _columns_fit(module: LoraModule, shape: Shape) -> bool:
    """Tell whether the inputs fit: LoKr may pad nothing, a vector has none, a grouped convolution has fewer."""
    if len(shape) < 2 or not module.in_features:
        return True
    columns = 1
    for size in shape[1:]:
        columns *= size
    return module.in_features in (shape[1], columns) or (len(shape) > 2 and module.in_features % shape[1] == 0)


def _reshapes(adapter: LoraAdapter, module: LoraModule, shape: Shape) -> bool:
    """Tell whether a module comes with a wider layer than the base has: FLUX's control LoRAs, ComfyUI's reshapes."""
    control = {"bfl-control": "img_in", "diffusers": "x_embedder"}.get(adapter.format) == module.name
    wider = len(shape) == 2 and shape[0] == module.out_features and shape[1] < module.in_features
    return "reshape_weight" in module.keys or (control and wider)


def _misfit(module: LoraModule, slot: Slot, shape: Shape) -> str:
    wide = f"{module.out_features}x{module.in_features}"
    return f"it is {wide}, {slot.layer} is {'x'.join(map(str, shape))}"
