"""What each tool does with a file, and the number to put into its own field: measured, read in its code, or unknown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from harness.doctor.inspect.engines import engine_hazards, engines
from harness.doctor.traits import Group, Traits, listed, model_of
from harness.files import LoraAdapter, LoraModule
from harness.law.findings import Finding, is_within
from harness.law.known import ScaleLaw, Tool, tools, wanted_scale
from harness.law.reads import (
    Place,
    Reading,
    dropped,
    has_other_names,
    knows_magnitudes,
    layers_of,
    measured_on,
    reading,
    title_of,
)
from harness.law.sizes import like

Effect = Literal["law", "factor", "drops", "nothing", "raises", "hangs", "wrong", "cannot", "unknown"]
Sure = Literal["measured", "by name", "read", "unknown"]
_ORDER: tuple[Effect, ...] = ("hangs", "raises", "nothing", "drops", "wrong", "factor", "unknown", "law")
_ENGINES = {("diffsynth", "flux"): "diffsynth-flux"}  # one tool, two loaders of its own
_PLAIN = ("lora", "conv")
_BY_CONFIG = ("peft", "transformers")
_REFUSED = "LH724"
_BESIDE = {
    "peft": "adapter_config.json beside it, where lora_alpha stands",
    "mlx": "adapter_config.json beside it, where lora_parameters say rank and scale",
}
_IGNORES = ScaleLaw.of_powers("alpha ignored", alpha=0.0, rank=0.0)


@dataclass(frozen=True)
class Answer:
    """What a tool does with a file.

    `effect` is `law` when every module gets its trained scale times a number that one strength undoes; `strength` is
    then the number for the tool's field, None when no single value is right or the file does not say enough. `gain`
    is how many times too strong the modules are at strength 1, smallest and largest, as far as it is known. `says`
    continues "<tool> …". `sure`: `measured` on the tool's own code and this architecture; `by name`: its law is
    measured, and it takes modules by the model's own names; `read` in its code; `unknown`. `instead` is the format of
    the repair that mends it, `do` what else does.
    """

    tool: Tool
    effect: Effect
    says: str
    sure: Sure
    strength: float | None = None
    gain: tuple[float, float] | None = None
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    instead: str | None = None
    do: str = ""


@dataclass(frozen=True)
class Asked:
    """A question about a file: the release of the tool (None: the one known), and what its training's alpha was.

    `lora_alpha` counts for modules without alpha; `as_rank` says that their alpha was their rank. `base` is the model.
    """

    version: str | None = None
    lora_alpha: float | None = None
    as_rank: bool = False
    base: Path | None = None


def answers(traits: Traits, asked: Asked | None = None, *, mended: bool = True) -> dict[str, Answer]:
    """Return the answer for every tool that reads the file's format, with the repair that helps where `mended`."""
    form, asked = traits.adapter.format, asked or Asked()
    given = answer if mended else unmended
    return {name: given(tool, traits, asked) for name, tool in tools().items() if form in tool.formats}


def answer(tool: Tool, traits: Traits, asked: Asked | None = None) -> Answer:
    """Return what `tool` does with the file, and what to repair it to where no number makes it right."""
    from harness.doctor.mending import repaired_to

    asked = asked or Asked()
    found = unmended(tool, traits, asked)
    if found.strength is None and found.effect not in ("law", "unknown"):
        return replace(found, instead=repaired_to(tool, traits, asked))
    return found


