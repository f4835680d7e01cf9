"""What each tool does with a file, and the number to put into its own field: measured, read in its code, or unknown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from harness.doctor.answer import BY_NAME, Answer, Effect, Question, Sure, by_scales, loaded_without_alpha, sure_of
from harness.doctor.converting import converted
from harness.doctor.in_release import has_its_law, in_release, why_unmeasured
from harness.doctor.inspect.engines import engine_hazards, engines, option_for
from harness.doctor.tool_models import by_name, no_model
from harness.doctor.traits import Group, Traits
from harness.files import LoraAdapter, LoraModule
from harness.law.findings import Finding, is_within
from harness.law.known import ScaleLaw, Tool, tools
from harness.law.reads import Place, Reading, reading, title_of
from harness.law.sizes import like
from harness.text import count, printable

_ORDER: tuple[Effect, ...] = ("hangs", "raises", "nothing", "drops", "wrong", "factor", "unknown", "law")
_ENGINES = {("diffsynth", "flux"): "diffsynth-flux"}  # one tool, two loaders of its own
_REFUSED = "LH724"
_PASSED_OVER = ".scale"  # A1111's, in place of alpha / rank
_MANY = 10  # the share of keys, 1 / 10, from which on nobody knows whether the rest is what was trained
_BOTH = "it reads files of one rank and alpha otherwise than those of several of both"
_IGNORES = ScaleLaw.of_powers("alpha ignored", alpha=0.0, rank=0.0)


def answers(traits: Traits, asked: Question | None = None, *, mended: bool = True) -> dict[str, Answer]:
    """Return the answer for every tool that reads the file's format, with the repair that helps where `mended`."""
    form, asked = traits.adapter.format, asked or Question()
    given = answer if mended else unmended
    return {name: given(tool, traits, asked) for name, tool in tools().items() if form in tool.formats}


def answer(tool: Tool, traits: Traits, asked: Question | None = None) -> Answer:
    """Return what `tool` does with the file, and what to repair it to where no number makes it right."""
    from harness.doctor.mending import repaired_to

    asked = asked or Question()
    found = unmended(tool, traits, asked)
    other = found.effect == "unknown" and traits.adapter.format not in tool.formats
    if found.strength is None and (other or found.effect not in ("law", "unknown")):
        return replace(found, instead=repaired_to(tool, traits, asked))
    return found


def unmended(tool: Tool, traits: Traits, asked: Question) -> Answer:
    """Return what `tool` does with the file as it is."""
    if given := _not_read(tool, traits, asked):
        return given
    hit = tuple(_hits(tool, traits, asked.version))
    if lost := _lost(tool, traits):
        return Answer(tool, *lost, sure_of(tool), findings=hit)
    given = _as_read(tool, traits, asked, [finding for finding in hit if finding.blocks])
    given = _but_for_unknown_keys(given, traits)
    needs = option_for(traits.adapter, engines()[tool.name]) if tool.name in engines() else ""
    do = f"start it with {needs}" if needs and given.effect == "law" else given.do
    return replace(given, do=do, findings=hit, notes=(*_noted(tool, hit, asked.version), *given.notes))


def _not_read(tool: Tool, traits: Traits, asked: Question) -> Answer | None:
    """Return the answer where the file is none for the tool, or the release that is asked for not the one known."""
    form, version = traits.adapter.format, asked.version
    if tool.beside and any(group.named and not group.text_encoder for group in traits.groups):
        return Answer(tool, "unknown", tool.beside, "unknown")
    if form not in tool.formats:
        if tool.convert and form == "peft":
            return converted(tool, traits, asked, list(_hits(tool, traits, version)))
        if version not in (None, tool.release) and not _is_read_release(tool, str(version)):
            says = f"was not measured in {version}: {tool.release} {tool.not_reading(form)}"
            return Answer(tool, "unknown", says, "unknown")
        if tool.cannot_read(form):
            return Answer(tool, "cannot", tool.not_reading(form), sure_of(tool))
        if not all(_rows_on_first(tool, group, traits) for group in traits.groups):
            says = f"was not measured on {form} files like this: it is known to read {', '.join(tool.formats)}"
            return Answer(tool, "unknown", says, "unknown")
    if not traits.modules or any(problem.fatal for problem in traits.adapter.problems):
        return Answer(tool, "unknown", "gets a file that is broken: mend it first", "unknown")
    if not _is_known_release(tool, version):
        return in_release(tool, traits, asked)
    if version not in (None, tool.release) and (why := why_unmeasured(tool, traits, str(version))):
        return Answer(tool, "unknown", why, "unknown")
    return None


