"""What a named release of a tool does with a file, as far as the committed table of releases tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from harness.doctor.answer import Answer, Question, Sure, by_scales
from harness.doctor.traits import Traits
from harness.law.findings import is_within
from harness.law.known import Tool, file_probes
from harness.law.released import NO_MODEL, NOTHING, RAISES, SOME, SPELLED, Released, released, versions_of
from harness.law.sizes import like
from harness.text import printable

_PLAIN = ("lora", "conv")  # what findings of scales are measured on
_SCALES = ("factor", "alpha ignored", "rounds", "note", "call")


def in_release(tool: Tool, traits: Traits, asked: Question) -> Answer:
    """Return what the release that is asked for does with the file; unknown where it was not measured on such files."""
    version, loader = str(asked.version), _measured_as(tool)
    known = versions_of(loader)
    found = _measured(tool, loader, traits, version) if version in known else _nearest(tool, known, version)
    if isinstance(found, str):
        spec = f"{loader}=={version}"
        do = f"`lora-harness install {spec}`, then `lora-harness inspect FILE --loader {spec}` measures it"
        return Answer(tool, "unknown", found, "unknown", do=do if known and is_within(version, ">=0") else "")
    tool = replace(tool, release=version)
    given = _answer(tool, found, traits, asked)
    hit = tuple(each for each in traits.findings if tool.name in each.tools and each.in_release(version))
    return replace(given, sure=_sure(given), notes=("docs/releases.md",), day=found.day, findings=hit)


def _sure(given: Answer) -> Sure:
    return "unknown" if given.effect == "unknown" else "measured"


def has_its_law(tool: Tool, version: str) -> bool:
    """Tell whether a release lies among those that were measured and have the law of the tool's row."""
    known = versions_of(_measured_as(tool))
    measured = bool(known) and is_within(version, f">={known[0]},<={known[-1]}")
    return measured and bool(tool.versions) and is_within(version, tool.versions)


def _measured_as(tool: Tool) -> str:
    """Return the name under which the releases of a tool were measured, by whichever of its calls."""
    return tool.loader.partition("-")[0]


def why_unmeasured(tool: Tool, traits: Traits, version: str) -> str:
    """Say why what is known of the tool's own release need not hold in another with the same law; empty: it does."""
    others = sorted(_variants(traits) - set(_PLAIN))
    if others:
        return f"was not measured in {version} on {', '.join(others)} modules, only in {tool.release}"
    return _new_fault(tool, traits, version, ())


def _variants(traits: Traits) -> set[str]:
    return {"rslora" if module.rslora else module.variant for module in traits.adapter.modules.values()}


def _new_fault(tool: Tool, traits: Traits, version: str, measured: tuple[str, ...]) -> str:
    """Name a fault of the tool with such files that was found in another release: whether this one has it is open."""
    for finding in traits.findings:
        open_yet = finding.blocks and finding.effect not in measured and not finding.in_release(version)
        if tool.name in finding.tools and open_yet:
            return f"{finding.says} in {finding.measured}; whether {version} does was not measured ({finding.link})"
    return ""


def _measured(tool: Tool, loader: str, traits: Traits, version: str) -> Released | str:
    """Return what was measured of such files in a release, or why nothing was."""
    form, (group, *others) = traits.adapter.format, traits.groups
    if (variants := _variants(traits)) != {"lora"}:
        return f"was measured in {version} on plain LoRA alone, not on {', '.join(sorted(variants - {'lora'}))}"
    if traits.alphas & {"none", "some-missing", "zero", "negative"}:
        return f"was not measured in {version} on modules whose alpha is missing, zero or negative"
    if fault := _new_fault(tool, traits, version, _SCALES):
        return fault
    places = [near for place in group.places[:1] for near in (place, like(place)) if near and near[1] == "own"]
    found = next((seen for family, _ in places if (seen := released(loader, version, form, family))), None)
    if others or found is None or group.spelled != (SPELLED.get(form),) or traits.alpha_is_beside or traits.wrapped:
        return f"was measured in {version}, but not on files with such keys, layers or parts"
    return found


def _nearest(tool: Tool, known: Sequence[str], version: str) -> str:
    """Say that a release was not measured, and which ones nearest to it were."""
    asked = printable(version, 40)
    if not known:
        return f"was not measured in {asked}: what is known is {tool.provenance}"
    before = [each for each in known if is_within(each, f"<{version}")][-1:]
    after = [each for each in known if is_within(each, f">{version}")][:1]
    return f"was not measured in {asked}, but in {' and '.join([*before, *after] or [tool.release])} (docs/releases.md)"


def _answer(tool: Tool, found: Released, traits: Traits, asked: Question) -> Answer:
    if found.state == NO_MODEL:
        return Answer(tool, "cannot", f"has no such model in {tool.release}", "measured")
    if found.state.endswith(SOME):
        return Answer(tool, "unknown", f"{RAISES} on some files: {printable(found.what, 120)}", "measured")
    if found.state == RAISES:
        return Answer(tool, "raises", f"{RAISES}: {printable(found.what, 120)}", "measured")
    if found.state == NOTHING:
        return Answer(tool, "nothing", "loads none of its modules, without an error", "measured")
    if found.law is None:
        return Answer(tool, "wrong", "scales modules by no single law: no number is right", "measured")
    return _by_laws(tool, found, traits, asked)


def _by_laws(tool: Tool, found: Released, traits: Traits, asked: Question) -> Answer:
    modules = [module for module in traits.adapter.modules.values() if module.rank]
    probes = file_probes(modules)
    laws = found.laws(probes)
    if laws is None:
        what = f"gives {found.trait} {found.state}, the others what they were trained with: no single strength is right"
        return Answer(tool, "factor", what, "measured")
    gains = [(law.scale(probe), module) for law, probe, module in zip(laws, probes, modules, strict=True)]
    return by_scales(tool, laws[0], gains, asked)
