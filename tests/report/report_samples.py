"""Sample data: made-up runs for the report's tests; no number in here was measured."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from harness.report.models import (
    Footer,
    Header,
    LoraFacts,
    PowerRecord,
    ProbePoint,
    ProbeRecord,
    SweepImage,
    SweepRecord,
)
from harness.report.records import Run, RunWriter, exit_code_of, read_run
from harness.verdict.file_record import FileRecord, Hazard
from harness.verdict.verdict import LawRecord, Record, Verdict

FORMATS = ("peft", "kohya", "diffusers", "diffsynth")
BENCHES = ("qwen-image", "qwen-image-fused")
CHECKS = (
    "loads",
    "coverage",
    "no extra module",
    "scale",
    "scaling law",
    "strength zero",
    "strength negative",
    "direction",
    "untouched modules",
    "twice",
    "unload",
    "file unchanged",
    "bfloat16",
)
STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
TRAINED = LawRecord(
    formula="strength * alpha / rank",
    name="as trained",
    exponents={"strength": 1, "alpha": 1, "rank": -1},
    constant=1.0,
    residual=2e-7,
)
IGNORED = LawRecord(
    formula="strength",
    name="alpha ignored",
    exponents={"strength": 1, "alpha": 0, "rank": 0},
    constant=1.0,
    residual=3e-8,
)
RAW = LawRecord(
    formula="strength * alpha",
    name="raw alpha",
    exponents={"strength": 1, "alpha": 1, "rank": 0},
    constant=1.0,
    residual=1e-7,
)
HOSTILE = (
    "<script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\x1b[31mred\x1b[0m\x1b]0;owned\x07",
    "{{ 4321*3 }}{% raw %}${4321*3}",
    "</script><svg onload=\"document.title='owned'\">",
    "\u202egnp.exe",
    "javascript:document.title='owned'",
)


def header(**changes: object) -> Header:
    """Return a sample header."""
    facts: dict[str, object] = {
        "run_id": "20261123T201500Z-sample",
        "created": "2026-11-23T20:15:00+00:00",
        "command": "lora-harness run --seed 0 --out reports/out",
        "seed": 0,
        "profile": "ci",
        "machine": "sample-machine",
        "platform": "Linux x86_64, Python 3.11.7",
        "commit": "0123456789ab",
        "versions": {"torch": "2.13.0", "peft": "0.21.2", "diffusers": "0.42.1", "diffsynth": "2.1.12"},
    }
    return Header.model_validate(facts | changes)


def passed(loader: str = "peft", check: str = "scale", **changes: object) -> Verdict:
    """Return a sample verdict that passed."""
    facts: dict[str, object] = {
        "loader": loader,
        "check": check,
        "outcome": "passed",
        "format": "kohya",
        "bench": "qwen-image",
        "measured_scale": 2.0,
        "expected_scale": 2.0,
        "ratio": 1.0,
        "examples": 200,
    }
    return Verdict.model_validate(facts | changes)


def failed(loader: str = "diffsynth-2.0.4", check: str = "scale", **changes: object) -> Verdict:
    """Return a sample failure with the rows of a real one."""
    fmt, bench = str(changes.get("format", "kohya")), str(changes.get("bench", "qwen-image"))
    reproduce = f"lora-harness check {loader} --format {fmt} --bench {bench} --seed 0 --rank 4 --alpha 8"
    facts: dict[str, object] = {
        "loader": loader,
        "loader_version": "2.0.4",
        "check": check,
        "outcome": "failed",
        "format": fmt,
        "bench": bench,
        "code": "LH202",
        "title": "alpha ignored: delta is 0.500x the expected delta in 24 of 24 modules",
        "measured_scale": 1.0,
        "expected_scale": 2.0,
        "ratio": 0.5,
        "worst_module": "transformer_blocks.0.attn.to_q",
        "modules_failed": 24,
        "modules_total": 24,
        "law": IGNORED,
        "prescription": 2.0,
        "examples": 1,
        "reproduce": reproduce,
        "rows": (
            ("loader", f"{loader} 2.0.4  (diffsynth.lora:GeneralLoRALoader)          format {fmt}, bench {bench}"),
            ("lora", "rank 4, alpha 8, bfloat16                    seed 0"),
            ("worst", "transformer_blocks.0.attn.to_q [64, 64]"),
            ("measured", "scale 1.0000, residual 3e-8                  direction right, magnitude wrong"),
            ("expected", "scale 2.0000 = alpha / rank                  PEFT and the float64 closed form agree"),
            ("law", "1.00 · strength                              expected strength · alpha / rank"),
            ("use", "strength = alpha / rank = 2.0 until it is fixed"),
            ("fix", "read `<module>.alpha` and multiply by alpha / rank         lora-harness explain LH202"),
            ("reproduce", reproduce),
        ),
    }
    return Verdict.model_validate(facts | changes)


def cell(loader: str, fmt: str, bench: str, *, law: LawRecord = TRAINED, wrong: bool = False) -> Iterable[Verdict]:
    """Yield one verdict per check of a cell; a wrong one fails the scale and law checks."""
    for check in CHECKS:
        if wrong and check in ("scale", "scaling law"):
            title = f"{law.name}: delta is 0.500x the expected delta in 24 of 24 modules"
            code = "LH202" if law is IGNORED else "LH201"
            ratio = 0.5 if law is IGNORED else 32.0
            facts = {"title": title, "code": code, "ratio": ratio, "law": law}
            yield failed(loader, check, format=fmt, bench=bench, **facts)
        else:
            changes: dict[str, object] = {"law": law} if check == "scaling law" else {}
            yield passed(loader, check, format=fmt, bench=bench, **changes)


def probes(loader: str, fmt: str, bench: str, law: LawRecord, count: int = 48) -> ProbeRecord:
    """Return sample probes that follow `law`."""
    draw = random.Random(f"{loader}{fmt}{bench}")
    points = []
    for index in range(count):
        alpha, rank, strength = (
            draw.choice((0.5, 1, 4, 16, 32)),
            draw.choice((1, 4, 7, 32)),
            draw.choice((0.5, 1, -1, 2)),
        )
        measured = strength * alpha ** law.exponents["alpha"] * rank ** law.exponents["rank"]  # type: ignore[operator]
        points.append(
            ProbePoint(
                module=f"transformer_blocks.{index % 2}.attn.to_{'qkv'[index % 3]}",
                strength=strength,
                alpha=alpha,
                rank=rank,
                measured=measured * (1 + draw.gauss(0, 1e-4)),
                expected=strength * alpha / rank,
            )
        )
    return ProbeRecord(loader=loader, format=fmt, bench=bench, law=law, points=tuple(points))


def matrix_records() -> list[Record]:
    """Return the verdicts and probes of a sample night: right loaders, wrong ones, known and crashed cells."""
    records: list[Record] = []
    laws = {
        "peft": TRAINED,
        "diffusers": TRAINED,
        "diffsynth": TRAINED,
        "diffsynth-2.0.4": IGNORED,
        "raw_alpha.py:load": RAW,
    }
    for loader, law in laws.items():
        for fmt in FORMATS:
            for bench in BENCHES:
                wrong = law is not TRAINED and fmt != "diffsynth"
                if loader == "diffsynth" and fmt == "peft":
                    records.append(crashed(loader, fmt, bench))
                    continue
                records += cell(loader, fmt, bench, law=law if wrong else TRAINED, wrong=wrong)
                if bench == "qwen-image" and fmt in ("kohya", "peft"):
                    records.append(probes(loader, fmt, bench, law if wrong else TRAINED))
    records.append(known("diffusers", "kohya", "qwen-image-fused"))
    records.append(skipped("diffusers"))
    return records


def crashed(loader: str, fmt: str, bench: str) -> Verdict:
    """Return a verdict of a loader that raised."""
    return Verdict(
        loader=loader,
        check="loads",
        outcome="errored",
        format=fmt,
        bench=bench,
        code="LH901",
        title="loader raised KeyError: 'lora_A.default.weight'",
        rows=(
            ("loader", f"{loader} 2.1.12"),
            ("raised", "KeyError in diffsynth/lora/general.py:41"),
            ("explain", "LH901"),
        ),
    )


def known(loader: str, fmt: str, bench: str) -> Verdict:
    """Return a failure that is recorded as known."""
    return failed(
        loader, "coverage", format=fmt, bench=bench, outcome="xfailed", reason="diffusers#14088, merged QKV keys"
    )


def skipped(loader: str) -> Verdict:
    """Return a check that was skipped with its reason."""
    return passed(loader, "merge on cuda", outcome="skipped", reason="no CUDA device", measured_scale=None, ratio=None)


def sweep(folder: Path, loader: str, factor: float, prompts: int = 2, side: int = 64) -> list[SweepRecord]:
    """Write sample pictures under `folder` and return one record per strength."""
    records = []
    for strength in STRENGTHS:
        images = []
        for index in range(prompts):
            prompt = ("red circle, light background", "blue square, dark background", "green cross")[index % 3]
            for role, scale in (("candidate", strength * factor), ("reference", strength), ("base", 0.0)):
                path = folder / "images" / f"{loader}-{strength:g}-{index}-{role}.png"
                picture(path, scale, index, side)
                images.append(SweepImage(path=f"images/{path.name}", prompt=prompt, seed=index, role=role))
        off = abs(strength * factor - strength)
        metrics = {
            "ssim_reference": max(0.05, 1 - 0.2 * off),
            "ssim_base": max(0.05, 1 - 0.1 * abs(strength) * factor),
            "sigma_ratio": 1 + off**1.2,
            "variance": 0.03 + 0.002 * off,
            "clipped": 0.001 * off,
        }
        label = "as trained" if off < 0.2 else "artifacts" if off < 8 else "noise"
        records.append(
            SweepRecord(
                loader=loader,
                lora=LoraFacts(name="sample-r8-a16", rank=8, alpha=16, format="kohya"),
                strength=strength,
                metrics=metrics,
                images=tuple(images),
                label=label,
                seconds=1.5,
                peak_memory=2**29,
            )
        )
    return records


def picture(path: Path, scale: float, seed: int, side: int = 64) -> None:
    """Write a sample picture: a shape on a gradient that dissolves into noise as the scale grows."""
    import numpy as np
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[0:side, 0:side] / side
    inside = (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.07 if seed % 2 == 0 else (abs(x - 0.5) < 0.25) & (abs(y - 0.5) < 0.25)
    base = np.stack([0.75 + 0.2 * x, 0.72 + 0.2 * y, np.full_like(x, 0.8)], -1)
    base[inside] = (0.85, 0.2, 0.2) if seed % 2 == 0 else (0.2, 0.3, 0.8)
    warm = base * (1 - 0.12 * min(scale, 2)) + np.array([0.95, 0.8, 0.5]) * 0.12 * min(scale, 2)
    noise = np.random.default_rng(seed).normal(0, 1, base.shape) * min(0.5, 0.04 * max(scale - 1, 0))
    Image.fromarray((np.clip(warm + noise, 0, 1) * 255).astype(np.uint8)).save(path)


def power_records() -> list[PowerRecord]:
    """Return a sample power table."""
    faults = (("raw_alpha", "LH201"), ("alpha_ignored", "LH202"), ("sqrt_rank", "LH203"), ("first_key_alpha", "LH204"))
    rows = [
        PowerRecord(
            subject=name,
            fault=name.replace("_", " "),
            expected_code=code,
            trials=100,
            detected=100,
            named=99,
            examples=2,
        )
        for name, code in faults
    ]
    images = ((1.0, 0), (1.1, 81), (1.25, 100), (2.0, 100))
    return rows + [
        PowerRecord(
            subject="image sweep",
            fault="wrong strength",
            factor=f,
            trials=100,
            detected=d,
            images=8,
            dtype="bfloat16",
            source="images",
        )
        for f, d in images
    ]


def file_records() -> list[FileRecord]:
    """Return sample file audits."""
    energy = {f"transformer_blocks.{i}.attn.to_q": 0.03 + 0.004 * i for i in range(12)}
    good = FileRecord(
        path="loras/style.safetensors",
        format="kohya",
        modules=120,
        energy=energy,
        prescription={"peft": 1.0, "diffsynth-2.0.4": 2.0},
    )
    bad = FileRecord(
        path="loras/mixed.safetensors",
        format="diffusers",
        modules=60,
        hazards=(Hazard(code="LH703", what="mixed ratios: alpha / rank is 0.25 in 20 modules and 1 in 40"),),
        prescription={"peft": 1.0, "diffsynth-2.0.4": None},
    )
    return [good, bad]


def write_run(folder: Path, records: Iterable[Record], **changes: object) -> Run:
    """Write a sample run file and read it back."""
    with RunWriter(folder / "run.jsonl", header(**changes)) as writer:
        writer.write(*records)
    return read_run(folder / "run.jsonl")


def run_of(*records: Record, **changes: object) -> Run:
    """Return a run that was never on disk."""
    counts: dict[str, int] = {}
    for record in records:
        if isinstance(record, Verdict):
            counts[record.outcome] = counts.get(record.outcome, 0) + 1
    return Run(header(**changes), tuple(records), Footer(counts=counts, seconds=12.5, exit_code=exit_code_of(counts)))  # type: ignore[arg-type]


def night(folder: Path) -> Run:
    """Return a whole sample night with everything a report can show."""
    records: list[Record] = [*matrix_records(), *sweep(folder, "peft", 1.0), *sweep(folder, "raw_alpha.py:load", 16.0)]
    records += [*file_records(), *power_records()]
    return write_run(folder, records, planned=("checks:peft", "sweep:peft@cuda"))


KNOWN = (
    "lycoris-missing-alpha", "lycoris-loha-lokr-merge-squares-alpha", "diffusers-negative-alpha-hang",
    "lycoris-dora-bfloat16", "diffusers-text-encoder-mlp-alone", "diffsynth-flux-outer-modules-and-unequal-ranks",
    "diffusers-unet-mixed-alphas-ignored", "diffusers-missing-alpha-takes-the-most-common",
    "diffsynth-flux-one-alpha-for-all", "diffsynth-flux-negative-alpha", "peft-tied-embedding-merge",
    "comfyui-header-alpha-ignored", "comfyui-unet-attention-names", "comfyui-dora-output-axis-norm",
    "invokeai-dora-output-axis", "invokeai-qwen-alpha-beside-lora-a-dropped", "diffusers-flux-fuse-qkv-drops-lora",
    "diffusers-flux-kohya-qkv-bf16-scale", "diffusers-qwen-double-underscore", "diffusers-fuse-scale-compounds",
    "refiners-alpha-ignored", "lycoris-dora-input-axis", "lycoris-dora-precise-merge", "lycoris-dora-strength-zero",
)  # fmt: skip


def full_run(folder: Path) -> Run:
    """Return a sample of the size of a real night: 11 loaders, 242 cells, 24 known findings, 90 strengths drawn."""
    benches = ("qwen-image", "qwen-image-fused", "flux", "clip-text", "sd-unet", "gpt2")
    records: list[Record] = []
    for number in range(11):
        loader, law = f"loader-{number}", IGNORED if number == 3 else TRAINED
        for index in range(22):
            fmt, bench = FORMATS[index % (1 + number % 3)], benches[index % 6]
            variant = ("lora", "dora", "loha", "lokr")[index // 6]
            place = {"format": fmt, "bench": bench, "variant": variant}
            if index % 3 == 2:
                records.append(passed(loader, "smoke", outcome="skipped", reason=f"not declared: {variant}", **place))
                continue
            told = cell(loader, fmt, bench, law=law, wrong=law is IGNORED and index < 2)
            records += [verdict.model_copy(update=place) for verdict in told]
            if number % 2 and index % 2:
                records += _known(loader, KNOWN[(number * 22 + index) // 2 % len(KNOWN)], place)
            if law is IGNORED:
                records.append(probes(loader, fmt, bench, law))
    strips = [record for number in range(10) for record in sweep(folder, f"loader-{number}", 1.0)]
    return write_run(folder, [*records, *strips])


def _known(loader: str, page: str, place: dict[str, str]) -> list[Verdict]:
    facts = {"outcome": "xfailed", "code": "LH901", "title": "loader raised TypeError", "ratio": None, "law": None}
    reason = f"what this sample is known to get wrong (docs/findings/{page}.md)"
    return [failed(loader, f"check-{n}", reason=reason, **facts, **place) for n in range(2)]