def _hits(tool: Tool, traits: Traits, version: str | None) -> Iterator[Finding]:
    """Yield the faults that the file meets: measured in this release, and read in the tool's code."""
    yield from (each for each in traits.findings if tool.name in each.tools and each.in_release(version))
    yield from _limits(tool, traits)


def _noted(tool: Tool, hit: Iterable[Finding], version: str | None) -> Iterator[str]:
    yield from (finding.says for finding in hit if finding.effect in ("rounds", "note"))
    if version not in (None, tool.release):
        yield f"every release measured of {tool.versions} has its law (docs/releases.md)"


def _as_read(tool: Tool, traits: Traits, asked: Question, blocking: list[Finding]) -> Answer:
    """Return what comes of the file by what was measured of its keys and layers, and by the faults that it meets."""
    read = _read(tool, traits)
    if fault := next((finding for finding in blocking if finding.effect != "alpha ignored"), None):
        seen = read.effect if read.effect not in ("law", "unknown") else _effect(fault.effect)
        return Answer(tool, seen, fault.says, "unknown" if seen == "unknown" else sure_of(tool))
    if read.effect not in ("law", "factor") or (read.effect == "factor" and not read.alpha_ignored):
        return Answer(tool, read.effect, read.what, "unknown" if read.effect == "unknown" else _how_sure(tool, traits))
    ignores = read.alpha_ignored or traits.alpha_is_beside or bool(blocking)
    law = replace(_IGNORES, name=tool.name) if ignores else tool.law
    found = replace(_by_law(tool, law, traits, asked), sure=_how_sure(tool, traits))
    if read.what and read.effect == "law":
        found = replace(found, notes=(read.what,))
    if found.notes and found.strength is not None and asked.base is None:
        usual = title_of(traits.groups[0].places[0][0])
        modules = f"every module, if the model is {usual}," if found.modules else ""
        found = replace(found, do=_ASK_AGAIN.format(usual), modules=modules)
    is_sure = found.sure == "measured" or traits.is_placed or not found.modules
    return found if is_sure else replace(found, modules=BY_NAME)


def _but_for_unknown_keys(given: Answer, traits: Traits) -> Answer:
    """Return the answer where keys of no known layout stand beside the modules, perhaps parts of them."""
    keys = traits.adapter.file.keys
    left = [key for key in traits.adapter.unused_keys if not key.endswith(_PASSED_OVER)]
    if given.effect not in ("law", "factor") or not left:
        return given
    what = f"{len(left)} of {count(len(keys), 'key')}, such as {printable(left[0], 80)}, are of no layout that is known"
    if traits.has_unknown_parts or _MANY * len(left) > len(keys):
        says = f"was not measured on such files: {what}"
        return replace(given, effect="unknown", told=says, modules="", sure="unknown", strength=None, gain=None)
    return replace(given, told=f"{given.told}; {what}")


def _by_law(tool: Tool, law: ScaleLaw, traits: Traits, asked: Question) -> Answer:
    """Return the strength that undoes the tool's law for this file."""
    gains = [(law.at_one(each), module) for each, module in zip(_as_stored(traits), traits.modules, strict=True)]
    return loaded_without_alpha(tool, traits) or by_scales(tool, law.law, gains, asked)


def _as_stored(traits: Traits) -> Sequence[LoraModule]:
    """Return the modules with the alpha that a tool finds, where what the training meant by it is not known."""
    two = traits.adapter.alpha_by_release
    return [replace(module, alpha=two[0]) for module in traits.modules] if two else traits.modules


