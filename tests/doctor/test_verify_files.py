"""Names of every format, shards, transposed layers, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from harness.commands.verify import command
from harness.doctor.verify.verify import verify_merge
from harness.errors import LoraFileError, UserError
from harness.files import write_lora
from tests.doctor.merging import (
    QKV,
    Case,
    make,
    rounded_once,
    trained,
    weights,
)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft", "comfyui"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_names_of_every_format_find_their_layers(tmp_path: Path, format: str, prefix: str) -> None:
    case = make(tmp_path)
    merged = case.merged(rounded_once, trained)
    for name in ("base", "merged"):
        path = tmp_path / f"{name}.safetensors"
        from safetensors.torch import load_file

        save_file({prefix + key: value for key, value in load_file(path).items()}, path)
    lora = write_lora(tmp_path / format, format, case.lora)
    assert case.verify(merged, lora.name).ok


def test_language_model_names_that_begin_with_model_match(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = "model.layers.0.self_attn.q_proj"
    case = Case(tmp_path, {f"{name}.weight": torch.randn(64, 64)}, {name: weights(64, 64, 4, 8.0, 1, 1.0)})
    save_file(case.base, tmp_path / "base.safetensors")
    write_lora(tmp_path / "lora", "peft", case.lora)
    assert case.verify(case.merged(rounded_once, trained), "lora").ok


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    case = make(tmp_path)
    merged = case.merged(rounded_once, trained)
    keys = sorted(case.base)
    shards = {"model-1.safetensors": keys[:2], "model-2.safetensors": keys[2:]}
    folder = tmp_path / "sharded"
    folder.mkdir()
    for shard, names in shards.items():
        save_file({name: case.base[name] for name in names}, folder / shard)
    index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert verify_merge(folder, merged, tmp_path / "lora.safetensors").ok
    assert verify_merge(folder / "model.safetensors.index.json", merged, tmp_path / "lora.safetensors").ok


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    case = make(tmp_path)
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../base.safetensors"}}))
    with pytest.raises(LoraFileError, match="outside its folder"):
        verify_merge(index, case.folder / "base.safetensors", case.folder / "lora.safetensors")


def test_a_lora_for_another_model_is_refused_with_both_names(tmp_path: Path) -> None:
    case = make(tmp_path)
    write_lora(tmp_path / "far.safetensors", "diffsynth", {"encoder.q": case.lora[QKV]})
    with pytest.raises(UserError, match=r"encoder\.q.*is the model that the LoRA was trained on|encoder\.q"):
        case.verify(case.merged(rounded_once, trained), "far.safetensors")


def test_embeddings_and_transposed_layers_are_turned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lora = {"h.c_attn": weights(192, 64, 4, 8.0, 1, 0.1)}
    base = {"h.c_attn.weight": (torch.randn(64, 192) * 0.02).bfloat16()}
    save_file(base, tmp_path / "base.safetensors")
    write_lora(tmp_path / "lora.safetensors", "diffsynth", lora)
    turned = lambda base, product, scale: rounded_once(base, product.t(), scale)  # noqa: E731
    case = Case(tmp_path, base, lora)
    for full in (False, True):
        assert case.verify(case.merged(turned, trained), full=full).ok


def test_the_command_exits_with_its_verdict_and_prints_json_lines(tmp_path: Path) -> None:
    case = make(tmp_path)
    merged = case.merged(rounded_once, lambda w: w.alpha or 0.0)
    arguments = [
        "--base",
        str(tmp_path / "base.safetensors"),
        "--merged",
        str(merged),
        "--lora",
        str(tmp_path / "lora.safetensors"),
    ]
    plain = CliRunner().invoke(command, arguments)
    assert plain.exit_code == 1
    assert plain.output.startswith("LH201 alpha not divided by rank")
    lines = [json.loads(line) for line in CliRunner().invoke(command, [*arguments, "--json"]).output.splitlines()]
    assert [line["kind"] for line in lines] == ["header", "verdict", "verdict", "verdict", "footer"]
    assert lines[-1]["exit_code"] == 1
    assert lines[-2]["worst_module"] is None


def test_a_merge_of_which_nothing_can_be_measured_is_no_pass(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.ones(8, 8)}, tmp_path / "base.safetensors")
    save_file({"lora_unet_layer.oft_blocks": torch.ones(2, 4, 4)}, tmp_path / "lora.safetensors")
    paths = [tmp_path / name for name in ("base.safetensors", "base.safetensors", "lora.safetensors")]
    report = verify_merge(*paths)
    assert (report.ok, report.exit_code, report.overall.outcome) == (False, 3, "skipped")
    assert report.overall.title.startswith("0 of 1 right, 1 NOT JUDGED: layer")
    assert "not judged  unsupported: OFT / BOFT is not read" in report.overall.text()
    assert verify_merge(*paths, allow_unjudged=("unsupported",)).exit_code == 0
