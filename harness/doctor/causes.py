"""What could be behind a picture that is not as it should be: causes, each with the test that decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.doctor.traits import untargeted
from harness.doctor.what_it_is import model_of
from harness.law.findings import findings
from harness.text import printable

if TYPE_CHECKING:
    from harness.doctor.diagnose import FileDiagnosis

Saw = Literal["noise", "nothing", "weak", "strong"]
SAW: tuple[Saw, ...] = ("noise", "nothing", "weak", "strong")


@dataclass(frozen=True)
class Cause:
    """What could be behind a picture: the cause, the test that decides, and what of this file speaks for it."""

    what: str
    test: str
    evidence: str = ""


def causes(found: FileDiagnosis) -> list[Cause]:
    """Return what could be behind what was seen, what the file itself speaks for first."""
    every = list(_CAUSES[found.saw or "noise"](found))
    sure = {hazard.what for hazard in (*found.weighed.hazards, *found.misfits)}
    return sorted(every, key=lambda cause: (cause.evidence not in sure, not cause.evidence))


def _strength_cause(found: FileDiagnosis) -> Cause:
    wrong = [
        f"{each.tool.name} {each.says}" for each in found.answers.values()
        if each.effect == "factor" or (each.gain and max(map(abs, each.gain)) > 1.5) or each.strength not in (None, 1.0)
    ]  # fmt: skip
    known = found.question.lora_alpha is not None or (found.question.as_rank and not found.question.supposed)
    if "none" in found.traits.alphas and not known:
        wrong.insert(
            0, "the file has no alpha: if its training's was below the rank, 1 is rank / alpha times too strong"
        )
    right = "; ".join(
        f"{each.tool.name}: {each.tool.passing(each.strength, found.traits.components)}"
        for each in found.answers.values()
        if each.strength is not None
    )
    usual = not right or all(each.strength in (None, 1.0) for each in found.answers.values())
    test = f"load it {_at_a_quarter(found) if usual else f'at {right}'}: {_clean(found)}"
    return Cause("wrong strength", test, "; ".join(wrong[:2]))


def _at_a_quarter(found: FileDiagnosis) -> str:
    """Say how to load the file at a quarter of its strength: its users may have no field for that."""
    passes = found.tool is None or found.tool.passes
    return "at a quarter of the strength" if passes else "with a quarter of its alpha"


def _clean(found: FileDiagnosis) -> str:
    return "is what it writes sound?" if found.traits.is_language else "is the picture clean?"


def _dropped_cause(found: FileDiagnosis) -> Cause:
    bad = [each for each in found.answers.values() if each.effect in ("drops", "nothing", "raises", "hangs", "wrong")]
    evidence = "; ".join(f"{each.tool.name} {each.says}" for each in bad[:2])
    evidence = next((each.what for each in found.misfits if each.code == "LH718"), evidence)
    counted = "`lora-harness check LOADER` counts the layers that change"
    logs = dict.fromkeys(f"{each.tool.title}: {each.tool.log}" for each in found.answers.values() if each.tool.log)
    test = f"see what it prints of keys left out ({'; '.join(logs)}); {counted}" if logs else counted
    return Cause("modules dropped or misplaced", test, evidence)


def _model_cause(found: FileDiagnosis) -> Cause:
    test = f"lora-harness inspect {printable(found.path, 120)} --base MODEL says how many modules apply"
    none = next((each.what for each in found.misfits if each.code == "LH719"), "")
    model = (
        model_of(found.traits) if any(group.places for group in found.traits.groups) else "the one it was trained on"
    )
    return Cause(f"another model than {model}", test, none)


def _said(found: FileDiagnosis, code: str) -> str:
    return next((hazard.what for hazard in found.weighed.hazards if hazard.code == code), "")


def _noise(found: FileDiagnosis) -> Iterator[Cause]:
    yield _strength_cause(found)
    if (hit := _said(found, "LH707")) or not found.weighed.read:
        test = f"lora-harness inspect {printable(found.path, 120)} names them (LH707)"
        yield Cause("NaN or infinite weights", test, hit)
    yield _model_cause(found)
    yield _quantised_cause(_clean(found))
    yield _dropped_cause(found)


def _quantised_cause(asks: str) -> Cause:
    return Cause("a quantised base that the merge read as it is stored", f"load it on the 16-bit base: {asks}")


def _nothing(found: FileDiagnosis) -> Iterator[Cause]:
    yield _dropped_cause(found)
    yield _model_cause(found)
    weak = [f"{a.tool.name} {a.says}" for a in found.answers.values() if a.gain and max(map(abs, a.gain)) < 0.5]
    yield Cause("far too weak", "load it at 10 times the strength: does anything change?", "; ".join(weak[:2]))
    test = f"lora-harness inspect {printable(found.path, 120)} names them (LH713, LH714)"
    if not any({"B", "lokr_w1_b", "lokr_w2_b", "hada_w1_b"} & module.keys.keys() for module in found.traits.modules):
        return
    yield Cause("an untrained B (all zero)", test, _said(found, "LH713") or _said(found, "LH714"))


def _weak(found: FileDiagnosis) -> Iterator[Cause]:
    yield from (cause for cause in list(_nothing(found))[2:3] if cause.evidence)
    yield _dropped_cause(found)
    yield _quantised_cause("is the effect there?")
    missing = ", ".join(untargeted(found.traits)) or "none that is known"
    yield Cause(
        "trained too little",
        "where nothing is dropped and the scale is right: train longer, or raise the learning rate",
    )
    yield Cause(
        "a rank that is used up", "`lora-harness inspect --base` shows the effective rank: raise the rank if it is full"
    )
    yield Cause(f"too few layers targeted (left alone: {missing})", "add them to target_modules and train again")
    yield Cause("a strength below what you want", "raise it up to 1.5: style grows, and artifacts with it")


def _strong(found: FileDiagnosis) -> Iterator[Cause]:
    yield _strength_cause(found)
    calls = [
        f.says
        for f in findings().values()
        if f.effect == "call" and "LH207" in f.codes and found.tool and found.tool.name in f.tools
    ]
    yield Cause("applied twice", "restart the tool and load it once: does the picture change?", "; ".join(calls))
    yield _model_cause(found)


_CAUSES: dict[str, Any] = {"noise": _noise, "nothing": _nothing, "weak": _weak, "strong": _strong}
