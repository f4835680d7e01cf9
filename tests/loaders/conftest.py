"""Small models and LoRA files for the loader tests, and the factor that a loader really used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from harness import check_loader
from harness.benches import Bench, get_bench, registry
from harness.files import LoraWeights, write_lora
from harness.isolation.limits import Limits
from harness.loaders.releases import find_releases

HERE = Limits(workers=1)


def weights(bench: Bench, alphas: tuple[float | None, ...] = (1.5, 8.0, 5.0, 16.0)) -> dict[str, LoraWeights]:
    """One LoRA module per target, ranks and alphas chosen so that no wrong law looks right."""
    generator = torch.Generator().manual_seed(0)
    ranks = (3, 4, 8, 6)
    made = {}
    for index, name in enumerate(bench.lora_layers):
        rank, (rows, columns) = ranks[index % 4], bench.layers[name].shape
        a = torch.randn(rank, columns, generator=generator) * 0.2
        b = torch.randn(rows, rank, generator=generator) * 0.2
        made[name] = LoraWeights(a, b, alphas[index % len(alphas)])
    return made


def written(bench: Bench, form: str, folder: Path, alphas: tuple[float | None, ...] = (1.5, 8.0, 5.0, 16.0)) -> Path:
    """Write `weights(bench)` in the format `form`; return what a loader gets."""
    return write_lora(folder / ("adapter" if form == "peft" else "lora.safetensors"), form, weights(bench, alphas))


def effective(model: torch.nn.Module, name: str) -> torch.Tensor:
    """What the layer computes, [out, in], found by running the identity through it."""
    layer = model.get_submodule(name)
    dtype = next(layer.parameters()).dtype
    with torch.no_grad():
        columns = layer(torch.eye(layer.in_features, dtype=dtype)) - layer(
            torch.zeros(1, layer.in_features, dtype=dtype)
        )
    return columns.double().T


def factors(bench: Bench, model: torch.nn.Module, modules: Mapping[str, LoraWeights]) -> dict[str, float]:
    """The factor on B @ A found in every layer of `modules`."""
    base = bench.base()
    found = {}
    for name, module in modules.items():
        product = module.b.double() @ module.a.double()
        found[name] = float(((effective(model, name) - effective(base, name)) * product).sum() / (product**2).sum())
    return found


def trained(modules: Mapping[str, LoraWeights], strength: float) -> dict[str, float]:
    """strength * alpha / rank for every module, alpha / rank = 1 where there is no alpha."""
    return {n: strength * (1.0 if m.alpha is None else m.alpha / m.a.shape[0]) for n, m in modules.items()}


def codes(load: object, **options: object) -> set[str | None]:
    verdicts = check_loader(load, max_examples=6, limits=HERE, **options)  # type: ignore[arg-type]
    assert verdicts
    return {verdict.code for verdict in verdicts if not verdict.ok}


@pytest.fixture
def bench() -> Bench:
    return get_bench("qwen-image")


@pytest.fixture
def needs_diffsynth() -> Callable[[str], None]:
    def needs(version: str) -> None:
        if version not in {release.version for release in find_releases("diffsynth")}:
            pytest.skip(f"lora-harness install diffsynth=={version} has not been run")

    return needs


@pytest.fixture
def no_own_benches(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is there before the test, and none of it remains."""
    monkeypatch.setattr(registry, "_OWN", {})
    monkeypatch.setattr("harness.loaders.benches._FUNCTIONS", {})
