"""The formats that name only some modules, keep one number for the file, or have no alpha: written, then read back."""

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

from harness.errors import LoraFileError
from harness.files import LoraParts, LoraWeights, detect_format, read_lora, write_lora

BLOCKS = st.integers(0, 40)
DOUBLE = st.sampled_from(["img_attn.qkv", "txt_attn.qkv", "img_attn.proj", "txt_attn.proj"])
XLABS = st.one_of(
    st.builds("double_blocks.{}.{}".format, BLOCKS, DOUBLE),
    st.builds("single_blocks.{}.{}".format, BLOCKS, st.sampled_from(["linear1", "linear2"])),
)
LAYERS = st.sampled_from(["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj"])
PROCESSORS = st.builds(
    "mid_block.attentions.{}.transformer_blocks.0.attn{}.{}".format, BLOCKS, st.integers(1, 2), LAYERS
)
LLAMA = st.builds("blk.{}.{}".format, BLOCKS, st.sampled_from(["attn_q", "ffn_gate", "attn_output"]))
MLX = st.builds("model.layers.{}.{}".format, BLOCKS, st.sampled_from(["self_attn.q_proj", "mlp.up_proj"]))
NAMES = {"xlabs": XLABS, "attn-procs": PROCESSORS, "gguf": LLAMA, "mlx": MLX}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
ONE_NUMBER = ("gguf", "mlx")


@st.composite
def loras(draw: st.DrawFn, format: str) -> dict[str, LoraWeights]:
    names = draw(st.lists(NAMES[format], min_size=1, max_size=5, unique=True))
    dtype, rank = draw(DTYPES), draw(st.integers(1, 9))
    alpha = draw(st.floats(0.125, 900, width=32)) if format in ONE_NUMBER else None
    if format == "gguf" and draw(st.booleans()):
        alpha = None
    modules = {}
    for name in names:
        own = rank if format in ONE_NUMBER else draw(st.integers(1, 9))
        inputs, outputs = draw(st.integers(1, 7)), draw(st.integers(1, 7))
        modules[name] = LoraWeights(torch.randn(own, inputs).to(dtype), torch.randn(outputs, own).to(dtype), alpha)
    return modules


@pytest.mark.parametrize("format", sorted(NAMES))
@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.none() | st.integers(0, 99), rslora=st.booleans())
def test_a_written_file_reads_back_the_same(format: str, data: st.DataObject, seed: int | None, rslora: bool) -> None:
    modules = data.draw(loras(format))
    order = None if seed is None else random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = write_lora(Path(folder) / "x", format, modules, rslora=rslora, key_order=order)
        adapter = read_lora(path)
        assert (adapter.format, detect_format(path), adapter.path) == (format, format, path)
        assert (adapter.problems, adapter.unused_keys) == ((), ())
        assert set(adapter.modules) == set(modules)
        for name, weights in modules.items():
            module = adapter.modules[name]
            a, b = adapter.tensors(name)
            assert torch.equal(a, weights.a)
            assert torch.equal(b, weights.b)
            assert (module.rank, module.in_features, module.out_features) == (*a.shape, b.shape[0])
            root = math.sqrt(module.rank) if rslora else module.rank
            trained = 1.0 if weights.alpha is None else weights.alpha / root
            assert math.isclose(module.trained_scale, trained, rel_tol=1e-6)


PARTS = {
    "loha": {f"hada_w{i}_{half}": s for i in "12" for half, s in (("a", (4, 2)), ("b", (2, 3)))},
    "lokr": {"lokr_w1": (2, 1), "lokr_w2_a": (2, 2), "lokr_w2_b": (2, 3)},
    "tucker": {"A": (2, 3, 1, 1), "B": (4, 2, 1, 1), "mid": (2, 2, 3, 3)},
    "dora": {"A": (2, 3), "B": (4, 2), "magnitude": (1, 3)},
    "lora_diff": {"A": (2, 3), "B": (4, 2), "diff_b": (4,)},
    "diff": {"diff": (4, 3)},
    "norm": {"w_norm": (4,), "b_norm": (4,)},
}


@pytest.mark.parametrize("format", ["kohya", "comfyui"])
@pytest.mark.parametrize("variant", sorted(PARTS))
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_the_parts_of_a_variant_read_back_by_role(tmp_path: Path, format: str, variant: str, seed: int | None) -> None:
    parts = {role: torch.randn(shape) for role, shape in PARTS[variant].items()}
    order = None if seed is None else random.Random(seed)
    modules = {"a.b": LoraParts(parts, 3.0), "c": LoraWeights(torch.ones(2, 3), torch.ones(4, 2), 5.0)}
    adapter = read_lora(write_lora(tmp_path / "x", format, modules, key_order=order))
    name = "a_b" if adapter.flattened else "a.b"
    module = adapter.modules[name]
    assert (adapter.format, module.variant, module.in_features % 3, module.out_features) == (format, variant, 0, 4)
    assert module.alpha == 3.0
    assert {role for role in module.keys if role != "alpha"} == set(parts)
    assert all(torch.equal(adapter.part(name, role), tensor) for role, tensor in parts.items())


