"""Bad input in every format: each kind has a named verdict, whatever the keys look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fixtures.build_formats import SAMPLES, Entry, Sample, build, entries
from fixtures.build_malformed import dotted, floats, tensors_file
from harness.doctor import inspect_file
from harness.files import LoraModule, read_lora

Tensors = dict[str, Entry]
Damage = Callable[[Tensors, LoraModule], None]
# one sample of every format and dialect, with a plain pair
ONE_EACH = {(s.format, s.dialect): s for s in SAMPLES if "lora" in {v for v, _ in s.modules.values()}}
FILES = [s for s in ONE_EACH.values() if not s.file_name.endswith(".gguf")]
WITH_ALPHA = [s for s in FILES if s.alpha_source == "tensor"]


def module_of(sample: Sample, folder: Path) -> LoraModule:
    adapter = read_lora(build(sample, folder))
    return next(m for m in adapter.modules.values() if m.variant == "lora")


def codes(sample: Sample, folder: Path, damage: Damage) -> set[str]:
    """Return the codes of the hazards `inspect` names after `damage`, with the weights read too."""
    tensors = entries(sample)
    damage(tensors, module_of(sample, folder / "right"))
    path = build(sample, folder / "bad")
    file = path / sample.file_name if path.is_dir() else path
    file.write_bytes(tensors_file(tensors, dict(sample.metadata)))
    record = inspect_file(path, energy=True)
    assert all(hazard.what.isprintable() for hazard in record.hazards)
    return {hazard.code for hazard in record.hazards}


def drop(role: str) -> Damage:
    return lambda tensors, module: tensors.pop(module.keys[role]) and None


def other_rank(tensors: Tensors, module: LoraModule) -> None:
    key = module.keys["B"]
    tensors[key] = floats(*(size + 3 if size == module.rank else size for size in tensors[key][1]))


def number(value: float) -> Damage:
    def damage(tensors: Tensors, module: LoraModule) -> None:
        tensors[module.keys["B"]] = floats(*tensors[module.keys["B"]][1], value=value)

    return damage


def alpha(*shape: int, value: float = 0.25) -> Damage:
    def damage(tensors: Tensors, module: LoraModule) -> None:
        tensors[module.keys["alpha"]] = floats(*shape, value=value)

    return damage


def stranger(tensors: Tensors, module: LoraModule) -> None:
    tensors["some.thing.else"] = floats(1)


DAMAGES: Mapping[str, tuple[Damage, str]] = {
    "A without B": (drop("B"), "LH706"),
    "B without A": (drop("A"), "LH706"),
    "other rank": (other_rank, "LH706"),
    "NaN": (number(float("nan")), "LH707"),
    "infinity": (number(float("inf")), "LH707"),
    "key that fits no module": (stranger, "LH708"),
}
ALPHAS: Mapping[str, tuple[Damage, str]] = {
    "vector": (alpha(3), "LH705"),
    "NaN": (alpha(value=float("nan")), "LH705"),
    "infinity": (alpha(value=float("inf")), "LH705"),
    "zero": (alpha(value=0.0), "LH705"),
    "negative": (alpha(value=-4.0), "LH705"),
}


def named(sample: Sample) -> str:
    return sample.name


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("sample", FILES, ids=named)
def test_damage_has_a_name(sample: Sample, kind: str, tmp_path: Path) -> None:
    damage, code = DAMAGES[kind]
    assert code in codes(sample, tmp_path, damage)


@pytest.mark.parametrize("kind", ALPHAS)
@pytest.mark.parametrize("sample", WITH_ALPHA, ids=named)
def test_a_bad_alpha_has_a_name(sample: Sample, kind: str, tmp_path: Path) -> None:
    damage, code = ALPHAS[kind]
    assert code in codes(sample, tmp_path, damage)


@pytest.mark.parametrize("sample", FILES, ids=named)
def test_a_file_of_two_formats_is_refused_by_name(sample: Sample, tmp_path: Path) -> None:
    foreign = dotted("base_model.model.y") if sample.format != "peft" else dotted("diffusion_model.y")
    assert codes(sample, tmp_path, lambda tensors, module: tensors.update(foreign)) & {"LH799", "LH708"}


@pytest.mark.parametrize("sample", FILES, ids=named)
def test_the_undamaged_file_has_none_of_these_names(sample: Sample, tmp_path: Path) -> None:
    assert not codes(sample, tmp_path, lambda tensors, module: None) & {"LH705", "LH706", "LH707", "LH708", "LH799"}
