"""Put a judgement into words: the verdict with its rows, the likely cause, and what to pass until it is fixed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.files import LoraAdapter
from harness.fixtures import fixtures_folder
from harness.images.fixture import lora_for
from harness.images.studio import Studio
from harness.images.verdict import Judgement, StrengthResult
from harness.isolation.calls import Raised
from harness.isolation.jobs import JobEnd
from harness.loaders.protocol import Subject
from harness.verdict.codes import CODES
from harness.verdict.verdict import Outcome, Verdict

_OUTCOMES: dict[str, Outcome] = {"LH901": "errored", "LH903": "refused"}


def sweep_verdict(
    subject: Subject,
    studio: Studio,
    observations: Sequence[StrengthResult],
    judgement: Judgement,
    seconds: float,
    probed: Sequence[StrengthResult] = (),
) -> Verdict:
    """Return the verdict of a whole sweep; inconclusive is `skipped`, never passed.

    At the strengths that were `probed` one denoiser call was compared instead of pictures.
    """
    outcome: Outcome = "failed" if judgement.code else "passed" if judgement.finding == "as trained" else "skipped"
    factor = judgement.factor
    prescription = _prescription(judgement)
    return _verdict(
        subject,
        studio,
        outcome,
        (*observations, *probed),
        code=judgement.code,
        title=_title(judgement),
        estimated_factor=factor,
        interval=judgement.interval,
        ratio=factor,
        prescription=prescription,
        rows=_rows(subject, studio, observations, judgement, prescription, probed),
        reason=judgement.reason or None,
        examples=len(studio.sampler.pairs),
        seconds=seconds,
        data={
            "finding": judgement.finding,
            "quick": studio.quick,
            "strengths": {
                f"{o.strength:g}": {"factor": o.factor, "look": o.look, "effect": o.effect}
                for o in (*observations, *probed)
            },
            "probed": [o.strength for o in probed],
            "unmatched_modules": len(studio.unmatched),
        },
    )


def crashed_verdict(subject: Subject, studio: Studio, raised: Raised) -> Verdict:
    """Return the verdict of a subject that raised, was stopped at its time limit, died, or refused the LoRA."""
    code, title = raised.code, f"{CODES[raised.code].title}: {raised.what}"
    return _verdict(subject, studio, _OUTCOMES[code], code=code, title=title, rows=tuple(raised.rows()))


def died_verdict(subject: Subject, studio: Studio, end: JobEnd) -> Verdict:
    """Return the errored verdict of a subject whose process ended in another way than by finishing."""
    printed = tuple(("printed", line) for line in end.output_tail.strip().splitlines()[-3:])
    title = f"loader raised: {end.what}"
    return _verdict(subject, studio, "errored", code="LH901", title=title, rows=printed, seconds=end.seconds)


def _verdict(
    subject: Subject, studio: Studio, outcome: Outcome, drawn: Sequence[StrengthResult] = (), **fields: Any
) -> Verdict:
    return Verdict(
        loader=subject.title,
        loader_version=subject.version,
        check="images",
        outcome=outcome,
        format=studio.adapter.format,
        bench=studio.opened.name,
        reproduce=_reproduce(subject, studio, drawn),
        **fields,
    )


def lora_facts(adapter: LoraAdapter) -> dict[str, Any]:
    """Return name, rank, alpha and format of a LoRA as they stand in a row; rank and alpha None when modules differ."""
    ranks = {module.rank for module in adapter.modules.values()}
    alphas = {module.alpha for module in adapter.modules.values()}
    path = adapter.path
    name = path.parent.name if path.name == adapter.format or path.stem == adapter.format else path.stem
    return {
        "name": name,
        "rank": ranks.pop() if len(ranks) == 1 else None,
        "alpha": alphas.pop() if len(alphas) == 1 else None,
        "format": adapter.format,
    }


def _title(judgement: Judgement) -> str:
    interval = " [{:.3g}, {:.3g}]".format(*judgement.interval) if judgement.interval else ""
    times = "" if judgement.factor is None else f"{judgement.factor:.3g} times the trained strength{interval}"
    at = f" at strength {judgement.told_by.strength:g}" if judgement.told_by and judgement.told_by.strength != 1 else ""
    return {
        "as trained": f"pictures look as trained: {times}",
        "wrong strength": f"pictures show {times}{f' ({judgement.reason})' if judgement.reason else at}",
        "noise": f"noise{at}: about {times}",
        "no visible effect": f"the LoRA has no visible effect{at}",
        "broken": judgement.reason,
        "inconclusive": f"inconclusive: {judgement.reason}",
        "wrong direction": f"the pictures match the reference at no strength{at}; nearest is {times}",
    }[judgement.finding]


def _prescription(judgement: Judgement) -> float | None:
    """Return the strength that reproduces training; None when none does (strength mishandled, no effect, ...)."""
    factor = judgement.factor
    if judgement.finding not in ("wrong strength", "noise") or judgement.reason or not factor or abs(factor) < 0.02:
        return None
    return float(f"{1 / factor:.3g}")


def _rows(
    subject: Subject,
    studio: Studio,
    observations: Sequence[StrengthResult],
    judgement: Judgement,
    use: float | None,
    probed: Sequence[StrengthResult],
) -> tuple[tuple[str, str], ...]:
    module = next(iter(studio.adapter.modules.values()))
    what = "one denoiser call each" if studio.quick else "full sampling"
    rows = [
        ("loader", f"{subject.title} {subject.version or ''}".strip()),
        (
            "lora",
            f"{lora_facts(studio.adapter)['name']}, rank {module.rank}, alpha {module.alpha}, {module.dtype}, "
            f"{studio.adapter.format}",
        ),
        ("pipeline", f"{studio.opened.name}, {studio.opened.dtype}, {studio.opened.device}"),
        ("pictures", f"{len(studio.sampler.pairs)} per strength ({what}), same initial noise as the reference"),
    ]
    rows += [(f"at {o.strength:g}", _line(o)) for o in observations]
    rows += [(f"at {o.strength:g}", f"{_line(o)}, which agrees with the pictures") for o in probed]
    if use:
        rows.append(("use", f"strength = {use:g} until it is fixed"))
    if judgement.code:
        rows.append(("fix", f"{CODES[judgement.code].fix}   (lora-harness explain {judgement.code})"))
    return tuple(rows)


def _line(o: StrengthResult) -> str:
    if o.estimate is None:
        return o.look
    bound = "at least " if o.estimate.at_end else ""
    return f"looks like {bound}{o.estimate.strength:.3g} (expected {o.strength:g}), {o.look}"


def _reproduce(subject: Subject, studio: Studio, observations: Sequence[StrengthResult]) -> str:
    alphas = ",".join(f"{o.strength:g}" for o in observations) or "1"
    quick = " --quick" if studio.quick else ""
    shipped = fixtures_folder().resolve()
    where = "" if Path(studio.opened.folder).is_relative_to(shipped) else f" --pipeline {studio.opened.folder}"
    where += (
        ""
        if studio.lora.resolve().is_relative_to(shipped) and _is_default(subject, studio)
        else f" --lora {studio.lora}"
    )
    return f"lora-harness sweep {shlex.quote(subject.spec)} --alphas {alphas}{where}{quick}"


def _is_default(subject: Subject, studio: Studio) -> bool:
    try:
        return lora_for(subject.cells) == studio.lora
    except UserError:
        return False