def unmended(tool: Tool, traits: Traits, asked: Asked) -> Answer:
    """Return what `tool` does with the file as it is."""
    form = traits.adapter.format
    if tool.beside and any(group.named and not group.text_encoder for group in traits.groups):
        return Answer(tool, "unknown", tool.beside, "unknown")
    if form not in tool.formats:
        what = f"does not read {form} files, it reads {', '.join(tool.formats)}"
        return Answer(tool, "cannot", what, _sure(tool), do=tool.convert if form == "peft" else "")
    if not traits.modules or any(problem.fatal for problem in traits.adapter.problems):
        return Answer(tool, "unknown", "gets a file that is broken: mend it first", "unknown")
    if not _is_known_release(tool, asked.version):
        what = f"was not measured in {asked.version}, only in {tool.release}"
        return Answer(tool, "unknown", f"{what}; `lora-harness check` measures the one installed here", "unknown")
    known = (each for each in traits.findings if tool.name in each.tools and each.in_release(asked.version))
    hit = [*known, *_limits(tool, traits)]
    if lost := _lost(tool, traits):
        return Answer(tool, *lost, _sure(tool), findings=tuple(hit))
    notes = tuple(finding.says for finding in hit if finding.effect in ("rounds", "note"))
    blocking = [finding for finding in hit if finding.blocks]
    read = _read(tool, traits)
    for finding in (each for each in blocking if each.effect != "alpha ignored"):
        seen = read.effect if read.effect not in ("law", "unknown") else _effect(finding.effect)
        return Answer(tool, seen, finding.says, _sure(tool), findings=tuple(hit), notes=notes)
    if read.effect not in ("law", "factor") or (read.effect == "factor" and not read.alpha_ignored):
        sure: Sure = "unknown" if read.effect == "unknown" else _sure(tool)
        return Answer(tool, read.effect, read.what, sure, findings=tuple(hit), notes=notes)
    ignores = (
        read.alpha_ignored or traits.alpha_is_beside or any(finding.effect == "alpha ignored" for finding in blocking)
    )
    law = replace(_IGNORES, name=tool.name) if ignores else tool.law
    notes += (read.what,) if read.what and read.effect == "law" else ()
    return replace(_by_law(tool, law, traits, asked), findings=tuple(hit), notes=notes, sure=_how_sure(tool, traits))


def _lost(tool: Tool, traits: Traits) -> tuple[Effect, str] | None:
    """Say why the tool finds no layer, or not all, by what the file alone says; None when nothing tells."""
    if traits.wrapped:
        return "nothing", traits.wrapped
    if why := _no_model(tool, traits):
        return "cannot", why
    if tool.name in engines():
        return next(
            (("raises", each.what) for each in engine_hazards(traits.adapter, tool.name) if each.code == _REFUSED), None
        )
    return traits.ignored_by_peft if tool.name in _BY_CONFIG else None


def _no_model(tool: Tool, traits: Traits) -> str:
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


def _effect(found: str) -> Effect:
    return next(effect for effect in _ORDER if effect == found)


def _is_known_release(tool: Tool, version: str | None) -> bool:
    if version is None or tool.known == "read":
        return version is None
    return version == tool.release or bool(tool.versions and is_within(version, tool.versions))


def _sure(tool: Tool) -> Sure:
    return "measured" if tool.known == "measured" else "read"


def _how_sure(tool: Tool, traits: Traits) -> Sure:
    if tool.known != "measured":
        return "read"
    return (
        "measured"
        if all(group.places and _rows(tool, group.places[0], group, mixed=False) for group in traits.groups)
        else "by name"
    )


def _limits(tool: Tool, traits: Traits) -> Iterator[Finding]:
    """Yield what was read, not measured, of the tool's faults with this file."""
    yield from (finding for finding in tool.faults if finding.hits(traits.words))


def _read(tool: Tool, traits: Traits) -> Reading:
    """Return the worst of what becomes of the file's variants and groups."""
    found = [*_variants(tool, traits), *(_read_group(tool, group, traits) for group in traits.groups)]
    return _worst(found)


def is_left_for_names(tool: Tool, traits: Traits) -> bool:
    """Tell whether `tool` leaves modules out, or is unknown, for what they are called and made of: alphas aside."""
    return not traits.varied and _read(tool, traits).effect not in ("law", "factor")


def _variants(tool: Tool, traits: Traits) -> Iterator[Reading]:
    for variant in traits.variants:
        says = tool.variants.get(variant)
        if says is None:
            yield Reading("unknown", f"was not measured on {variant} modules")
        elif says != "ok":
            yield Reading("drops", says)


