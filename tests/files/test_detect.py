"""The format is told from all keys, never from the first."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from fixtures.build_malformed import dotted, floats, tensors_file
from harness.errors import LoraFileError
from harness.files import FORMATS, LoraWeights, detect_format, read_lora, write_lora

Entries = dict[str, tuple[str, list[int], bytes]]


def saved(path: Path, entries: Entries, metadata: dict[str, object] | None = None) -> Path:
    path.write_bytes(tensors_file(entries, metadata))
    return path


def flat(stem: str, down: str = "lora_down", up: str = "lora_up") -> Entries:
    return {f"{stem}.{down}.weight": floats(2, 4), f"{stem}.{up}.weight": floats(3, 2)}


@pytest.mark.parametrize(
    ("entries", "format", "names"),
    [
        (flat("lora_unet_x_0_to_q"), "kohya", ["x_0_to_q"]),
        (flat("lora_unet__x_0"), "kohya", ["x_0"]),
        (flat("lora_te1_text_model_x") | flat("lora_te2_text_model_x"), "kohya", ["text_model_x", "te2:text_model_x"]),
        (flat("lora_unet_x") | flat("lora_te_y"), "kohya", ["x", "te:y"]),
        (flat("lora_transformer_x"), "kohya", ["x"]),
        (flat("lora_transformer_h_0_attn_c_attn"), "kohya", ["transformer_h_0_attn_c_attn"]),
        (flat("lora_transformer_blocks_0_ffn_up_proj"), "kohya", ["transformer_blocks_0_ffn_up_proj"]),
        (flat("lora_transformer_blocks_0_attn1_to_q"), "kohya", ["blocks_0_attn1_to_q"]),
        (flat("lycoris_x"), "kohya", ["x"]),
        (dotted("base_model.model.x"), "peft", ["x"]),
        (dotted("base_model.model.transformer.h.0"), "peft", ["transformer.h.0"]),
        (dotted("diffusion_model.x.0"), "comfyui", ["x.0"]),
        (flat("diffusion_model.x.0"), "comfyui", ["x.0"]),
        (dotted("transformer.x.0"), "diffusers", ["x.0"]),
        (flat("unet.x", "lora.down", "lora.up"), "diffusers", ["x"]),
        (flat("transformer.x"), "diffusers", ["x"]),
        (flat("text_encoder.x", "lora_linear_layer.down", "lora_linear_layer.up"), "diffusers", ["x"]),
        (dotted("text_encoder.x") | dotted("text_encoder_2.x"), "diffusers", ["x", "text_encoder_2:x"]),
        (flat("blocks.0.to_q", "lora_A.default", "lora_B.default"), "diffsynth", ["blocks.0.to_q"]),
        (dotted("blocks.0.to_q"), "diffsynth", ["blocks.0.to_q"]),
    ],
)
def test_the_keys_of_each_trainer_are_told_apart(
    tmp_path: Path, entries: Entries, format: str, names: list[str]
) -> None:
    adapter = read_lora(saved(tmp_path / "x.safetensors", entries))
    assert (adapter.format, list(adapter.modules)) == (format, names)
    assert not adapter.unused_keys


def test_bare_names_with_a_configuration_in_the_header_are_what_diffusers_models_save(tmp_path: Path) -> None:
    metadata: dict[str, object] = {"lora_adapter_metadata": '{"r": 2, "lora_alpha": 5}'}
    adapter = read_lora(saved(tmp_path / "x.safetensors", dotted("blocks.0"), metadata))
    assert (adapter.format, adapter.alpha_source, adapter.modules["blocks.0"].alpha) == ("diffusers", "header", 5.0)
    assert adapter.config == {"r": 2, "lora_alpha": 5}


def test_the_path_of_the_weights_inside_a_peft_folder_finds_the_configuration(tmp_path: Path) -> None:
    modules = {"x": LoraWeights(torch.ones(2, 3), torch.ones(4, 2), 7.0)}
    folder = write_lora(tmp_path / "x", "peft", modules)
    adapter = read_lora(folder / "adapter_model.safetensors")
    assert (adapter.path, adapter.alpha_source, adapter.modules["x"].alpha) == (folder, "config", 7.0)


def test_a_peft_file_parted_from_its_configuration_has_lost_alpha(tmp_path: Path) -> None:
    modules = {"x": LoraWeights(torch.ones(2, 3), torch.ones(4, 2), 7.0)}
    folder = write_lora(tmp_path / "x", "peft", modules)
    (folder / "adapter_config.json").unlink()
    adapter = read_lora(folder)
    assert (adapter.format, adapter.alpha_source, adapter.modules["x"].alpha) == ("peft", "none", None)


def test_a_folder_with_one_file_of_another_format_is_read(tmp_path: Path) -> None:
    saved(tmp_path / "pytorch_lora_weights.safetensors", dotted("transformer.x"))
    assert detect_format(tmp_path) == "diffusers"
    saved(tmp_path / "other.safetensors", dotted("transformer.x"))
    with pytest.raises(LoraFileError, match="2 safetensors files"):
        read_lora(tmp_path)


@pytest.mark.parametrize("format", sorted(name for name, row in FORMATS.items() if row.general))
def test_one_foreign_key_anywhere_is_noticed(tmp_path: Path, format: str) -> None:
    foreign = dotted("transformer.y") if format == "kohya" else flat("lora_unet_y")
    names = [f"blocks.{i}.x" for i in range(5)]
    modules = {name: LoraWeights(torch.ones(2, 4), torch.ones(3, 2), 1.0) for name in names}
    path = write_lora(tmp_path / "x", format, modules)
    own = read_lora(path).file
    entries = {key: (info.dtype, list(info.shape), bytes(info.end - info.start)) for key, info in own.tensors.items()}
    for seed in range(4):
        mixed = list((entries | foreign).items())
        random.Random(seed).shuffle(mixed)
        with pytest.raises(LoraFileError, match="mixes the key formats"):
            detect_format(saved(own.path, dict(mixed), dict(own.metadata)))


def test_a_header_configuration_is_taken_per_component(tmp_path: Path) -> None:
    text = '{"transformer.r": 2, "transformer.lora_alpha": 6, "text_encoder.lora_alpha": 1, "text_encoder.r": 2}'
    entries = dotted("transformer.x") | dotted("text_encoder.x") | dotted("unet.x")
    adapter = read_lora(saved(tmp_path / "x.safetensors", entries, {"lora_adapter_metadata": text}))
    assert {name: m.alpha for name, m in adapter.modules.items()} == {"x": 6.0, "text_encoder:x": 1.0, "unet:x": None}


def test_an_unknown_format_argument_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format='nosuch' is unknown, known are peft, kohya"):
        read_lora(tmp_path, format="nosuch")


def test_the_format_can_be_forced(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", dotted("transformer.h.0"))
    assert list(read_lora(path).modules) == ["h.0"]
    assert list(read_lora(path, format="diffsynth").modules) == ["transformer.h.0"]
    with pytest.raises(LoraFileError, match="no module in the format kohya"):
        read_lora(path, format="kohya")
