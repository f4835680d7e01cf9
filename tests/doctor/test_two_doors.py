"""One law has one name: what `check` says of a loader, `verify` says of a merge that the loader made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median

import pytest
import torch
from safetensors.torch import save_file

from harness.checks.cell import Cell
from harness.checks.law import measure_law
from harness.checks.plan import planned
from harness.doctor import verify_merge
from harness.files import LoraWeights, match_modules, read_lora, write_lora
from harness.law.diagnosis import diagnose
from harness.law.probe import Probe
from harness.loaders.registry import resolve

Factor = Callable[[float, Sequence[float], Sequence[int], int], float]  # strength, alphas, ranks, which module
SHAPES = ((16, 10.5), (12, 2.75), (4, 6.0), (6, 0.625), (4, 6.0), (24, 33.0), (7, 3.5), (9, 20.25))


def most_common(values: Sequence[float]) -> float:
    return max(dict.fromkeys(values), key=list(values).count)


LAWS: dict[str, tuple[Factor, float]] = {
    "as trained": (lambda u, a, r, i: u * a[i] / r[i], 0.5),
    "raw alpha": (lambda u, a, r, i: u * a[i], 0.5),
    "alpha ignored": (lambda u, a, r, i: u, 0.5),
    "half of alpha ignored": (lambda u, a, r, i: 0.5 * u, 1.0),
    "divided by the rank alone": (lambda u, a, r, i: u / r[i], 1.0),
    "root of the rank": (lambda u, a, r, i: u * a[i] / r[i] ** 0.5, 0.5),
    "root of the rank alone": (lambda u, a, r, i: u / r[i] ** 0.5, 1.0),
    "rank squared": (lambda u, a, r, i: u * a[i] / r[i] ** 2, 1.0),
    "times the rank": (lambda u, a, r, i: u * a[i] * r[i], 1.0),
    "first alpha": (lambda u, a, r, i: u * a[0] / r[i], 1.0),
    "last alpha": (lambda u, a, r, i: u * a[-1] / r[i], 1.0),
    "most common alpha": (lambda u, a, r, i: u * most_common(a) / r[i], 1.0),
    "largest alpha": (lambda u, a, r, i: u * max(a) / r[i], 1.0),
    "mean alpha": (lambda u, a, r, i: u * mean(a) / r[i], 1.0),
    "median alpha": (lambda u, a, r, i: u * median(a) / r[i], 1.0),
    "first rank": (lambda u, a, r, i: u * a[i] / r[0], 1.0),
    "largest rank": (lambda u, a, r, i: u * a[i] / max(r), 1.0),
    "first alpha, first rank": (lambda u, a, r, i: u * a[0] / r[0], 1.0),
    "truncated alpha": (lambda u, a, r, i: u * math.trunc(a[i]) / r[i], 1.0),
    "alpha rounded up": (lambda u, a, r, i: u * math.ceil(a[i]) / r[i], 1.0),
    "alpha at least one": (lambda u, a, r, i: u * max(a[i], 1.0) / r[i], 1.0),
    "alpha at most one": (lambda u, a, r, i: u * min(a[i], 1.0) / r[i], 1.0),
    "squared": (lambda u, a, r, i: u * (a[i] / r[i]) ** 2, 0.5),
    "root of the scale": (lambda u, a, r, i: u * (a[i] / r[i]) ** 0.5, 1.0),
    "doubled": (lambda u, a, r, i: 2 * u * a[i] / r[i], 1.0),
    "halved": (lambda u, a, r, i: 0.5 * u * a[i] / r[i], 1.0),
    "a third": (lambda u, a, r, i: u * a[i] / r[i] / 3, 1.0),
    "0.7": (lambda u, a, r, i: 0.7 * u * a[i] / r[i], 1.0),
    "inverted": (lambda u, a, r, i: -u * a[i] / r[i], 1.0),
    "strength ignored": (lambda u, a, r, i: a[i] / r[i], 0.5),
    "strength squared": (lambda u, a, r, i: u * u * a[i] / r[i], 0.5),
    "strength at most one": (lambda u, a, r, i: min(u, 1.0) * a[i] / r[i], 1.75),
    "strength without sign": (lambda u, a, r, i: abs(u) * a[i] / r[i], -1.0),
    "strength added to one": (lambda u, a, r, i: (1 + u) * a[i] / r[i], 0.5),
}


def loader(factor: Factor) -> Callable[..., None]:
    @torch.no_grad()
    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        adapter = read_lora(lora)
        layers, modules = dict(model.named_modules()), list(adapter.modules.values())
        alphas = [float(m.rank) if m.alpha is None else m.alpha for m in modules]
        for index, (name, layer) in enumerate(match_modules(adapter, layers)[0].items()):
            a, b = adapter.tensors(name)
            scale = factor(strength, alphas, [m.rank for m in modules], index)
            layers[layer].weight += (scale * (b.double() @ a.double())).to(layers[layer].weight.dtype)

    return load


def merge_of(folder: Path, factor: Factor, strength: float, shapes: Sequence[tuple[int, float]] = SHAPES) -> Path:
    torch.manual_seed(0)
    names = [f"blocks.{i}.x" for i in range(len(shapes))]
    base = {f"{name}.weight": torch.randn(48, 32) for name in names}
    pairs = zip(names, shapes, strict=True)
    lora = {name: LoraWeights(torch.randn(rank, 32), torch.randn(48, rank), alpha) for name, (rank, alpha) in pairs}
    alphas, ranks = [alpha for _, alpha in shapes], [rank for rank, _ in shapes]
    scales = {name: factor(strength, alphas, ranks, i) for i, name in enumerate(names)}
    merged = {f"{n}.weight": base[f"{n}.weight"] + scales[n] * (w.b @ w.a) for n, w in lora.items()}
    save_file(base, folder / "base.safetensors")
    save_file(merged, folder / "merged.safetensors")
    write_lora(folder / "lora.safetensors", "diffsynth", lora)
    return folder


def verified(folder: Path, strength: float):  # type: ignore[no-untyped-def]
    places = (folder / f"{name}.safetensors" for name in ("base", "merged", "lora"))
    return verify_merge(*places, strength=strength).overall


def planned_probes(factor: Factor) -> list[Probe]:
    """Return what the planned examples of `check` would measure of a loader with this factor, file by file."""
    found = []
    cell = Cell(resolve("peft"), "kohya", "qwen-image")
    for example in planned(cell, [f"blocks.{i}.x" for i in range(12)]):
        alphas, ranks = [t.alpha or 0.0 for t in example.targets], [t.rank for t in example.targets]
        for i, target in enumerate(example.targets):
            scale = factor(example.strength, alphas, ranks, i)
            found.append(Probe(target.name, example.strength, i, tuple(alphas), tuple(ranks), scale, 1e-6))
    return found


@pytest.mark.parametrize("name", LAWS)
def test_check_and_verify_give_one_law_one_code(name: str, tmp_path: Path) -> None:
    factor, strength = LAWS[name]
    of_loader = diagnose(planned_probes(factor))
    of_merge = verified(merge_of(tmp_path, factor, strength), strength)
    assert of_loader.law is not None or of_loader.trait is not None
    assert of_merge.code == of_loader.code, (of_merge.text(), of_loader)
    if of_loader.law is not None:
        assert of_merge.law is not None
        readings = {of_merge.law.formula, *of_merge.law.alternatives}
        assert {of_loader.law.formula, *of_loader.law.alternatives} & readings


@pytest.mark.parametrize("name", ["raw alpha", "truncated alpha", "mean alpha", "a third"])
def test_a_real_loader_of_that_law_is_named_alike(name: str, tmp_path: Path) -> None:
    factor, strength = LAWS[name]
    of_loader = measure_law(loader(factor), format="kohya", bench="clip-text").diagnosis
    assert of_loader.code == verified(merge_of(tmp_path, factor, strength), strength).code


@pytest.mark.parametrize(
    ("factor", "code", "readings"),
    [
        (0.5, "LH209", {"0.5 * strength * alpha / rank", "strength * alpha^2 / rank^2"}),  # merged at half the weight
        (2.0, "LH202", {"strength", "2 * strength * alpha / rank"}),  # merged twice, or alpha ignored
    ],
)
def test_a_scale_of_one_ratio_is_ambiguous_and_says_all_its_readings(
    factor: float, code: str, readings: set[str], tmp_path: Path
) -> None:
    """Every module has alpha / rank = 1 / 2, so a factor of the merge is a power of it as well."""
    shapes = ((8, 4.0), (8, 4.0), (8, 4.0))
    overall = verified(merge_of(tmp_path, lambda u, a, r, i: factor * u * a[i] / r[i], 1.0, shapes), 1.0)
    assert overall.law is not None
    assert overall.law.ambiguous
    assert overall.code == code
    assert readings <= {overall.law.formula, *overall.law.alternatives}
    assert ", or " in overall.title  # the names of all readings, not of one
    assert all(reading in overall.title for reading in readings)


def test_a_factor_of_its_own_for_each_block_is_a_law(tmp_path: Path) -> None:
    shapes = ((8, 4.0), (4, 6.0)) * 4
    torch.manual_seed(0)
    names = [f"blocks.{i // 2}.{'xy'[i % 2]}" for i in range(len(shapes))]
    base = {f"{name}.weight": torch.randn(48, 32) for name in names}
    lora = {n: LoraWeights(torch.randn(r, 32), torch.randn(48, r), a) for n, (r, a) in zip(names, shapes, strict=True)}
    factors = (1.0, 0.5, 0.8, 1.2)
    merged = {
        f"{n}.weight": base[f"{n}.weight"] + factors[i // 2] * w.alpha / w.rank * (w.b @ w.a)  # type: ignore[operator]
        for i, (n, w) in enumerate(lora.items())
    }
    save_file(base, tmp_path / "base.safetensors")
    save_file(merged, tmp_path / "merged.safetensors")
    write_lora(tmp_path / "lora.safetensors", "diffsynth", lora)
    overall = verified(tmp_path, 1.0)
    assert overall.code == "LH209"
    assert overall.law is not None
    assert overall.law.formula == "c(block) * strength * alpha / rank"
    shown = "0.5x in blocks.1, 0.8x in blocks.2, 1.2x in blocks.3, 1x in blocks.0"
    assert overall.title.startswith(f"one factor per block ({shown})")
