"""Names in a file and names in a model."""

from __future__ import annotations

from pathlib import Path

import torch

from fixtures.build_malformed import floats, tensors_file
from harness.files import LoraWeights, flattened_collisions, match_modules, read_lora, write_lora


def written(path: Path, format: str, *names: str, prefix: str | None = None) -> Path:
    modules = {name: LoraWeights(torch.ones(2, 3), torch.ones(4, 2), 1.0) for name in names}
    return write_lora(path, format, modules, prefix=prefix)


def test_flattened_names_find_the_modules_of_the_model(tmp_path: Path) -> None:
    adapter = read_lora(written(tmp_path / "x", "kohya", "blocks.0.to_q", "blocks.0.mlp.net_2", "gone"))
    found, unmatched = match_modules(adapter, ["blocks.0.to_q", "blocks.0.mlp.net_2", "blocks.0.to_k"])
    assert found == {"blocks_0_to_q": "blocks.0.to_q", "blocks_0_mlp_net_2": "blocks.0.mlp.net_2"}
    assert unmatched == ("gone",)


def test_a_flattened_name_that_two_modules_share_is_left_unmatched(tmp_path: Path) -> None:
    adapter = read_lora(written(tmp_path / "x", "kohya", "net.0_1", "other"))
    model = ["net.0_1", "net.0.1", "other"]
    assert match_modules(adapter, model) == ({"other": "other"}, ("net_0_1",))
    assert flattened_collisions(model) == {"net_0_1": ("net.0_1", "net.0.1")}


def test_dotted_names_are_matched_as_they_are(tmp_path: Path) -> None:
    adapter = read_lora(written(tmp_path / "x", "diffusers", "a.to_q", "to_k"))
    assert match_modules(adapter, ["a.to_q", "a.to_k"]) == ({"a.to_q": "a.to_q"}, ("to_k",))


def test_two_text_encoders_are_matched_one_at_a_time(tmp_path: Path) -> None:
    entries = {
        f"{prefix}_layers_0.lora_{half}.weight": floats(*shape)
        for prefix in ("lora_te1", "lora_te2")
        for half, shape in (("down", (2, 3)), ("up", (4, 2)))
    }
    (tmp_path / "x.safetensors").write_bytes(tensors_file(entries))
    adapter = read_lora(tmp_path / "x.safetensors")
    assert match_modules(adapter, ["layers.0"]) == ({}, ("layers_0", "te2:layers_0"))
    assert match_modules(adapter, ["layers.0"], component="te2") == ({"te2:layers_0": "layers.0"}, ())
