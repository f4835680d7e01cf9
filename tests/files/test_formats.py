"""Every format, dialect and variant of the fixture table is told by its keys and read part by part."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fixtures.build_formats import SAMPLES, Sample, build, entries, pair
from fixtures.build_malformed import dotted, floats, tensors_file
from harness.errors import LoraFileError
from harness.files import FORMATS, detect_format, read_lora

PLAIN = [sample for sample in SAMPLES if sample.config is None and not sample.file_name.endswith(".gguf")]


@pytest.fixture
def sample(request: pytest.FixtureRequest) -> Sample:
    if request.param.format == "gguf":
        pytest.importorskip("gguf")
    return request.param


def named(sample: Sample) -> str:
    return sample.name


every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=named, indirect=True)


@every_sample
def test_a_sample_is_what_its_keys_say(sample: Sample, tmp_path: Path) -> None:
    adapter = read_lora(build(sample, tmp_path))
    assert (adapter.format, adapter.dialect, adapter.alpha_source) == (
        sample.format,
        sample.dialect,
        sample.alpha_source,
    )
    assert {name: (module.variant, module.rank) for name, module in adapter.modules.items()} == dict(sample.modules)
    for module in adapter.modules.values():
        features = (9, 3) if module.name in ("token_embd", "embed_tokens") else (4, 3)
        assert module.rank == 0 or (module.in_features, module.out_features) == features
        assert module.alpha == (None if module.variant in ("diff", "norm", "set") else sample.alpha)


@every_sample
def test_every_key_is_a_part_of_a_module_or_reported(sample: Sample, tmp_path: Path) -> None:
    adapter = read_lora(build(sample, tmp_path))
    parts = {key: role for module in adapter.modules.values() for role, key in module.keys.items()}
    assert sorted([*parts, *sample.unknown]) == sorted(sample.keys)
    assert set(adapter.unused_keys) == set(sample.unknown) - set(FORMATS[sample.format].marks)
    assert not adapter.problems


@every_sample
def test_halves_come_out_as_a_and_b_whichever_way_they_are_stored(sample: Sample, tmp_path: Path) -> None:
    adapter = read_lora(build(sample, tmp_path))
    for name, module in adapter.modules.items():
        if "A" in module.keys:
            a, b = adapter.tensors(name)
            experts = module.variant == "experts"
            assert tuple(a.shape[experts:][:2]) == (module.rank, module.in_features)
            assert tuple(b.shape[experts:][:2]) == (module.out_features, module.rank)
            assert float(a.sum()) == 0.25 * a.numel()


@pytest.mark.parametrize("sample", PLAIN, ids=named)
def test_detection_does_not_depend_on_the_order_of_the_keys(sample: Sample, tmp_path: Path) -> None:
    for seed in range(5):
        mixed = list(entries(sample).items())
        random.Random(seed).shuffle(mixed)
        path = tmp_path / f"{seed}.safetensors"
        path.write_bytes(tensors_file(dict(mixed), dict(sample.metadata)))
        adapter = read_lora(path)
        assert (adapter.format, adapter.dialect) == (sample.format, sample.dialect)
        assert {m.name: m.variant for m in adapter.modules.values()} == {
            name.split(":")[-1]: variant for name, (variant, _) in sample.modules.items()
        }


@pytest.mark.parametrize("sample", PLAIN, ids=named)
def test_a_key_of_another_format_is_reported_as_a_mixture(sample: Sample, tmp_path: Path) -> None:
    foreign = dotted("base_model.model.y") if sample.format != "peft" else dotted("diffusion_model.y")
    path = tmp_path / "x.safetensors"
    for first, second in ((entries(sample), foreign), (foreign, entries(sample))):
        path.write_bytes(tensors_file({**first, **second}, dict(sample.metadata)))
        with pytest.raises(LoraFileError, match="mixes the key formats"):
            detect_format(path)


@pytest.mark.parametrize("sample", PLAIN, ids=named)
def test_an_unknown_key_is_reported_never_dropped(sample: Sample, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(tensors_file({**entries(sample), "some.thing.else": floats(1)}, dict(sample.metadata)))
    adapter = read_lora(path)
    assert (adapter.format, adapter.unused_keys[-1]) == (sample.format, "some.thing.else")


def test_every_row_has_a_sample_and_every_dialect() -> None:
    assert {sample.format for sample in SAMPLES} == set(FORMATS)
    dialects = {(row.name, dialect) for row in FORMATS.values() for dialect in row.dialects}
    untested = dialects - {(sample.format, sample.dialect) for sample in SAMPLES}
    assert untested == {("comfyui", "bfl")}


def test_whole_tensors_are_understood_as_parts_of_a_module(tmp_path: Path) -> None:
    found = next(sample for sample in SAMPLES if sample.name == "comfyui_native")
    adapter = read_lora(build(found, tmp_path))
    assert adapter.modules["a.q"].keys["diff_b"] == "diffusion_model.a.q.diff_b"
    assert adapter.modules["n"].trained_scale == 1.0
    assert adapter.unused_keys == ()


def test_a_whole_tensor_without_a_prefix_is_not_taken_for_a_lora(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(tensors_file({"blocks.0.diff": floats(3, 4)}))
    with pytest.raises(LoraFileError, match="no LoRA format fits"):
        read_lora(tmp_path / "x.safetensors")


def test_a_peft_file_of_bare_names_with_biases_is_no_control_lora(tmp_path: Path) -> None:
    keys = {**pair("layers.0.q"), "layers.0.q.lora_B.bias": (3,)}
    entries = {key: floats(*shape) for key, shape in keys.items()}
    (tmp_path / "x.safetensors").write_bytes(tensors_file(entries))
    assert detect_format(tmp_path / "x.safetensors") == "diffsynth"
