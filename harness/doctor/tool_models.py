"""Whether a tool's models have the layers of a file, by what the tool is for and whose names its models take."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from harness.doctor.traits import Group, Traits
from harness.doctor.what_it_is import listed, model_of
from harness.law.known import Tool
from harness.law.reads import Place, Reading, dropped, has_other_names, knows_magnitudes, layers_of, title_of

_NOBODYS = re.compile(r"^lora_(unet|te\d?|transformer)[_.]|_$")  # a prefix that was not taken off, a trailing mark


def no_model(tool: Tool, traits: Traits) -> str:
    """Say why no model of the tool has these layers, by what the tool is for and what its code has; empty: it may."""
    if tool.models == "pictures" and traits.is_decoder:
        return "has no language models"
    denoisers = [group for group in traits.groups if group.named and not group.text_encoder]
    if denoisers and tool.models in ("language", "transformers") and not tool.beside:
        return f"has no model with these layers, such as {next(iter(denoisers[0].counts))}"
    for group in denoisers if tool.has else ():
        if not any(fnmatchcase(family, glob) for family, _ in group.places or group.named for glob in tool.has):
            return f"has no such model: {model_of(traits)}"
    return ""


def by_name(tool: Tool, group: Group, known: Iterable[Reading], *, language: bool) -> Reading:
    """Return the reading of a group that was not measured: by the model's own names, or unknown."""
    if tool.models == "language" and not language:
        return Reading("unknown", "serves language models: whether it takes these layers was not measured")
    if odd := next(filter(_NOBODYS.search, group.counts), ""):
        return Reading("nothing", f"has no layer called as {odd}, nor has any model: the names are misspelt")
    fits = all(any(fnmatchcase(scheme, glob) for glob in tool.by_name) for scheme in group.schemes)
    in_family = tool.families is None or any(family in tool.families for family, _ in group.places)
    named = not tool.original_names or not group.places or all(_has_names(tool, place) for place in group.places)
    if odd := next((each for each in group.counts if not _is_called(tool, each)), ""):
        return Reading("nothing", f"has no layer called as {odd}: they are called as {tool.layers[0]}")
    doras = {spelled.partition("+")[2] for spelled in group.spelled} - {""}
    named = named and all(knows_magnitudes(tool.name, kind) for kind in doras)
    if fits and in_family and named and all(each.effect == "law" for each in known):
        return Reading("law")
    if fits and group.places and all(family in tool.own_names for family, _ in group.places):
        return _under_own_names(group)
    if not group.places:
        return Reading("unknown", "was not measured on an architecture with these layers")
    which = listed(dict.fromkeys(title_of(family) for family, _ in group.places))
    return Reading("unknown", f"was not measured on {which} with keys as {', '.join(group.spelled)[:120]}")


def _is_called(tool: Tool, layer: str) -> bool:
    """Tell whether layers of the tool's models are called so, as far as that is known."""
    return not tool.layers or any(fnmatchcase(layer, glob) for glob in tool.layers)


def _has_names(tool: Tool, place: Place) -> bool:
    """Tell whether the tool's model has these names: those of the model's authors, or diffusers' where it took them."""
    family, names = place
    if family in tool.renames:
        return False
    return names == "own" if family in tool.own_names else names != "own" or not has_other_names(family)


def _under_own_names(group: Group) -> Reading:
    """Return what becomes of the authors' names in a model that has diffusers' alone."""
    known = frozenset[str]().union(*(layers_of((family, "own")) for family, _ in group.places))
    lost = [pattern for pattern in group.counts if pattern not in known]
    if len(lost) == len(group.counts):
        return Reading("nothing", "loads none of its modules, whose names its model does not have")
    return dropped(lost, group.counts)
