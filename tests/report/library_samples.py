"""Rows as an audit of a hub's folder writes them, drawn at random, the same each time."""

from __future__ import annotations

import random

from harness.verdict.file_record import FileRecord, Hazard

FINDING = "diffusers-unet-mixed-alphas-ignored"


def library_of(files: int) -> list[FileRecord]:
    """Return rows as an audit of a hub's folder writes them: most are fine, some are cut, many have no alpha."""
    draw = random.Random(files)
    return [row_of(number, draw) for number in range(files)]


def row_of(number: int, draw: random.Random) -> FileRecord:
    subject = f"{draw.choice(('anime', 'pixel', 'oil', 'neon'))}_{draw.choice(('style', 'robot', 'city'))}"
    folder = f"/srv/loras/{draw.choice(('styles', 'characters', 'wan', 'flux', 'old'))}/{draw.choice('abcdefgh')}"
    path = f"{folder}/{subject}_v{number}_{draw.randrange(16**6):06x}.safetensors"
    if draw.random() < 0.02:
        what = f"the header says {draw.randrange(10**6)} bytes, the file has {draw.randrange(1000)}: it was cut"
        return FileRecord(path=path, size=draw.randrange(10**6), hazards=(Hazard(code="LH799", what=what),))
    rank, hazards = draw.choice((4, 8, 16, 32, 64, 128)), []
    alpha = draw.choice((None, 1, rank, rank / 2, 16))
    if alpha is None:
        hazards.append(Hazard(code="LH701", what="no alpha in the file: ask the trainer for lora_alpha / rank"))
    if draw.random() < 0.1:
        span = f"alpha / rank is 0.25 in {draw.randrange(300)} modules and 1 in {draw.randrange(300)}"
        hazards.append(Hazard(code="LH703", what=span))
    return FileRecord(
        path=path,
        format=draw.choice(("kohya", "diffusers", "peft")),
        size=draw.randrange(10**7, 10**9),
        modules=draw.choice((264, 528)),
        ranks={str(rank): 264},
        alphas={"none" if alpha is None else f"{alpha:g}": 264},
        trained=(alpha / rank, alpha / rank) if alpha else None,
        hazards=tuple(hazards),
        trainer=draw.choice(("kohya sd-scripts", "ai-toolkit", None)),
        metadata={"ss_base_model_version": draw.choice(("sdxl_base_v1-0", "flux1", ""))},
        findings=(FINDING,) if draw.random() < 0.08 else (),
    )
