"""What is written is read back: names, ranks, alphas, tensors, whatever the format and the order of the keys."""

from __future__ import annotations

import json
import math
import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.files import FORMATS, LoraWeights, detect_format, match_modules, read_lora, write_lora

ALPHAS = st.one_of(st.floats(-1000, 1000, width=32), st.integers(0, 128).map(float))
PARTS = st.sampled_from(["blocks", "attn", "to_q", "add_to_q", "mlp", "0", "1", "10", "net", "to_q_0"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
GENERAL = sorted(name for name, row in FORMATS.items() if row.general)
FORMAT_NAMES = st.sampled_from(GENERAL)


@st.composite
def loras(draw: st.DrawFn, *, alpha: bool | None = None) -> dict[str, LoraWeights]:
    """Modules whose flattened names are distinct, with or without alpha."""
    names = draw(st.lists(NAMES, min_size=1, max_size=5, unique_by=lambda name: name.replace(".", "_")))
    alpha = draw(st.booleans()) if alpha is None else alpha
    dtype = draw(DTYPES)
    modules = {}
    for name in names:
        rank, inputs, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 7)), draw(st.integers(1, 7))
        a, b = torch.randn(rank, inputs).to(dtype), torch.randn(outputs, rank).to(dtype)
        modules[name] = LoraWeights(a, b, draw(ALPHAS) if alpha else None)
    return modules


@settings(max_examples=150, deadline=None)
@given(modules=loras(), format=FORMAT_NAMES, seed=st.none() | st.integers(0, 99), rslora=st.booleans())
def test_a_written_file_reads_back_the_same(
    modules: dict[str, LoraWeights], format: str, seed: int | None, rslora: bool
) -> None:
    has_alpha = all(weights.alpha is not None for weights in modules.values())
    order = None if seed is None else random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        if format == "peft" and not has_alpha:
            with pytest.raises(ValueError, match="always has an alpha"):
                write_lora(Path(folder) / "x", format, modules)
            return
        path = write_lora(Path(folder) / "x", format, modules, rslora=rslora, key_order=order)
        adapter = read_lora(path)
        assert (adapter.format, detect_format(path), adapter.path) == (format, format, path)
        assert not adapter.problems
        assert not adapter.unused_keys
        matched, unmatched = match_modules(adapter, modules)
        assert sorted(matched.values()) == sorted(modules)
        assert not unmatched
        for name, model_name in matched.items():
            weights, module = modules[model_name], adapter.modules[name]
            a, b = adapter.tensors(name)
            assert torch.equal(a, weights.a)
            assert torch.equal(b, weights.b)
            assert (module.rank, module.in_features, module.out_features) == (a.shape[0], a.shape[1], b.shape[0])
            assert (module.alpha is None) == (weights.alpha is None)
            if weights.alpha is not None:
                trained = weights.alpha / (math.sqrt(module.rank) if rslora else module.rank)
                assert math.isclose(module.trained_scale, trained, rel_tol=1e-6, abs_tol=1e-40)
            else:
                assert module.trained_scale == 1.0


@settings(max_examples=60, deadline=None)
@given(modules=loras(alpha=True), format=FORMAT_NAMES, data=st.data())
def test_the_data_lies_in_the_order_that_was_asked_for(
    modules: dict[str, LoraWeights], format: str, data: st.DataObject
) -> None:
    modules = {name: LoraWeights(w.a.float(), w.b.float(), w.alpha) for name, w in modules.items()}
    with tempfile.TemporaryDirectory() as folder:
        plain = read_lora(write_lora(Path(folder) / "plain", format, modules))
        order = data.draw(st.permutations(range(len(plain.file.keys))))
        mixed = read_lora(write_lora(Path(folder) / "mixed", format, modules, key_order=order))
        assert sorted(mixed.file.keys) == list(plain.file.keys)
        assert mixed.modules == plain.modules
        again = read_lora(write_lora(Path(folder) / "again", format, modules, key_order=order))
        assert again.file.keys == mixed.file.keys


def test_the_formats_that_hold_any_lora_are_these() -> None:
    assert GENERAL == ["comfyui", "diffsynth", "diffusers", "kohya", "peft"]


def test_a_key_order_that_is_no_permutation_is_refused(tmp_path: Path) -> None:
    modules = {"x": LoraWeights(torch.ones(2, 3), torch.ones(4, 2), 1.0)}
    with pytest.raises(ValueError, match=r"key_order=\[0, 0, 1\] is no permutation of the 3 keys"):
        write_lora(tmp_path / "x", "kohya", modules, key_order=[0, 0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "nosuch"}, "format='nosuch' is unknown"),
        ({"modules": {}}, "modules is empty"),
        ({"pair": "lora.down"}, "pair='lora.down' is not written by kohya"),
        ({"modules": {"a.b": (2, 2), "a_b": (2, 2)}}, "flattens to 'lora_unet_a_b' too"),
        ({"modules": {"x": (2, 3)}}, r"no pair \[r, in\], \[out, r\]"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is not written"),
    ],
)
def test_what_cannot_be_written_is_refused_with_the_argument(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    ranks = arguments.pop("modules", {"x": (2, 2)})
    assert isinstance(ranks, dict)
    modules = {name: LoraWeights(torch.ones(r, 3), torch.ones(4, s), 1.0) for name, (r, s) in ranks.items()}
    with pytest.raises(ValueError, match=message):
        write_lora(tmp_path / "x", **{"format": "kohya", "modules": modules, **arguments})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_diffusers_gives_modules_without_alpha_the_neutral_one_when_others_have_it(tmp_path: Path) -> None:
    modules = {
        "x": LoraWeights(torch.ones(4, 3), torch.ones(3, 4), 1.0),
        "y": LoraWeights(torch.ones(2, 3), torch.ones(3, 2), None),
    }
    adapter = read_lora(write_lora(tmp_path / "x", "diffusers", modules))
    assert {name: module.trained_scale for name, module in adapter.modules.items()} == {"x": 0.25, "y": 1.0}


def test_writing_leaves_the_tensors_of_the_caller_alone(tmp_path: Path) -> None:
    shared = torch.ones(3, 3)
    kept = shared.clone()
    write_lora(tmp_path / "x", "kohya", {"x": LoraWeights(shared, shared.t(), 1.0)}, dtype=torch.float16)
    assert torch.equal(shared, kept)
    assert shared.dtype == torch.float32


def test_a_peft_configuration_names_every_module_exactly(tmp_path: Path) -> None:
    ranks = {"0.x": 1, "10.x": 2, "10.0.x": 3, "to_q": 4, "add_to_q": 4, "a.to_q": 5, "aXto_q": 6}
    modules = {name: LoraWeights(torch.ones(r, 3), torch.ones(3, r), r * 10.0) for name, r in ranks.items()}
    path = write_lora(tmp_path / "x", "peft", modules)
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert sorted(config["target_modules"]) == sorted(ranks)
    adapter = read_lora(path)
    assert {name: (module.rank, module.alpha) for name, module in adapter.modules.items()} == {
        name: (rank, rank * 10.0) for name, rank in ranks.items()
    }
