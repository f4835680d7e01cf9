"""How often do pictures tell a wrong scale? Power and false alarms by true factor, number of pictures, weights.

    python -m benchmarks.image_power --base BASE --loras LORAS [--out benchmarks/image_power.md] [--records FILE.jsonl]

A candidate is the base with the LoRA merged at `factor`, its weights then rounded (int8 per channel, int4 in groups of
32) or the whole pipeline run in bfloat16; the reference is always float32. The verdict is `harness.images.judge` on one
strength. The rungs of the ladder are not the factors under test. With `--out` every section is measured anew, those of
image_blind_spots.py and image_turns.py too; what stands before the first of them is prose, and is left as it is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from harness.images import metrics, open_pipeline
from harness.images.factor import compare, read
from harness.images.pipelines import OpenPipeline
from harness.images.reference import Reference, open_lora
from harness.images.sampling import Pair, Sampler
from harness.images.verdict import Judgement, StrengthResult, judge, look_of

FACTORS = (0.25, 0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 2.0, 4.0, 32.0)
RUNGS = (
    -0.5,
    0.0,
    0.2,
    0.4,
    0.6,
    0.75,
    0.85,
    0.95,
    1.05,
    1.15,
    1.3,
    1.6,
    1.9,
    2.3,
    3.0,
    4.5,
    7.0,
    12.0,
    20.0,
    28.0,
    40.0,
    64.0,
)
COUNTS = (1, 4, 8, 16)
BACKENDS = ("float32", "bfloat16", "int8", "int4")
_LEGEND = """In the tables: share of draws called wrong (LH601 to LH603), in brackets the share called inconclusive; the
rest passed."""


def quantise(model: nn.Module, bits: int) -> nn.Module:
    """Round the weight of every Linear inside the blocks: int8 per output channel, int4 in groups of 32 inputs."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and "blocks" in name:
            w = layer.weight.data
            groups = w.reshape(w.shape[0], -1, w.shape[1] if bits == 8 else 32)
            step = groups.abs().amax(-1, keepdim=True).clamp_min(1e-9) / (2 ** (bits - 1) - 1)
            layer.weight.data = ((groups / step).round() * step).reshape(w.shape)
    return model


@dataclass
class Cell:
    """Verdicts of one cell: factor x number of pictures x backend (x probe), over LoRAs and draws of pictures."""

    findings: list[Judgement] = field(default_factory=list)

    def share(self, wanted: Callable[[Judgement], bool]) -> float:
        """Return the share of draws whose verdict is as wanted."""
        return statistics.fmean(wanted(finding) for finding in self.findings)


class Subjects:
    """Draws reference ladders and candidates of one base and one LoRA, as pictures or as raw outputs."""

    def __init__(self, opened: OpenPipeline, half: OpenPipeline, lora: Path, pairs: list[Pair], quick: bool) -> None:
        self.opened, self.half, self.quick = opened, half, quick
        self.reference = Reference(opened, open_lora(lora, opened))
        self.half_reference = Reference(half, open_lora(lora, half))
        self.samplers = {False: Sampler(opened, pairs), True: Sampler(half, pairs, batch=16)}
        self.calls = self.samplers[False].record(opened.fresh()) if quick else []

    def draw(self, factor: float, backend: str) -> Tensor:
        """Return pictures (or outputs) of the candidate `[n, ...]`; backend float32 is the reference itself."""
        low = backend == "bfloat16"
        model = (self.half_reference if low else self.reference).at(factor)
        if backend.startswith("int"):
            fresh = self.opened.fresh()
            fresh.load_state_dict(model.state_dict())
            model = quantise(fresh, int(backend[3:]))
        if not self.quick:
            return self.samplers[low].images(model)
        calls = [(args, {k: _cast(v) for k, v in kwargs.items()}) for args, kwargs in self.calls] if low else self.calls
        return self.samplers[low].replay(model, calls)


def _cast(value: object) -> object:
    return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value


def measure(subjects: Subjects, draws: int, cells: dict[tuple[str, float, int], Cell], bar: tqdm) -> None:
    """Add the verdicts on every factor, backend and number of pictures to `cells`."""
    ladder = {rung: subjects.draw(rung, "float32") for rung in RUNGS}
    base, trained = ladder[0.0], subjects.draw(1.0, "float32")
    effect = _effect(base, trained, subjects.quick)
    generator = torch.Generator().manual_seed(0)
    for backend in BACKENDS:
        own = _effect(base, subjects.draw(0.0, backend), subjects.quick)
        for factor in FACTORS:
            bar.update()
            images = subjects.draw(factor, backend)
            sums = compare(images, ladder)
            measured = None if subjects.quick else metrics.measure(images, base, trained)
            for count in COUNTS:
                for _ in range(draws):
                    rows = torch.randperm(len(images), generator=generator)[:count]
                    look = "clean" if measured is None else _look(measured, rows)
                    seen = StrengthResult(
                        1.0, read(sums.of(rows), draws=100), float(effect[rows].mean()), float(own[rows].mean()), look
                    )
                    cells.setdefault((backend, factor, count), Cell()).findings.append(judge([seen]))