def _lost(tool: Tool, traits: Traits) -> tuple[Effect, str] | None:
    """Say why the tool finds no layer, or not all, by what the file alone says; None when nothing tells."""
    if traits.wrapped and not (tool.name == "transformers" and traits.is_wrapped_twice):
        return "nothing", traits.wrapped
    if why := no_model(tool, traits):
        return "cannot", why
    if tool.name in engines():
        return next(
            (("raises", each.what) for each in engine_hazards(traits.adapter, tool.name) if each.code == _REFUSED), None
        )
    if tool.name == "transformers":
        return traits.ignored_by_transformers
    return traits.ignored_by_peft if tool.name == "peft" else None


def _effect(found: str) -> Effect:
    return next(effect for effect in _ORDER if effect == found)


def _is_known_release(tool: Tool, version: str | None) -> bool:
    if version is None:
        return True
    if tool.known == "read":
        return _is_read_release(tool, version)
    return version == tool.release or has_its_law(tool, version)


def _is_read_release(tool: Tool, version: str) -> bool:
    return tool.known == "read" and bool(tool.versions) and is_within(version, tool.versions)


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


def _rows_on_first(tool: Tool, group: Group, traits: Traits) -> list[Reading] | None:
    """Return what was measured of a group on the most usual architecture it can belong to."""
    return _rows_for(tool, group.places[0], group, traits) if group.places else None


def _rows_for(tool: Tool, place: Place, group: Group, traits: Traits) -> list[Reading] | None:
    """Return what was measured of a group with the file's ranks and alphas: one of each, or several of both."""
    alphas = group.alphas if tool.each_part else "several" in traits.alphas
    ranks = group.ranks if tool.each_part else "ranks" in traits.alphas
    found = _rows_or_alike(tool, place, group, mixed=alphas)
    several = _rows_or_alike(tool, place, group, mixed=True) if ranks and not alphas else found
    if found and several and _worst(found).effect != _worst(several).effect:
        return [Reading("unknown", f"with one alpha over several ranks was not measured: {_BOTH}")]
    return found


def _worst(found: Iterable[Reading]) -> Reading:
    return min(found, key=lambda each: _ORDER.index(each.effect), default=Reading("law"))


def _read_group(tool: Tool, group: Group, traits: Traits) -> Reading:
    """Return what becomes of a group on the most usual architecture it can belong to, if no other one contradicts."""
    every = {place: _rows_for(tool, place, group, traits) for place in group.places}
    known = {place: _worst(rows) for place, rows in every.items() if rows}
    if not known or next(iter(every)) not in known:
        return by_name(tool, group, known.values(), language=traits.is_language)
    (place, first), *others = known.items()
    differ = {title_of(there[0]): each for there, each in others if each.effect != first.effect}
    if not differ:
        return first
    shown = [f"{title}: {printable(each.what or 'as trained', 60)}" for title, each in differ.items()]
    elsewhere = "; ".join(shown[:_SHOWN]) + (f"; and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")
    usual = f"{title_of(place[0])}: {first.what or 'as trained'}"
    if first.effect == "law" and all(each.effect in _LOUD for each in differ.values()):
        return replace(first, what=f"{usual}, but {elsewhere}")
    return Reading("unknown", f"depends on the model, which the layer names leave open ({usual}; {elsewhere})")


_SHOWN = 3  # other models
_ASK_AGAIN = "ask again with --base MODEL if the model is not {}"
_LOUD = ("raises", "nothing", "drops", "unknown")  # a user of the other model is not left with a wrong scale


def prescriptions(adapter: LoraAdapter, *, lora_alpha: float | None = None) -> dict[str, float | None]:
    """Return the strength to pass for every tool that reads the format of `adapter`; None with no reason given."""
    return {name: each.strength for name, each in answers(Traits(adapter), Question(lora_alpha=lora_alpha)).items()}


def why_not(found: Answer, traits: Traits, asked: Question) -> str:
    """Return why there is no strength, with the page of the finding and what to do instead, in one clause each."""
    from harness.doctor.mending import options

    parts = [found.says, *(finding.link for finding in found.findings if finding.blocks and finding.page)]
    if found.instead:
        words = ["lora-harness repair --to", found.instead, *options(traits, asked)]
        parts.append(f"`{' '.join(words)}` writes a file that it reads")
    return "; ".join(dict.fromkeys(part for part in parts if part))
