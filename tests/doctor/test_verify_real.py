"""Merges made by PEFT, diffusers, DiffSynth and the example loader are judged right, and their faults by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.benches import get_bench
from harness.doctor.verify.verify import MergeReport, verify_merge
from harness.files import write_lora
from harness.loaders.registry import installed, resolve
from tests.doctor.merging import weights

BENCH = "qwen-image"
RANK = 8
KINDS = ("attn.to_q", "attn.to_k", "attn.to_v", "img_mlp.net.0.proj")
DTYPES = {"bfloat16": 0.01, "float16": 0.01, "float8_e4m3fn": 0.05}
# merger -> formats that it reads; those of PEFT are called as its users do, without the harness in between
MERGERS = {
    "peft merge_and_unload": "peft",
    "peft merge_and_unload, safe": "peft",
    "peft merge_adapter, safe": "peft",
    "diffusers-fused": "diffusers",
    "diffsynth": "diffsynth",
}
AVAILABLE = {entry.name: entry.available for entry in installed()}


def peft_merged(model: torch.nn.Module, lora: Path, strength: float, how: str) -> torch.nn.Module:
    """Merge with PEFT's own calls; the strength goes through `scale_layer`, as diffusers and PEFT's helper do it."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    wrapped = PeftModel.from_pretrained(model, str(lora))
    for layer in (module for module in wrapped.modules() if isinstance(module, LoraLayer)):
        layer.scale_layer(strength)
    safe = how.endswith("safe")
    if "unload" in how:
        return wrapped.merge_and_unload(safe_merge=safe)  # type: ignore[no-any-return, operator]
    wrapped.merge_adapter(safe_merge=safe)  # type: ignore[operator]
    return wrapped.get_base_model()


@dataclass
class Trial:
    """One bench model, saved before and after a merger worked on it."""

    folder: Path
    merger: str
    dtype: str

    def __post_init__(self) -> None:
        self.bench = get_bench(BENCH)
        self.model = self.bench.build(torch.float16 if self.dtype == "float16" else torch.bfloat16)
        save_file({k: v.clone() for k, v in self.model.state_dict().items()}, self.folder / "base.safetensors")

    def lora(self, name: str, alphas: Mapping[str, float], *, seed: int = 0, size: float = 2.0) -> Path:
        """Write a LoRA for the layers that `alphas` names, each with a seed of its own; the update is 0.02 * `size`."""
        modules = {
            layer: weights(*self.bench.layers[layer].shape, RANK, alpha, seed + names().index(layer), size)
            for layer, alpha in alphas.items()
        }
        return write_lora(self.folder / name, MERGERS[self.merger], modules)

    def merge(self, lora: Path, strength: float = 1.0) -> None:
        if self.merger.startswith("peft"):
            self.model = peft_merged(self.model, lora, strength, self.merger)
        else:
            if not AVAILABLE.get(self.merger):
                pytest.skip(f"{self.merger} is not here")
            self.model = resolve(self.merger).load(self.model, lora, strength=strength) or self.model

    def verify(self, lora: Path, *, full: bool = False, strength: float = 1.0) -> MergeReport:
        state = {k.replace("base_layer.", ""): v for k, v in self.model.state_dict().items() if "lora_" not in k}
        dtype = getattr(torch, self.dtype)
        save_file({k: v.to(dtype, copy=True) for k, v in state.items()}, self.folder / "merged.safetensors")
        paths = (self.folder / f"{name}.safetensors" for name in ("base", "merged"))
        return verify_merge(*paths, lora, full=full, strength=strength)


def names(kinds: tuple[str, ...] = KINDS) -> list[str]:
    return [f"transformer_blocks.{block}.{kind}" for block in range(2) for kind in kinds]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merger", MERGERS)
@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_right_merges_at_any_scale_pass(tmp_path: Path, merger: str, dtype: str, scale: float) -> None:
    trial = Trial(tmp_path, merger, dtype)
    alphas = {name: scale * RANK * (1 + i % 2) for i, name in enumerate(names())}
    lora = trial.lora("lora", alphas)
    trial.merge(lora, strength=0.75)
    for full in (False, True)[: 1 + (scale == 1)]:
        report = trial.verify(lora, strength=0.75, full=full)
        assert report.ok, report.overall.text()
        assert report.overall.ratio == pytest.approx(1.0, abs=DTYPES[dtype])
        assert report.overall.modules_total == len(alphas)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merger", MERGERS)
