"""Which files another release changes, by what factor, and what is not judged."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from harness.benches import get_bench
from harness.checks.law import MeasuredLaw
from harness.doctor import upgrade
from harness.doctor.upgrade import compare_files, files_below
from harness.errors import UserError
from harness.files import LoraWeights, write_lora
from harness.law.diagnosis import diagnose
from harness.law.probe import Probe
from harness.loaders.registry import resolve

RIGHT, STRENGTH, DOUBLE = (lambda a, r: a / r), (lambda a, r: 1.0), (lambda a, r: 2 * a / r)
SHAPES = ((5, 10.5), (12, 33.0), (4, 6.0), (6, 0.625), (4, 2.75), (24, 6.0), (7, 3.5))


def law_with(scale, *, raised: tuple[str, ...] = ()) -> MeasuredLaw:
    """The law of probes whose scale is `scale(alpha, rank)` times the strength."""
    alphas, ranks = tuple(a for _, a in SHAPES), tuple(r for r, _ in SHAPES)
    probes = [
        Probe(f"layer.{i}", s, i, alphas, ranks, s * scale(alphas[i], ranks[i]), 1e-6)
        for s in (1.0, 0.5, -1.0, 2.0)
        for i in range(len(SHAPES))
    ]
    return MeasuredLaw(diagnose(probes), tuple(probes), raised)


def write(path: Path, *alphas: float, form: str = "kohya", bench: str = "sd-unet", rank: int = 4) -> Path:
    found = get_bench(bench)
    made = {}
    for index, name in enumerate(found.lora_layers):
        rows, columns = found.layers[name].shape
        made[name] = LoraWeights(torch.ones(rank, columns), torch.ones(rows, rank), alphas[index % len(alphas)])
    return write_lora(path, form, made)


@pytest.fixture
def compare(monkeypatch):
    """Compare files between two releases with the laws given."""

    def compared(path: Path, *laws: MeasuredLaw):
        before, after = resolve("diffusers"), resolve("diffusers-fused")
        by_spec = {before.spec: laws[0], after.spec: laws[1]}
        monkeypatch.setattr(upgrade, "measure_law", lambda subject, **how: by_spec[subject.spec])
        (change,) = compare_files(files_below(path), before, after)
        return change

    return compared


def test_one_factor_for_the_whole_file(tmp_path, compare):
    change = compare(write(tmp_path / "a.safetensors", 2.0), law_with(RIGHT), law_with(STRENGTH))
    assert (change.outcome, change.factors) == ("changes", (2.0, 2.0))
    assert change.what == "times 2 (bench sd-unet)"


def test_a_factor_for_each_module(tmp_path, compare):
    change = compare(write(tmp_path / "a.safetensors", 2.0, 8.0), law_with(STRENGTH), law_with(RIGHT))
    assert (change.outcome, change.factors) == ("changes", (0.5, 2.0))


def test_a_file_whose_alpha_is_its_rank_is_the_same(tmp_path, compare):
    change = compare(write(tmp_path / "a.safetensors", 4.0), law_with(RIGHT), law_with(STRENGTH))
    assert (change.outcome, change.factors) == ("same", (1.0, 1.0))


def test_a_release_that_raises_or_loads_nothing_is_named(tmp_path, compare):
    file, nothing = write(tmp_path / "a.safetensors", 4.0), law_with(lambda a, r: 0.0)
    change = compare(file, law_with(RIGHT), MeasuredLaw(diagnose(()), (), ("KeyError: 'x'",)))
    assert (change.outcome, change.factors) == ("changes", None)
    assert change.what == "diffusers loads it; diffusers-fused raises (KeyError: 'x')"
    assert compare(file, nothing, law_with(RIGHT)).what.startswith("diffusers loads nothing; ")
    assert compare(file, nothing, nothing).outcome == "same"


def test_what_no_law_explains_is_not_judged(tmp_path, compare):
    file = write(tmp_path / "a.safetensors", 4.0)
    wild = law_with(lambda a, r: 0.3 + (a * 7919) % 1 + r % 3)
    assert compare(file, law_with(RIGHT), wild).outcome == "not judged"
    some = compare(file, law_with(RIGHT), law_with(RIGHT, raised=("KeyError: 'x'",)))
    assert (some.outcome, some.what) == ("not judged", "diffusers-fused raises on some kohya files: KeyError: 'x'")


def test_what_is_not_measured_is_not_judged(tmp_path, compare):
    other = write(tmp_path / "b", 4.0, form="peft", bench="qwen-image")
    assert "this is peft" in compare(other, law_with(RIGHT), law_with(STRENGTH)).what
    text = write(tmp_path / "c.safetensors", 4.0, bench="clip-text")
    assert compare(text, law_with(RIGHT), law_with(STRENGTH)).outcome == "not judged"
    (tmp_path / "d.safetensors").write_bytes(b"no safetensors file")
    assert compare(tmp_path / "d.safetensors", law_with(RIGHT), law_with(STRENGTH)).outcome == "not judged"


def test_files_are_found_below_a_folder(tmp_path):
    write(tmp_path / "peft" / "one", 4.0, form="peft", bench="qwen-image")
    write(tmp_path / "two.safetensors", 4.0)
    assert [path.name for path in files_below(tmp_path)] == ["one", "two.safetensors"]
    with pytest.raises(UserError, match="there is no LoRA file there"):
        files_below(tmp_path / "nowhere")
