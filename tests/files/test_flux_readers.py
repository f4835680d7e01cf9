"""What we write of FLUX's formats does in diffusers what the file says: its own converters, at their own block counts.

Its converters are plain functions of a dict, with FLUX's block counts (and for single blocks its width) written in, so
the tests keep every name and make the layers thin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as converters
from safetensors.torch import load_file

from harness.files import LoraParts, LoraWeights, read_lora, write_lora
from tests.files.stacked import fused_heights, split_blocks, stack_blocks

Tensors = dict[str, torch.Tensor]
WIDTH = 6
TO = {"img_attn": ("to_q", "to_k", "to_v"), "txt_attn": ("add_q_proj", "add_k_proj", "add_v_proj")}


def weights(rows: int, rank: int = 3, alpha: float | None = None, inputs: int = 4) -> LoraWeights:
    return LoraWeights(torch.randn(rank, inputs), torch.randn(rows, rank), alpha)


def delta(converted: Tensors, name: str) -> torch.Tensor:
    a, b = (converted[f"transformer.{name}.lora_{half}.weight"] for half in "AB")
    return b.double() @ a.double()


def trained(path: Path, name: str) -> torch.Tensor:
    adapter = read_lora(path)
    a, b = adapter.tensors(name)
    return adapter.modules[name].trained_scale * (b.double() @ a.double())


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-6


def converted(converter: Callable[[Any], Any], path: Path) -> Tensors:
    found: Tensors = converter(load_file(path))
    return found


def together(found: Tensors, block: str, names: tuple[str, ...]) -> torch.Tensor:
    return torch.cat([delta(found, f"{block}.attn.{name}") for name in names])


@pytest.mark.parametrize("alpha", [None, 3.0, 1.5, 12.0])
@pytest.mark.parametrize("stream", ["img_attn", "txt_attn"])
def test_kohya_flux_merged_layers_are_split_with_alpha_over_rank(tmp_path: Path, alpha: float, stream: str) -> None:
    name = f"double_blocks.2.{stream}.qkv"
    path = write_lora(tmp_path / "x", "kohya", {name: weights(3 * WIDTH, 4, alpha)})
    found = converted(converters._convert_kohya_flux_lora_to_diffusers, path)
    assert read_lora(path).dialect == "flux"
    assert_same(together(found, "transformer_blocks.2", TO[stream]), trained(path, name.replace(".", "_")))


def test_kohya_flux_single_blocks_are_split_four_ways(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x", "kohya", {"single_blocks.7.linear1": weights(7 * 3072, 2, 5.0)})
    found = converted(converters._convert_kohya_flux_lora_to_diffusers, path)
    block = "single_transformer_blocks.7"
    parts = torch.cat([together(found, block, TO["img_attn"]), delta(found, f"{block}.proj_mlp")])
    assert_same(parts, trained(path, "single_blocks_7_linear1"))


def test_split_qkv_is_recognised_as_diffusers_recognises_it(tmp_path: Path) -> None:
    parts = [(torch.randn(2, 4), torch.randn(WIDTH, 2)) for _ in range(3)]
    a, b = stack_blocks(parts)
    path = write_lora(tmp_path / "x", "kohya", {"double_blocks.0.img_attn.qkv": LoraWeights(a, b, 6.0)})
    found = converted(converters._convert_kohya_flux_lora_to_diffusers, path)
    adapter = read_lora(path)
    (module,) = adapter.modules.values()
    split = split_blocks(*adapter.tensors(module.name), fused_heights(module.name, module.out_features) or ())
    assert split is not None
    for name, (down, up) in zip(TO["img_attn"], split, strict=True):
        stem = f"transformer.transformer_blocks.0.attn.{name}"
        assert found[f"{stem}.lora_A.weight"].shape == down.shape
        assert_same(delta(found, f"transformer_blocks.0.attn.{name}"), 6.0 / 6 * (up.double() @ down.double()))


def test_onetrainer_keys_are_the_diffusers_names_flattened(tmp_path: Path) -> None:
    name = "transformer_blocks.1.attn.to_out.0"
    path = write_lora(tmp_path / "x", "kohya", {name: weights(5, 4, 6.0)}, prefix="lora_transformer_")
    found = converted(converters._convert_kohya_flux_lora_to_diffusers, path)
    assert read_lora(path).dialect == "onetrainer"
    assert_same(delta(found, name), trained(path, name.replace(".", "_")))


def test_xlabs_processors_are_the_layers_we_say(tmp_path: Path) -> None:
    modules = {
        "double_blocks.3.img_attn.qkv": weights(3 * WIDTH), "double_blocks.3.txt_attn.qkv": weights(3 * WIDTH),
        "double_blocks.3.img_attn.proj": weights(WIDTH), "double_blocks.3.txt_attn.proj": weights(WIDTH),
        "single_blocks.9.linear1": weights(3 * WIDTH), "single_blocks.9.linear2": weights(WIDTH),
    }  # fmt: skip
    path = write_lora(tmp_path / "x", "xlabs", modules)
    found = converted(converters._convert_xlabs_flux_lora_to_diffusers, path)
    double, single = "transformer_blocks.3", "single_transformer_blocks.9"
    for stream, names in TO.items():
        assert_same(together(found, double, names), trained(path, f"double_blocks.3.{stream}.qkv"))
    assert_same(together(found, single, TO["img_attn"]), trained(path, "single_blocks.9.linear1"))
    assert_same(delta(found, f"{double}.attn.to_out.0"), trained(path, "double_blocks.3.img_attn.proj"))
    assert_same(delta(found, f"{double}.attn.to_add_out"), trained(path, "double_blocks.3.txt_attn.proj"))
    assert_same(delta(found, f"{single}.proj_out"), trained(path, "single_blocks.9.linear2"))
    assert len(found) == 2 * 12


def bfl_layers(*, control: bool) -> Mapping[str, int]:
    """Return every layer of FLUX in the names of the original model, with its rows; single blocks have true width."""
    names = {f"{part}.{layer}": 2 for part in ("time_in", "vector_in") for layer in ("in_layer", "out_layer")}
    names |= {f"guidance_in.{layer}": 2 for layer in ("in_layer", "out_layer")} if control else {}
    names |= {"txt_in": 2, "img_in": 2, "final_layer.linear": 2}
    names |= {"final_layer.adaLN_modulation.1": 2} if control else {}
    for i in range(19):
        for stream in ("img", "txt"):
            names |= {f"double_blocks.{i}.{stream}_{layer}": 3 for layer in ("mod.lin", "attn.qkv", "mlp.0", "mlp.2")}
            names[f"double_blocks.{i}.{stream}_attn.proj"] = 2
    for i in range(38):
        names |= {f"single_blocks.{i}.modulation.lin": 2, f"single_blocks.{i}.linear1": 7 * 3072}
        names[f"single_blocks.{i}.linear2"] = 2
    return names


def test_control_loras_keep_biases_and_replaced_norms(tmp_path: Path) -> None:
    modules: dict[str, LoraWeights | LoraParts] = {}
    for name, rows in bfl_layers(control=True).items():
        modules[name] = LoraParts({"A": torch.randn(2, 1), "B": torch.randn(rows, 2), "bias": torch.randn(rows)})
    norms = {f"double_blocks.{i}.{stream}_attn.norm" for i in range(19) for stream in ("img", "txt")}
    norms |= {f"single_blocks.{i}.norm" for i in range(38)}
    modules |= {name: LoraParts({"query_norm": torch.randn(2), "key_norm": torch.randn(2)}) for name in norms}
    path = write_lora(tmp_path / "x", "bfl-control", modules)
    found = converted(converters._convert_bfl_flux_control_lora_to_diffusers, path)
    adapter = read_lora(path)
    assert (adapter.format, len(adapter.modules)) == ("bfl-control", len(modules))
    assert_same(together(found, "transformer_blocks.4", TO["txt_attn"]), trained(path, "double_blocks.4.txt_attn.qkv"))
    assert_same(delta(found, "x_embedder"), trained(path, "img_in"))
    bias = found["transformer.x_embedder.lora_B.bias"]
    assert torch.equal(bias, adapter.part("img_in", "bias"))
    scale = found["transformer.single_transformer_blocks.8.attn.norm_k.weight"]
    assert torch.equal(scale, adapter.part("single_blocks.8.norm", "key_norm"))


def test_fal_kontext_files_are_peft_files_without_alpha(tmp_path: Path) -> None:
    layers = {name: weights(rows, 1, 1.0, 1) for name, rows in bfl_layers(control=False).items()}
    layers = {name: pair for name, pair in layers.items() if name not in ("img_in", "txt_in")}
    layers = {name: pair for name, pair in layers.items() if not name.startswith(("time_in", "vector_in"))}
    folder = write_lora(tmp_path / "x", "peft", layers)
    path = (folder / "adapter_model.safetensors").rename(tmp_path / "pytorch_lora_weights.safetensors")
    found = converted(converters._convert_fal_kontext_lora_to_diffusers, path)
    adapter = read_lora(path)
    assert (adapter.format, adapter.dialect, adapter.alpha_source) == ("peft", "bfl", "none")
    name = "double_blocks.18.img_attn.qkv"
    assert_same(together(found, "transformer_blocks.18", TO["img_attn"]), trained(path, name))
    assert_same(delta(found, "proj_out"), trained(path, "final_layer.linear"))
