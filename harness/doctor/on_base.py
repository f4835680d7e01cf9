"""What is left of an answer once the model is given: the modules that it has, under names that the tool looks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.doctor.answer import Answer
from harness.doctor.inspect.fit import base_hazards, fit_of, is_asked_of
from harness.doctor.traits import Traits
from harness.files import LoraAdapter
from harness.text import count, printable
from harness.verdict.file_record import BaseFit, Hazard

if TYPE_CHECKING:
    from harness.doctor.checkpoint import Checkpoint
    from harness.doctor.match import Placement

_WIDENS = "diffusers"  # the tool that makes a layer wider for a file


@dataclass(frozen=True)
class Held:
    """A file held against a base: what applies, what is wrong with that, and what tools make of it by their own rules.

    `placed` says where in the `base` its modules go. `left_keys` are those of modules that the base should have a layer
    for and has none; `wider` modules have more inputs than their layer.
    """

    base: Checkpoint
    placed: Placement
    fit: BaseFit
    hazards: tuple[Hazard, ...] = ()
    left_keys: int = 0
    wider: tuple[str, ...] = ()

    @property
    def bridged(self) -> str:
        """How names of the file were brought to those of the base, where they are not the same."""
        fit = self.fit
        return next(iter((*fit.replaced, *(f"by the two names that layers of {name} have" for name in fit.names))), "")


def held_against(traits: Traits, base: Path) -> Held:
    """Hold a file against a base, by the headers of both.

    Raises:
        LoraFileError: the base cannot be read.
    """
    from harness.doctor.checkpoint import Checkpoint

    weights, adapter = Checkpoint.open(base), traits.adapter
    placed = weights.place(adapter)
    fit = fit_of(adapter, weights, placed)
    left = [adapter.modules[name] for name in placed.missing if is_asked_of(adapter, weights, placed, name)]
    return Held(
        weights,
        placed,
        fit,
        tuple(base_hazards(adapter, weights, placed, fit)),
        sum(len(module.keys) for module in left),
        tuple(_wider(adapter, weights, placed)),
    )


def _wider(adapter: LoraAdapter, base: Checkpoint, placed: Placement) -> Iterator[str]:
    """Yield the modules that were taken to fit a narrower layer, since diffusers widens it for them."""
    if adapter.format != _WIDENS:
        return
    for name, slots in placed.slots.items():
        module, shape = adapter.modules[name], base.shapes[slots[0].layer]
        if module.name == "x_embedder" and shape and shape[1] < module.in_features:
            yield printable(name, 80)


def on_base(found: Mapping[str, Answer], held: Held | None, traits: Traits) -> dict[str, Answer]:
    """Return the answers for this base; without one they are what they were."""
    return {name: _on_base(given, held, traits) if held else given for name, given in found.items()}


def _on_base(given: Answer, held: Held, traits: Traits) -> Answer:
    """Return the answer for this base.

    A tool of which it was measured that it finds these names keeps its answer; of another one that takes what its
    model has under the same name, nobody knows whether it would take other names for these layers.
    """
    if given.effect not in ("law", "factor"):
        return given
    tool, fit = given.tool, held.fit
    if held.bridged and given.sure in ("by name", "read") and not _knows(given, traits):
        says = f"may not find its layers, which this base calls otherwise ({held.bridged}): that was not measured"
        return replace(given, effect="unknown", told=says, modules="", sure="unknown", strength=None, gain=None)
    if tool.most_left is not None and held.left_keys > tool.most_left:
        says = f"leaves the whole file out: {held.left_keys} of its keys have no layer in this base"
        says += f", and it allows {tool.most_left}"
        return replace(given, effect="nothing", told=says, modules="", strength=None, gain=None)
    if held.left_keys:
        some = f"the {fit.applied} of {count(fit.modules, 'module')} that this base has"
        given = replace(given, modules=some) if given.modules else replace(given, told=f"{given.told}; it takes {some}")
    if held.wider:
        who = "it widens that" if tool.name == _WIDENS else f"only {_WIDENS} is known to widen that"
        more = f"{held.wider[0]} has more inputs than its layer here, as control and Fill LoRAs have: {who}"
        return replace(given, told=f"{given.told}; {more}")
    return given


def _knows(given: Answer, traits: Traits) -> bool:
    """Tell whether the tool's code was read for the names of this architecture, whichever the base has."""
    families = given.tool.families or ()
    places = [place for group in traits.groups for place in group.places]
    return bool(places) and all(family in families for family, _ in places)