def _rows(tool: Tool, place: Place, group: Group, *, mixed: bool) -> list[Reading] | None:
    """Return what was measured of a group on one architecture, a reading per spelling; None where one was not."""
    engine = _ENGINES.get((tool.name, place[0]), tool.name)
    found: list[Reading] = []
    for spelled in group.spelled:
        if (each := reading(engine, place, spelled, group.counts, mixed=mixed)) is None:
            return None
        found.append(each)
    return found


def _rows_or_alike(tool: Tool, place: Place, group: Group, *, mixed: bool) -> list[Reading] | None:
    """Return what `_rows` does, on a model of the same class where the architecture itself was not measured."""
    found, other = _rows(tool, place, group, mixed=mixed), like(place)
    return _rows(tool, other, group, mixed=mixed) if found is None and other else found


def _worst(found: Iterable[Reading]) -> Reading:
    return min(found, key=lambda each: _ORDER.index(each.effect), default=Reading("law"))


def _read_group(tool: Tool, group: Group, traits: Traits) -> Reading:
    """Return what becomes of a group on the most usual architecture it can belong to, if no other one contradicts."""
    every = {place: _rows_or_alike(tool, place, group, mixed=traits.varied) for place in group.places}
    known = {place: _worst(rows) for place, rows in every.items() if rows}
    if not known or next(iter(every)) not in known:
        return _by_name(tool, group, known.values(), language=traits.is_language)
    (place, first), *others = known.items()
    differ = {title_of(there[0]): each for there, each in others if each.effect != first.effect}
    if not differ:
        return first
    elsewhere = "; ".join(f"{title}: {each.what or 'as trained'}" for title, each in differ.items())[:200]
    usual = f"{title_of(place[0])}: {first.what or 'as trained'}"
    if first.effect == "law" and all(each.effect in _LOUD for each in differ.values()):
        return replace(first, what=f"{usual}, but {elsewhere}")
    return Reading("unknown", f"depends on the model, which the layer names leave open ({usual}; {elsewhere})")


_LOUD = ("raises", "nothing", "drops", "unknown")  # a user of the other model is not left with a wrong scale


def _by_name(tool: Tool, group: Group, known: Iterable[Reading], *, language: bool) -> Reading:
    """Return the reading of a group that was not measured: by the model's own names, or unknown."""
    if tool.models == "language" and not language:
        return Reading("unknown", "serves language models: whether it takes these layers was not measured")
    fits = all(any(fnmatchcase(scheme, glob) for glob in tool.by_name) for scheme in group.schemes)
    in_family = tool.families is None or any(family in tool.families for family, _ in group.places)
    named = not tool.original_names or not group.places or any(_has_names(tool, place) for place in group.places)
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


def _has_names(tool: Tool, place: Place) -> bool:
    """Tell whether the tool's model has these names: those of the model's authors, or diffusers' where it took them."""
    family, names = place
    return names == "own" if family in tool.own_names else names != "own" or not has_other_names(family)


def _under_own_names(group: Group) -> Reading:
    """Return what becomes of the authors' names in a model that has diffusers' alone."""
    known = frozenset[str]().union(*(layers_of((family, "own")) for family, _ in group.places))
    lost = [pattern for pattern in group.counts if pattern not in known]
    if len(lost) == len(group.counts):
        return Reading("nothing", "loads none of its modules, whose names its model does not have")
    return dropped(lost, group.counts)