def test_a_control_lora_is_written_with_its_biases_and_replaced_norms(tmp_path: Path) -> None:
    modules = {
        "img_in": LoraParts({"A": torch.randn(2, 8), "B": torch.randn(4, 2), "bias": torch.randn(4)}),
        "double_blocks.0.img_attn.norm": LoraParts({"query_norm": torch.randn(4), "key_norm": torch.randn(4)}),
    }
    adapter = read_lora(write_lora(tmp_path / "x", "bfl-control", modules))
    assert (adapter.format, adapter.alpha_source) == ("bfl-control", "none")
    assert [module.variant for module in adapter.modules.values()] == ["norm", "lora_bias"]
    assert "double_blocks.0.img_attn.norm.query_norm.scale" in adapter.file.keys
    assert all(
        torch.equal(adapter.part(name, role), tensor)
        for name, weights in modules.items()
        for role, tensor in weights.parts.items()
    )


@pytest.mark.parametrize(
    ("format", "modules", "message"),
    [
        ("xlabs", {"transformer_blocks.0.attn.to_q": (2, None)}, "no such module, only double_blocks"),
        ("xlabs", {"single_blocks.0.img_attn.qkv": (2, None)}, "no such module"),
        ("attn-procs", {"a.to_out": (2, None)}, "no such module, only <module>.to_q"),
        ("xlabs", {"double_blocks.0.img_attn.qkv": (2, 2.0)}, "no place for alpha: multiply B by alpha / rank"),
        ("bfl-control", {"img_in": (2, 2.0)}, "no place for alpha"),
        ("mlx", {"a": (2, None)}, "always has a scale"),
        ("mlx", {"a": (2, 4.0), "b": (3, 4.0)}, "rank is 2 and 3: a mlx file has one rank"),
        ("mlx", {"a": (2, 4.0), "b": (2, 5.0)}, "alpha is 4.0 and 5.0: a mlx file has one alpha"),
        ("gguf", {"a": (2, 4.0), "b": (2, None)}, "alpha is 4.0 and None: a gguf file has one alpha"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    tmp_path: Path, format: str, modules: dict[str, tuple[int, float | None]], message: str
) -> None:
    weights = {name: LoraWeights(torch.ones(r, 3), torch.ones(4, r), alpha) for name, (r, alpha) in modules.items()}
    with pytest.raises(ValueError, match=message):
        write_lora(tmp_path / "x", format, weights)
    assert not list(tmp_path.iterdir())


def test_parts_of_a_variant_are_refused_where_nothing_can_say_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parts of a variant are not written to diffusers"):
        write_lora(tmp_path / "x", "diffusers", {"a": LoraParts({"lokr_w1": torch.ones(2, 2)}, 1.0)})
    with pytest.raises(ValueError, match="PEFT has no configuration for parts lokr_w1"):
        write_lora(tmp_path / "x", "peft", {"a": LoraParts({"lokr_w1": torch.ones(2, 2)}, 1.0)})


@pytest.mark.parametrize("variant", ["dora", "loha", "lokr"])
def test_rslora_of_a_variant_is_written_or_refused_and_never_dropped(tmp_path: Path, variant: str) -> None:
    modules = {"a": LoraParts({role: torch.ones(shape) for role, shape in PARTS[variant].items()}, 6.0)}
    if variant == "dora":
        module = read_lora(write_lora(tmp_path / "x", "peft", modules, rslora=True)).modules["a"]
        assert (module.rslora, module.trained_scale) == (True, 6.0 / math.sqrt(2))
        return
    with pytest.raises(ValueError, match=f"rslora=True is not written for {variant.upper()}"):
        write_lora(tmp_path / "x", "peft", modules, rslora=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_parameters": {"rank": 2, "alpha": 16}}, "scale: is None, a number is needed"),
        ({"lora_parameters": {"rank": 2, "scale": "20"}}, "is '20', a number is needed"),
        ({"lora_parameters": []}, "is None, a number is needed"),
        ({"lora_parameters": {"rank": 4, "scale": 20.0}}, "the configuration says rank 4, the tensors have rank 2"),
        ({"lora_parameters": {"rank": 2, "scale": float("nan")}}, "alpha is nan"),
    ],
)
def test_a_bad_mlx_configuration_is_one_sentence(tmp_path: Path, config: dict[str, object], message: str) -> None:
    folder = write_lora(tmp_path / "x", "mlx", {"a": LoraWeights(torch.ones(2, 3), torch.ones(4, 2), 4.0)})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(LoraFileError, match=message):
        read_lora(folder)


def test_mlx_weights_without_their_configuration_have_lost_the_scale(tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "x", "mlx", {"a": LoraWeights(torch.ones(2, 3), torch.ones(4, 2), 4.0)})
    (folder / "adapter_config.json").unlink()
    adapter = read_lora(folder)
    assert (adapter.format, adapter.alpha_source, adapter.modules["a"].alpha) == ("mlx", "none", None)