def test_a_merge_at_raw_alpha_is_named(tmp_path: Path, merger: str, dtype: str) -> None:
    """Somebody who passes the rank as strength undoes the division: the merge is at raw alpha."""
    trial = Trial(tmp_path, merger, dtype)
    lora = trial.lora("lora", {name: 2.0 + i % 3 for i, name in enumerate(names())}, size=0.5)
    trial.merge(lora, strength=float(RANK))
    overall = trial.verify(lora).overall
    assert (overall.code, overall.law and overall.law.formula) == ("LH201", "strength * alpha"), overall.text()
    assert overall.modules_failed == overall.modules_total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merger", MERGERS)
def test_the_lora_of_another_file_is_named(tmp_path: Path, merger: str, dtype: str) -> None:
    trial = Trial(tmp_path, merger, dtype)
    alphas = dict.fromkeys(names(), 4.0)
    trial.merge(trial.lora("other", alphas, seed=100))
    overall = trial.verify(trial.lora("lora", alphas)).overall
    assert overall.code == "LH101", overall.text()
    assert "another LoRA" in overall.title


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merger", MERGERS)
def test_a_double_merge_is_named(tmp_path: Path, merger: str, dtype: str) -> None:
    trial = Trial(tmp_path, merger, dtype)
    lora = trial.lora("lora", {name: 3.0 + i for i, name in enumerate(names())})
    trial.merge(lora)
    if merger == "peft merge_adapter, safe":  # it stays wrapped, and refuses to merge twice: saved and loaded again
        state = {k.replace("base_layer.", ""): v for k, v in trial.model.state_dict().items() if "lora_" not in k}
        trial.model = trial.bench.build(torch.float16 if dtype == "float16" else torch.bfloat16)
        trial.model.load_state_dict(state)
    trial.merge(lora)
    overall = trial.verify(lora).overall
    assert overall.code == "LH206", overall.text()
    assert overall.ratio == pytest.approx(2.0, abs=4 * DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merger", MERGERS)
def test_a_merge_of_q_and_k_but_not_v_is_named(tmp_path: Path, merger: str, dtype: str) -> None:
    trial = Trial(tmp_path, merger, dtype)
    alphas = {name: 3.0 + i for i, name in enumerate(names(KINDS[:3]))}
    lora = trial.lora("lora", alphas)
    trial.merge(trial.lora("part", {name: alpha for name, alpha in alphas.items() if "to_v" not in name}))
    report = trial.verify(lora)
    assert report.overall.code == "LH102", report.overall.text()
    assert [v.worst_module for v in report.modules if not v.ok] == [name for name in alphas if "to_v" in name]


@pytest.mark.parametrize(
    ("loader", "format", "code"),
    [("diffsynth-2.0.4", "diffsynth", "LH202"), ("examples/raw_alpha.py:load", "peft", "LH201")],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_merges_of_real_and_example_mergers_that_are_wrong_are_named(
    tmp_path: Path, loader: str, format: str, code: str, dtype: torch.dtype
) -> None:
    if loader.startswith("diffsynth") and not AVAILABLE.get(loader):
        pytest.skip(f"{loader} is not here")
    bench = get_bench(BENCH)
    model = bench.build(dtype)
    lora = {
        n: weights(*bench.layers[n].shape, 4 << i % 2, 3.0 * (i + 1), i, 0.05)
        for i, n in enumerate(bench.lora_layers[:4])
    }
    path = write_lora(tmp_path / "lora", format, lora)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "base.safetensors")
    merged = resolve(loader).load(model, path, strength=1.0) or model
    save_file({k: v.clone() for k, v in merged.state_dict().items()}, tmp_path / "merged.safetensors")
    overall = verify_merge(tmp_path / "base.safetensors", tmp_path / "merged.safetensors", path).overall
    assert overall.code == code, overall.text()
    assert overall.modules_failed == 4


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_both_merge_modes_of_peft_pass(tmp_path: Path, safe_merge: bool, rslora: bool) -> None:
    from peft import PeftModel

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 96), torch.nn.Linear(96, 96)).bfloat16()
    lora = {str(i): weights(96, 96, 4 << i, 8.0, i, 0.05) for i in range(2)}
    path = write_lora(tmp_path / "lora", "peft", lora, rslora=rslora)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    merged = PeftModel.from_pretrained(model, str(path)).merge_and_unload(safe_merge=safe_merge)
    save_file(merged.state_dict(), tmp_path / "merged.safetensors")
    report = verify_merge(tmp_path / "base.safetensors", tmp_path / "merged.safetensors", path)
    assert report.ok, report.overall.text()
