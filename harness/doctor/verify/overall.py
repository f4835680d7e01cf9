"""The verdict on a whole merge: what is wrong, the gravest first, and the numbers of all its layers together."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from harness.doctor.verify.measurement import State
from harness.doctor.verify.modules import CHECK, LOST, Module, Unjudged, damage_of, survival, where
from harness.doctor.verify.untouched import Untouched
from harness.law.diagnosis import Diagnosis, diagnosis_record
from harness.text import count, first_of, printable
from harness.verdict.codes import CODES
from harness.verdict.verdict import LawRecord, Verdict

Fact = tuple[str, str]  # code and sentence
_PLAIN = frozenset({"lora", "conv", "lora_bias", "embedding", "experts"})  # whose update is B @ A
_SHOWN = 20
_READINGS_SHOWN = 3
_SAME, _APART = 0.02, 0.05  # relative; factors that differ by less are one, those that differ by more are two
_FIXES = {
    "LH101": "merge again with this file; see that the merger's names for the layers are those of the base",
    "LH102": "merge again: the merger left these layers out, or lost them when it saved",
    "LH103": "see that --base is the model, and the component of it, that the LoRA was trained on",
    "LH104": "merge again: the merger put updates into other layers than those of their names",
    "LH206": "merge again from the base, once",
    "LH207": "merge again with the strength as it is, or pass the one that was meant with --strength",
    "LH304": "merge again with a merger that follows the formula of this variant",
    "LH401": "merge again from this base, not from another revision or after rounding it to fewer bits; if another "
    "LoRA was merged too, pass it with a second --lora",
    "LH502": "do not use this checkpoint; merge again, the sum in float32",
    "LH902": "save the merged checkpoint again: it must have the base's tensors in the base's shapes",
}  # what to do with a checkpoint; the codes' own fixes speak to the author of a loader
_BY_SCALE = "merge again at strength * alpha / {} of each module"


def overall_verdict(
    found: Sequence[Module],
    verdicts: Sequence[Verdict],
    untouched: Untouched,
    diagnosis: Diagnosis,
    frame: dict[str, Any],
    *,
    kinds: Collection[str] = ("lora",),
    allowed: Sequence[Unjudged] = (),
) -> Verdict:
    """Return the verdict on the whole merge, with the ratio, the interval and the survival of all layers.

    Right when every module is judged right, or not judged for a reason that is `allowed`. `kinds` are the variants of
    the modules.
    """
    known = [module for module in found if module.tells_scale]
    open_ = [module for module in found if module.unjudged and module.unjudged not in allowed]
    law = diagnosis_record(diagnosis) if any(not module.alpha_unknown for module in known) else None
    facts = [
        *_scale_facts(found, untouched, law, diagnosis.code),
        *_missing_facts(found),
        *_file_facts(found, untouched),
    ]
    code, title = facts[0] if facts else (None, _right(found, open_, kinds, untouched))
    title += _sampled(found)
    left = _survived(known)
    return Verdict(
        **frame,
        check=CHECK,
        outcome="failed" if facts else "skipped" if open_ or not found else "passed",
        code=code,
        title=title,
        reason=title if open_ and not facts else None,
        law=law,
        survived=left,
        modules_failed=sum(not verdict.ok for verdict in verdicts),
        modules_total=len(verdicts),
        rows=tuple(_rows(frame, law, left, facts, found, untouched)),
        data={"also": [fact for _, fact in facts[1:]], **_untouched_data(untouched)},
        **_numbers([module for module in known if not module.alpha_unknown]),
    )


def _scale_facts(
    found: Sequence[Module], untouched: Untouched, law: LawRecord | None, law_code: str | None
) -> Iterator[Fact]:
    """Yield what is wrong with the scale, or with the merge as a whole."""
    told = _told(found)
    inverse = (abs(m.found.measured / m.found.expected + 1) <= _SAME and m.found.strength > 0 for m in told)
    if swapped := bool(told) and all(inverse):
        yield "LH209", f"every scale is -1 times the expected one: are base and merged swapped? {_listed(told, found)}"
    if ill := [module for module in _in(found, "not finite") if module.fault]:
        yield "LH707", f"NaN or infinite weights in the LoRA: {_listed(ill, found)}"
    if broken := [module for module in _in(found, "not finite") if not module.fault]:
        rows = f": {damage_of(broken[0])}" if broken[0].measured and broken[0].measured.damaged else ""
        yield "LH502", f"NaN or infinite values in {_listed(broken, found)}{rows}"
    unexplained = _in(found, "unexplained")
    if untouched.is_other_model and (unexplained or _in(found, "mixed")):
        changed = f"{len(untouched.changed)} of {untouched.compared} tensors that the LoRA leaves alone differ too"
        yield "LH401", f"wrong base: {changed}"
    elif unexplained and (moved := next((module for module in unexplained if module.holds), None)):
        whose = f"{printable(moved.name)} holds that of {printable(moved.holds)}"
        yield "LH104", f"updates of other modules: {_listed(unexplained, found)}; {whose}"
    elif unexplained:
        what = next((f"; {module.note}" for module in unexplained if module.note), "")
        yield (
            "LH101",
            f"another LoRA or another edit: changed, but not by this LoRA: {_listed(unexplained, found)}{what}",
        )
    if twice := _in(found, "twice"):
        yield "LH206", f"merged twice: {_listed(twice, found)}"
    if faulty := [module for module in found if module.fault and module.state != "not finite"]:
        code, fault = faulty[0].fault or ("", "")
        yield code, f"{fault} in {_listed(faulty, found)}"
    wrong = [m for m in found if m.tells_scale and not m.alpha_unknown and not m.found.right and m not in twice]
    if wrong and law and not swapped:
        yield _wrong_law(wrong, told, law, law_code or "LH209", found)


def _wrong_law(
    wrong: Sequence[Module], told: Sequence[Module], law: LawRecord, law_code: str, found: Sequence[Module]
) -> Fact:
    """Name what the wrong scales have in common: a second merge, a factor of each block, or a law."""
    listed, ratios = _listed(wrong, found), [module.found.measured / module.found.expected for module in told]
    if law_code == "LH206" and len(wrong) == len(told) and all(abs(ratio / 2 - 1) <= _SAME for ratio in ratios):
        first = wrong[0].found
        scale = f"scale {first.measured:.4g}, expected {first.expected:.4g}"
        return "LH206", f"merged twice, or once at twice the scale: {scale}, in {listed}"
    if (law.constant is None or (law.ambiguous and law.constant != 1.0)) and (factors := _factors(told)):
        return "LH209", f"{factors}: {listed}"
    name = f"one of these: {law.name}" if law.ambiguous else CODES[law_code].title
    return law_code, f"{name}: {_wrong_scale(wrong, law)} in {listed}"


def _factors(told: Sequence[Module]) -> str:
    """Say which factor each LoRA, block or kind of layer has, where all modules of one agree; else empty."""
    for what, of in (("LoRA", _file), ("block", _block), ("kind of layer", _kind)):
        groups: dict[str, list[float]] = {}
        for module in told:
            groups.setdefault(of(module.name), []).append(module.found.measured / module.found.expected)
        middle = {name: statistics.median(some) for name, some in groups.items()}
        agree = all(max(some) - min(some) <= _SAME * max(map(abs, some)) for some in groups.values())
        differ = max(middle.values()) - min(middle.values()) > _APART * max(map(abs, middle.values()))
        off = [len(groups[name]) for name, factor in middle.items() if abs(factor - 1) > _APART]
        if agree and differ and 1 < len(groups) < len(told) and (what == "LoRA" or max(off, default=0) > 1):
            middle = dict(sorted(middle.items(), key=lambda each: abs(each[1] - 1) <= _APART))
            shown = [f"{factor:.3g}x in {printable(name)}" for name, factor in middle.items()]
            more = ", …" if len(shown) > _READINGS_SHOWN + 1 else ""
            return f"one factor per {what} ({', '.join(shown[: _READINGS_SHOWN + 1])}{more})"
    ratios = _ratios(told)
    if len({round(ratio, 2) for ratio in ratios}) == len(told) > 2:
        return f"one factor per module: {ratios[0]:.3g} to {ratios[-1]:.3g} times the expected scale"
    return ""


def _file(name: str) -> str:
    """Return which of several LoRAs a module is of."""
    return name.rpartition(": ")[0]


def _block(name: str) -> str:
    """Return a name up to its first number."""
    found = re.match(r".*?(?<![a-z0-9])\d+(?![0-9])", name)
    return found[0] if found else name


def _kind(name: str) -> str:
    """Return what stands behind the last number of a name, but for one that it ends with."""
    return re.sub(r"^.*\d+[._]", "", name) or name


def _wrong_scale(wrong: Sequence[Module], law: LawRecord) -> str:
    first = wrong[0].found
    if law.constant is None and (ratios := _ratios(wrong)):
        return f"{ratios[0]:.3g} to {ratios[-1]:.3g} times the expected scale"
    ratio = f" ({first.measured / first.expected:.3g}x)" if first.expected else ""
    readings = " or ".join((law.formula, *law.alternatives[:_READINGS_SHOWN]))
    return f"scale {first.measured:.4g} = {readings}, expected {first.expected:.4g}{ratio},"


def _told(found: Sequence[Module]) -> list[Module]:
    """Return the modules that tell a scale which can be held against the one they should have."""
    return [module for module in found if module.tells_scale and not module.alpha_unknown and module.found.expected]


def _ratios(modules: Sequence[Module]) -> list[float]:
    """Return scale / expected of every module that should have an effect, in order."""
    return sorted(m.found.measured / m.found.expected for m in modules if m.found.expected)


def _missing_facts(found: Sequence[Module]) -> Iterator[Fact]:
    """Yield what was not merged, in whole or in part."""
    same = _in(found, "not merged")
    others = [module for module in found if module.measured and module.state not in ("not merged", "hidden")]
    if same and not others:
        yield "LH101", "byte-identical to the base: nothing was merged"
    elif same:
        yield "LH102", f"not merged: {_listed(same, found)}"
    if partly := _in(found, "partly"):
        yield "LH102", f"merged in part: {_listed(partly, found)}; nothing in {where(partly[0])}"
    if lost := [module for module in found if module.obstacle in LOST]:
        yield "LH103", f"{_why(lost)}: {_listed(lost, found)}"
    if misfits := [module for module in found if module.obstacle == "misfit"]:
        yield "LH902", f"{_why(misfits)}: {_listed(misfits, found)}"


def _file_facts(found: Sequence[Module], untouched: Untouched) -> Iterator[Fact]:
    """Yield what changed beside the LoRA."""
    if mixed := [m for m in _in(found, "mixed") if not m.fault and not untouched.is_other_model]:
        what = next((f"; {module.note}" for module in mixed if module.note), "")
        yield "LH401", f"other changes besides this LoRA: {_listed(mixed, found)}{what}"
    if damaged := _in(found, "damaged"):
        yield "LH401", f"rows that are not what the merge gives: {_listed(damaged, found)}; {damage_of(damaged[0])}"
    if untouched.broken:
        yield "LH502", f"NaN or infinite values in a tensor that the LoRA does not name: {first_of(untouched.broken)}"
    if untouched.changed:
        names = first_of(untouched.changed)
        yield "LH401", f"{count(len(untouched.changed), 'tensor')} that the LoRA does not name changed: {names}"
    for where_, odd in (("missing from", untouched.missing), ("only in", untouched.extra)):
        if odd:
            yield "LH902", f"{count(len(odd), 'tensor')} {where_} the merged checkpoint: {first_of(odd)}"
    if untouched.reshaped:
        yield "LH902", f"{count(len(untouched.reshaped), 'tensor')} of another shape: {first_of(untouched.reshaped)}"


def _in(found: Sequence[Module], state: State) -> list[Module]:
    return [module for module in found if module.state == state]


def _listed(some: Sequence[Module], found: Sequence[Module]) -> str:
    return f"{len(some)} of {count(len(found), 'module')} ({first_of([module.name for module in some])})"


def _why(some: Sequence[Module]) -> str:
    return next((module.problem.what for module in some if module.problem), "")


def _right(found: Sequence[Module], open_: Sequence[Module], kinds: Collection[str], untouched: Untouched) -> str:
    judged = sum(not module.unjudged for module in found)
    if open_:
        names = first_of([module.name for module in open_])
        return f"{judged} of {len(found)} right, {len(open_)} NOT JUDGED: {names} ({open_[0].why_unjudged})"
    let_through = len(found) - judged
    rest = f", {let_through} not judged, as allowed" if let_through else ""
    ways = dict.fromkeys(module.measured.replaces for module in found if module.measured)
    update = "B @ A" if _PLAIN.issuperset(kinds) else f"the update of each module ({', '.join(sorted(kinds))})"
    way = f"base + strength * alpha / rank * {update}" if "" in ways or not ways else f"{', '.join(ways)},"
    return f"{judged} of {len(found)} right: {way} and nothing else{_of(untouched)}{rest}"


def _of(untouched: Untouched) -> str:
    return " of what was compared" if untouched.left else ""


def _sampled(found: Sequence[Module]) -> str:
    """Say how much of the layers was read, when not all of it."""
    read = [(m.measured.seen * m.measured.rows, m.measured.rows) for m in found if m.measured]
    share = math.fsum(rows for rows, _ in read) / max(sum(total for _, total in read), 1) if read else 1.0
    return "" if share >= 1 else f"; sampled: {min(100 * share, 99):.2g} % of rows"


def _survived(known: Sequence[Module]) -> float | None:
    """Return sum <ΔW, BA> / sum scale * <BA, BA>: the share of the whole effect that rounding left."""
    pairs = [(m.measured.overlap, m.measured.product, m.measured.scale) for m in known if m.measured]
    whole = math.fsum(scale**2 * product for _, product, scale in pairs)
    return math.fsum(scale * overlap for overlap, _, scale in pairs) / whole if whole else None


def _numbers(known: Sequence[Module]) -> dict[str, Any]:
    """Return the median scale and its ratio; the interval is what all modules allow, or else their range."""
    scaled = [(m.found, m.measured) for m in known if m.measured and m.found.expected]
    if not scaled:
        return {}
    expected = statistics.median(found.expected for found, _ in scaled)
    ratio = statistics.median(measured.scale / found.expected for found, measured in scaled)
    ends = [sorted(end / found.expected for end in measured.interval) for found, measured in scaled]
    low, high = max(end[0] for end in ends), min(end[1] for end in ends)
    if low > high:
        low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    interval = tuple(sorted((low * expected, high * expected)))
    return {"measured_scale": ratio * expected, "expected_scale": expected, "ratio": ratio, "interval": interval}


def _rows(
    frame: dict[str, Any],
    law: LawRecord | None,
    left: float | None,
    facts: Sequence[Fact],
    found: Sequence[Module],
    untouched: Untouched,
) -> Iterator[tuple[str, str]]:
    yield "merged", printable(frame["loader"])
    if law:
        doubt = f" (also {', '.join(law.alternatives)})" if law.ambiguous else ""
        yield "law", f"{law.name}: {law.formula}{doubt}"
    vague = [module for module in found if module.vague]
    vague.sort(key=lambda module: module.found.tolerance / abs(module.found.expected), reverse=True)
    if vague:
        yield "vague", f"{vague[0].vague} ({_listed(vague, found)})"
    if left is not None:
        yield "survived", survival(left)
    for code, fact in facts[1:]:
        yield "also", f"{code} {fact}"
    for reason, names in _not_judged(found).items():
        yield "not judged", f"{reason}: {count(len(names), 'module')} ({first_of(names)})"
    for note in untouched.notes[:_SHOWN]:
        yield "note", printable(note, 200)
    if facts:
        yield "fix", f"{_fix(*facts[0], law, found)}   (lora-harness explain {facts[0][0]})"
    yield "reproduce", frame["reproduce"]


def _fix(code: str, title: str, law: LawRecord | None, found: Sequence[Module]) -> str:
    """Return what to do; another factor in all modules may be the strength that somebody wanted."""
    told = _told(found)
    by_scale = _BY_SCALE.format("sqrt(rank)" if told and all(module.found.root for module in told) else "rank")
    fix = _FIXES.get(code) or (by_scale if code.startswith("LH2") else CODES[code].fix)
    if "swapped" in title:
        return "swap --base and --merged"
    if code == "LH206" and not title.startswith("merged twice"):
        return by_scale
    ratios = _ratios(told)
    if code != "LH209" or not law or not ratios or abs(ratios[-1] - ratios[0]) > _SAME * abs(ratios[0]):
        return fix
    given, other = (f"{ratio * told[0].found.strength:.4g}" for ratio in (1.0, ratios[0]))
    return fix if given == other else f"{fix}; if it was merged so on purpose, pass --strength {other}"


def _not_judged(found: Sequence[Module]) -> dict[str, list[str]]:
    """Return the modules that are not judged, by the kind and the reason."""
    reasons: dict[str, list[str]] = {}
    for module in found:
        if module.unjudged:
            reasons.setdefault(f"{module.unjudged}: {module.why_unjudged}", []).append(module.name)
    return dict(list(reasons.items())[:_SHOWN])


def _untouched_data(untouched: Untouched) -> dict[str, Any]:
    lists = {"changed": untouched.changed, "missing": untouched.missing, "extra": untouched.extra}
    shown = {f"other_{what}": [printable(name) for name in names[:_SHOWN]] for what, names in lists.items()}
    return {"other_tensors": untouched.compared, **{what: names for what, names in shown.items() if names}}
