"""Merges made by PEFT, diffusers, DiffSynth and the example loader are judged right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.benches import get_bench
from harness.doctor.verify import verify_merge
from harness.files import write_lora
from harness.loaders.registry import installed, resolve
from tests.doctor.merging import (
    weights,
)

REAL = [("peft", "peft"), ("diffusers-fused", "diffusers"), ("diffusers-fused", "kohya"), ("diffsynth", "diffsynth")]


@pytest.mark.parametrize(("loader", "format"), REAL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_merges_of_real_mergers_pass(tmp_path: Path, loader: str, format: str, dtype: torch.dtype) -> None:
    if not {entry.name: entry.available for entry in installed()}.get(loader):
        pytest.skip(f"{loader} is not here")
    bench = get_bench("qwen-image")
    model = bench.build(dtype)
    names = [name for name in bench.lora_layers if "attn" in name][:6]
    lora = {n: weights(*bench.layers[n].shape, 4 << i % 2, 2.0 * (i + 1), i, 0.3) for i, n in enumerate(names)}
    path = write_lora(tmp_path / "lora", format, lora)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "base.safetensors")
    merged = resolve(loader).load(model, path, strength=0.75) or model
    state = {k.replace("base_layer.", ""): v.clone() for k, v in merged.state_dict().items() if "lora_" not in k}
    save_file(state, tmp_path / "merged.safetensors")
    for full in (False, True):
        report = verify_merge(
            tmp_path / "base.safetensors", tmp_path / "merged.safetensors", path, strength=0.75, full=full
        )
        assert report.ok, report.overall.text()
        assert report.overall.ratio == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize(
    ("loader", "format", "code"),
    [("diffsynth-2.0.4", "diffsynth", "LH202"), ("examples/raw_alpha.py:load", "peft", "LH201")],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_merges_of_real_and_example_mergers_that_are_wrong_are_named(
    tmp_path: Path, loader: str, format: str, code: str, dtype: torch.dtype
) -> None:
    if loader.startswith("diffsynth") and loader not in {entry.name for entry in installed() if entry.available}:
        pytest.skip(f"{loader} is not here")
    bench = get_bench("qwen-image")
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