def _look(measured: dict[str, Tensor], rows: Tensor) -> str:
    names = ("total_variation_ratio", "noise_sigma_ratio", "content")
    return look_of(*(float(measured[name][rows].double().median()) for name in names))


def _effect(base: Tensor, other: Tensor, quick: bool) -> Tensor:
    if quick:
        return ((other - base).flatten(1).norm(dim=1) / base.flatten(1).norm(dim=1)).expand(len(base))
    return 1 - metrics.ssim(base, other)


def table(cells: dict[tuple[str, float, int], Cell], counts: tuple[int, ...]) -> str:
    """Return the share of wrong-verdicts per true factor and number of pictures; in brackets inconclusive ones."""
    head = "| weights | pictures | " + " | ".join(f"{factor:g}x" for factor in FACTORS) + " |"
    lines = [head, "| --- " * (len(FACTORS) + 2) + "|"]
    for backend in BACKENDS:
        for count in counts:
            row = [_entry(cells[backend, factor, count]) for factor in FACTORS]
            lines.append(f"| {backend} | {count} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _entry(cell: Cell) -> str:
    flagged = cell.share(lambda found: found.code is not None)
    unsure = cell.share(lambda found: found.finding == "inconclusive")
    return f"{flagged:.2f}" + (f" ({unsure:.2f})" if unsure > 0.004 else "")


def errors(cells: dict[tuple[str, float, int], Cell], count: int) -> str:
    """Return the median estimated factor and its 5 to 95 % range per true factor, for `count` pictures."""
    lines = [
        "| weights | " + " | ".join(f"{factor:g}x" for factor in FACTORS) + " |",
        "| --- " * (len(FACTORS) + 1) + "|",
    ]
    for backend in BACKENDS:
        row = []
        for factor in FACTORS:
            found = sorted(f.factor for f in cells[backend, factor, count].findings if f.factor is not None)
            low, middle, high = (found[int(q * (len(found) - 1))] for q in (0.05, 0.5, 0.95)) if found else (0, 0, 0)
            row.append(f"{middle:.3g} ({low:.3g} to {high:.3g})")
        lines.append(f"| {backend} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def records(cells: dict[tuple[str, float, int], Cell], subject: str) -> list[dict[str, object]]:
    """Return the cells as run records (kind "power")."""
    return [
        {
            "kind": "power", "subject": subject, "fault": f"{factor:g} times the trained strength",
            "expected_code": None if factor == 1 else "LH602", "trials": len(cell.findings),
            "detected": sum(found.code is not None for found in cell.findings),
            "named": sum(found.code in ("LH601", "LH602") for found in cell.findings),
            "factor": factor, "images": count, "dtype": backend, "source": "images",
        }
        for (backend, factor, count), cell in cells.items()
    ]  # fmt: skip


def pairs_of(base: Path, count: int, seed: int) -> list[Pair]:
    """Choose `count` different prompts of the pipeline's table, each with a seed of its own."""
    with safe_open(base / "prompts.safetensors", "pt") as file:
        prompts = json.loads(file.metadata()["prompts"])
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    return [Pair(prompts[i], seed + n) for n, i in enumerate(order[:count].tolist())]


def written(out: Path, sections: list[str]) -> None:
    """Write the document anew: its prose, then `sections`."""
    prose = out.read_text(encoding="utf-8").partition("\n## ")[0] if out.exists() else "# What pictures can tell"
    out.write_text("\n\n".join([prose.strip(), *(each.strip() for each in sections)]) + "\n", encoding="utf-8")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--loras", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=["r32_a32", "r8_a16", "r16_a4_rslora", "strong_r8_a32"])
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--records", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()
    text, lines = [], []
    for quick in (False, True):
        cells: dict[tuple[str, float, int], Cell] = {}
        bar = tqdm(total=len(options.only) * len(BACKENDS) * len(FACTORS), desc="probe" if quick else "pictures")
        for name in options.only:
            opened, half = (open_pipeline(options.base, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
            pairs = pairs_of(options.base, max(COUNTS), options.seed)
            measure(Subjects(opened, half, options.loras / name / "peft", pairs, quick), options.draws, cells, bar)
        bar.close()
        what = "One denoiser call (--quick)" if quick else "Full sampling"
        text += [
            f"\n## {what}\n",
            table(cells, COUNTS),
            "\nEstimated factor with 8 pictures: median (5 to 95 %)\n",
            errors(cells, 8),
        ]
        lines += records(cells, "probe" if quick else "pictures")
    text.append(
        f"\n{len(options.only)} LoRAs, {options.draws} draws of pictures per cell and LoRA; "
        f"{time.perf_counter() - began:.0f} s"
    )
    print("\n".join(text))
    if options.out:
        from benchmarks import image_blind_spots, image_turns  # which measure with what stands here

        written(options.out, [image_blind_spots.section(), _LEGEND, "\n".join(text), image_turns.section()])
    if options.records:
        options.records.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