def _by_law(tool: Tool, law: ScaleLaw, traits: Traits, asked: Asked) -> Answer:
    """Return the strength that undoes the tool's law for this file."""
    without = [module for module in traits.modules if module.rank and module.alpha is None]
    if without and tool.without_alpha == "raises":
        what = _BESIDE.get(next(iter(tool.formats)), "alpha")
        do = f"put {what}" if what != "alpha" else ""
        return Answer(tool, "raises", f"cannot load a file without {what}", "read", do=do)
    wanted = [_wanted(module, asked) for module in traits.modules]
    known = [scale for scale in wanted if scale is not None]
    gains = [law.at_one(module) for module in traits.modules]
    if len(known) < len(wanted):
        return Answer(tool, "law", _what_is_missing(tool, traits), "unknown")
    ratios = [gain / scale for gain, scale in zip(gains, known, strict=True) if scale]
    span = (min(ratios), max(ratios)) if ratios else None
    strength = law.law.strength_for(gains, known)
    plain = all(module.variant in _PLAIN for module in traits.modules)
    if strength is None or (strength != 1 and not plain):
        what = "no single strength is right" if strength is None else "its strength is not linear in such modules"
        return Answer(tool, "factor", f"{_strong(span)}: {what}", "unknown", gain=span)
    return Answer(tool, "law", _strong(span), "unknown", strength, span)


def _wanted(module: LoraModule, asked: Asked) -> float | None:
    if asked.as_rank and module.rank and module.alpha is None:
        return 1.0
    if module.rank and module.alpha == 0 and asked.lora_alpha is None:
        return None  # nobody trains at scale 0
    return wanted_scale(module, asked.lora_alpha)


def _what_is_missing(tool: Tool, traits: Traits) -> str:
    if any(module.rank and module.alpha == 0 for module in traits.modules):
        return f"takes alpha 0 as scale {tool.alpha_zero}; what the training meant, the file does not say"
    ranks = {module.rank for module in traits.modules if module.rank and module.alpha is None}
    over = f"{ranks.pop()}" if len(ranks) == 1 else "rank"
    what = "applies modules without alpha at scale 1; which alpha was trained with, the file does not say"
    return f"{what}: lora_alpha / {over}, once it is known"


def _strong(span: tuple[float, float] | None) -> str:
    if span is None or span == (1.0, 1.0):
        return "applies every module as trained"
    low, high = span
    shown = f"{low:.4g}" if abs(high - low) < 1e-6 * abs(high) else f"{low:.4g} to {high:.4g}"
    return f"applies modules {shown} times as strong as trained"


def prescriptions(adapter: LoraAdapter, *, lora_alpha: float | None = None) -> dict[str, float | None]:
    """Return the strength to pass for every tool that reads the format of `adapter`; None with no reason given."""
    return {name: each.strength for name, each in answers(Traits(adapter), Asked(lora_alpha=lora_alpha)).items()}


def why_not(found: Answer, traits: Traits, asked: Asked) -> str:
    """Return why there is no strength, with the page of the finding and what to do instead, in one clause each."""
    from harness.doctor.mending import options

    parts = [found.says, *(finding.link for finding in found.findings if finding.blocks and finding.page)]
    if found.instead:
        words = ["lora-harness repair --to", found.instead, *options(traits, asked)]
        parts.append(f"`{' '.join(words)}` writes a file that it reads")
    return "; ".join(dict.fromkeys(part for part in parts if part))


def how_sure(given: Answer) -> str:
    """Return how the answer is known, with the pages of the findings behind it."""
    tool = given.tool
    ways = {
        "measured": f"measured on {tool.release}, on this architecture and spelling of keys ({measured_on()})",
        "by name": f"the law is measured on {tool.release}; it takes these modules if its model has their names",
        "read": f"not measured: {tool.provenance}",
        "unknown": "not measured",
    }
    pages = [
        finding.link for finding in given.findings if finding.page and (finding.blocks or finding.effect == "rounds")
    ]
    return "; ".join([ways[given.sure], *given.notes, *pages])


def field_of(tool: Tool, strength: float) -> str:
    """Return what to write into the field of `tool`."""
    if tool.takes_none:
        return f"nothing to pass: {tool.field.strip('()').removeprefix('none: ')}" if strength == 1 else f"{strength:g}"
    if ":weight>" in tool.field:
        return tool.field.replace("weight", f"{strength:.6g}")
    return f"{tool.field} = {strength:.6g}"
