"""Merges of image models as they are shared: one file of several components, or the layers under other names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.doctor.checkpoint import Checkpoint
from harness.doctor.verify.verify import MergeReport, verify_merge
from harness.errors import LoraFileError

Tensors = dict[str, Tensor]
UNET = "model.diffusion_model."
BLOCK = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
TE1, TE2 = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model.transformer."
FIRST = "encoder.layers.0.mlp.fc1"
SDXL = {  # what the LoRA calls a layer -> the layer
    f"lora_unet_{BLOCK.replace('.', '_')}": f"{UNET}{BLOCK}",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": f"{TE1}{FIRST}",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": f"{TE2}resblocks.0.mlp.c_fc",
}
WIDTH = 48


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.02


def sdxl() -> Tensors:
    """A checkpoint of three components, with layers that no LoRA names."""
    torch.manual_seed(0)
    names = [*SDXL.values(), f"{UNET}{BLOCK.replace('to_q', 'to_k')}", *(f"{UNET}out.{n}" for n in (0, 2))]
    return {f"{name}.weight": drawn(WIDTH, WIDTH).half() for name in names}


def pairs(layers: Mapping[str, tuple[int, int]]) -> Tensors:
    found: Tensors = {}
    for name, (rows, columns) in layers.items():
        found |= {f"{name}.lora_down.weight": torch.randn(4, columns), f"{name}.lora_up.weight": drawn(rows, 4)}
        found[f"{name}.alpha"] = torch.tensor(2.0)
    return found


def merged(base: Tensors, lora: Tensors, layers: Mapping[str, str]) -> Tensors:
    found = dict(base)
    for stem, layer in layers.items():
        weight = base[f"{layer}.weight"]
        update = lora[f"{stem}.lora_up.weight"] @ lora[f"{stem}.lora_down.weight"] * 0.5
        found[f"{layer}.weight"] = (weight.float() + update).to(weight.dtype)
    return found


def verified(folder: Path, base: Tensors, after: Tensors, lora: Tensors, *, full: bool = False) -> MergeReport:
    for name, tensors in (("base", base), ("merged", after), ("lora", lora)):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    return verify_merge(*(folder / f"{name}.safetensors" for name in ("base", "merged", "lora")), full=full)


@pytest.fixture
def whole() -> tuple[Tensors, Tensors]:
    return sdxl(), pairs(dict.fromkeys(SDXL, (WIDTH, WIDTH)))


@pytest.mark.parametrize("full", [False, True])
def test_text_encoders_beside_a_denoiser_have_no_part_of_its_prefix(
    whole: tuple[Tensors, Tensors], full: bool, tmp_path: Path
) -> None:
    base, lora = whole
    report = verified(tmp_path, base, merged(base, lora, SDXL), lora, full=full)
    assert (report.exit_code, len(report.modules)) == (0, 3), report.overall.text()


@pytest.mark.parametrize("component", ["lora_te1_", "lora_te2_"])
def test_the_text_encoder_that_was_not_merged_is_named(
    component: str, whole: tuple[Tensors, Tensors], tmp_path: Path
) -> None:
    base, lora = whole
    without = {name: layer for name, layer in SDXL.items() if not name.startswith(component)}
    report = verified(tmp_path, base, merged(base, lora, without), lora)
    assert (report.exit_code, report.overall.code) == (1, "LH102"), report.overall.text()
    assert report.overall.title.startswith("not merged: 1 of 3 modules")


def test_a_component_that_was_added_or_left_out_is_said_and_no_violation(
    whole: tuple[Tensors, Tensors], tmp_path: Path
) -> None:
    base, lora = whole
    vae = {"first_stage_model.decoder.conv_in.weight": drawn(4, 4)}
    report = verified(tmp_path, base, merged(base, lora, SDXL) | vae, lora)
    assert report.exit_code == 0, report.overall.text()
    assert "the component first_stage_model is only in the merged checkpoint" in report.overall.text()
    alone = {name: tensor for name, tensor in merged(base, lora, SDXL).items() if name.startswith(UNET)}
    report = verified(tmp_path, base, alone, lora)
    assert report.exit_code == 3, report.overall.text()
    assert "the component conditioner is not in the merged checkpoint" in report.overall.text()


D, M = 64, 128
HEIGHTS = {"img_attn.qkv": 3 * D, "img_attn.proj": D, "txt_attn.qkv": 3 * D, "img_mlp.0": M}
LINEAR = "single_blocks.0.linear1"
NORMS = {"double_blocks.0.img_attn.norm.query_norm.scale": "transformer_blocks.0.attn.norm_q.weight"}
TABLES = {"double_blocks.0.modulation": "transformer_blocks.0.scale_shift_table"}


def flux() -> Tensors:
    """Layers of FLUX under the authors' names, with their biases and a norm."""
    torch.manual_seed(0)
    found: Tensors = {}
    for name, rows in {**{f"double_blocks.0.{k}": v for k, v in HEIGHTS.items()}, LINEAR: 3 * D + M}.items():
        found |= {f"{name}.weight": drawn(rows, D).bfloat16(), f"{name}.bias": drawn(rows).bfloat16()}
    found |= {name: drawn(1, 6, D).bfloat16() for name in TABLES}
    return found | {name: (1 + drawn(16)).bfloat16() for name in NORMS}


def as_diffusers_has_it(tensors: Tensors) -> Tensors:
    block, single = "transformer_blocks.0.", "single_transformer_blocks.0."
    parts = {
        "double_blocks.0.img_attn.qkv": [f"{block}attn.{name}" for name in ("to_q", "to_k", "to_v")],
        "double_blocks.0.txt_attn.qkv": [f"{block}attn.add_{name}_proj" for name in "qkv"],
        "double_blocks.0.img_attn.proj": [f"{block}attn.to_out.0"],
        "double_blocks.0.img_mlp.0": [f"{block}ff.net.0.proj"],
        LINEAR: [f"{single}attn.to_q", f"{single}attn.to_k", f"{single}attn.to_v", f"{single}proj_mlp"],
    }
    found = {new: tensors[old] for old, new in (NORMS | TABLES).items()}
    for own, names in parts.items():
        for end in (".weight", ".bias"):
            sizes = [D, D, D, M][: len(names)] if len(names) > 1 else [len(tensors[own + end])]
            found |= dict(zip((name + end for name in names), tensors[own + end].split(sizes), strict=True))
    return found


def flux_lora(base: Tensors) -> tuple[Tensors, dict[str, str]]:
    layers = {key.removesuffix(".weight"): tuple(t.shape) for key, t in base.items() if key.endswith(".weight")}
    named = {f"lora_unet_{layer.replace('.', '_')}": layer for layer in layers}
    return pairs({stem: layers[layer] for stem, layer in named.items()}), named  # type: ignore[misc]


@pytest.mark.parametrize("side", ["merged", "base"])
def test_biases_and_norms_follow_their_layers_to_other_names(side: str, tmp_path: Path) -> None:
    base = flux()
    lora, layers = flux_lora(base)
    after = merged(base, lora, layers)
    before, after = (base, as_diffusers_has_it(after)) if side == "merged" else (as_diffusers_has_it(base), after)
    report = verified(tmp_path, before, after, lora)
    assert report.exit_code == 0, report.overall.text()


@pytest.mark.parametrize("name", ["transformer_blocks.0.attn.norm_q.weight", "transformer_blocks.0.attn.to_k.bias"])
def test_what_changed_on_the_way_is_found(name: str, tmp_path: Path) -> None:
    base = flux()
    lora, layers = flux_lora(base)
    after = as_diffusers_has_it(merged(base, lora, layers))
    report = verified(tmp_path, base, after | {name: after[name] + 0.1}, lora)
    assert (report.exit_code, report.overall.code) == (1, "LH902" if "norm" in name else "LH401")


@pytest.mark.parametrize("other", [False, True])
def test_layers_that_no_lora_names_may_be_stored_in_scaled_fp8(other: bool, tmp_path: Path) -> None:
    """A merge saved in scaled fp8 has rounded every layer: one that was changed is still found."""
    base = flux()
    lora, layers = flux_lora({key: tensor for key, tensor in base.items() if not key.startswith("single")})
    after, stored = merged(base, lora, layers), dict[str, Tensor]()
    after[f"{LINEAR}.weight"] = after[f"{LINEAR}.weight"] * (1.3 if other else 1)
    for key, tensor in after.items():
        scale = tensor.abs().max().float() / 448
        stored |= (
            {key: tensor}
            if tensor.dim() != 2
            else {key: (tensor.float() / scale).to(torch.float8_e4m3fn), key.replace(".weight", ".scale_weight"): scale}
        )
    report = verified(tmp_path, base, stored, lora)
    assert report.exit_code == int(other), report.overall.text()


def test_rows_without_a_merge_count_where_the_others_were_rounded_twice(tmp_path: Path) -> None:
    """k of `linear1`, a seventh of its rows, was left out; each other row was rounded in two steps."""
    base = flux()
    lora, layers = flux_lora(base)
    after = merged(base, lora, layers)
    delta = lora[f"lora_unet_{LINEAR.replace('.', '_')}.lora_up.weight"].bfloat16()
    down = lora[f"lora_unet_{LINEAR.replace('.', '_')}.lora_down.weight"].bfloat16()
    after[f"{LINEAR}.weight"] = base[f"{LINEAR}.weight"] + (delta @ down) * 0.5
    after[f"{LINEAR}.weight"][D : 2 * D] = base[f"{LINEAR}.weight"][D : 2 * D]
    report = verified(tmp_path, base, after, lora)
    assert (report.exit_code, report.overall.code) == (1, "LH102"), report.overall.text()


ENCODERS = {"te1": "text_encoder", "te2": "text_encoder_2"}


def pipeline(folder: Path, tensors: Tensors) -> Path:
    """A folder as diffusers saves it: the denoiser, and its text encoders beside."""
    for part in ("unet", *ENCODERS.values()):
        (folder / part).mkdir(parents=True)
        own = {key.removeprefix(f"{part}."): tensor for key, tensor in tensors.items() if key.startswith(f"{part}.")}
        save_file(own, folder / part / "model.safetensors")
    return folder


def whole_pipeline(folder: Path, tensors: Tensors) -> Path:
    """Save components as diffusers does, a text encoder in shards with an index, and list them."""
    parts = sorted({key.partition(".")[0] for key in tensors})
    for part in parts:
        (folder / part).mkdir(parents=True)
        own = {key.removeprefix(f"{part}."): tensor for key, tensor in tensors.items() if key.startswith(f"{part}.")}
        if part != "text_encoder":
            save_file(own, folder / part / "model.safetensors")
            continue
        where = {key: f"model-0000{number}-of-00002.safetensors" for number, key in enumerate(own, 1)}
        for key, name in where.items():
            save_file({key: own[key]}, folder / part / name)
        index = json.dumps({"metadata": {}, "weight_map": where})
        (folder / part / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    listed = {part: ["diffusers", "AutoencoderKL"] for part in parts} | {"scheduler": ["diffusers", "DDIMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(listed), encoding="utf-8")
    return folder


PARTS = ("vae.decoder.conv_in", "text_encoder.a", "text_encoder.b", "image_encoder.fc1", "unet_2.mid_block.proj_in")


@pytest.mark.parametrize("spoiled", ["", *PARTS])
def test_every_component_of_a_pipeline_is_compared(spoiled: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    name, layer = "lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"
    base = {f"{each}.weight": drawn(WIDTH, WIDTH) for each in (layer, *PARTS)}
    lora = pairs({name: (WIDTH, WIDTH)})
    save_file(lora, tmp_path / "lora.safetensors")
    done = merged(base, lora, {name: layer})
    done |= {f"{spoiled}.weight": done[f"{spoiled}.weight"] * 1.3} if spoiled else {}
    before, after = whole_pipeline(tmp_path / "base", base), whole_pipeline(tmp_path / "merged", done)
    report = verify_merge(before, after, tmp_path / "lora.safetensors")
    assert (report.exit_code, report.overall.code) == ((1, "LH401") if spoiled else (0, None)), report.overall.text()
    assert spoiled in report.overall.text()


def test_a_component_that_a_pipeline_lists_must_be_there(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name, layer = "lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"
    base = {f"{each}.weight": drawn(WIDTH, WIDTH) for each in (layer, *PARTS)}
    lora = pairs({name: (WIDTH, WIDTH)})
    save_file(lora, tmp_path / "lora.safetensors")
    before = whole_pipeline(tmp_path / "base", base)
    after = whole_pipeline(tmp_path / "merged", merged(base, lora, {name: layer}))
    alone = verify_merge(before, after / "unet", tmp_path / "lora.safetensors")
    assert (alone.exit_code, "nothing else of what was compared" in alone.overall.text()) == (0, True)
    assert "the component vae left out: 1 tensor" in alone.untouched.notes
    (after / "vae" / "model.safetensors").unlink()
    assert verify_merge(before, after, tmp_path / "lora.safetensors").overall.code == "LH902"


def test_a_component_in_a_pickle_is_never_opened_and_said_to_be_uncompared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name, layer = "lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"
    base, lora = {f"{each}.weight": drawn(WIDTH, WIDTH) for each in (layer, *PARTS)}, pairs({name: (WIDTH, WIDTH)})
    save_file(lora, tmp_path / "lora.safetensors")
    before, after = (
        whole_pipeline(tmp_path / "a", base),
        whole_pipeline(tmp_path / "b", merged(base, lora, {name: layer})),
    )
    for folder in (before, after):
        (folder / "vae" / "model.safetensors").rename(folder / "vae" / "pytorch_model.bin")
    (before / "notes").mkdir()
    save_file(lora, before / "notes" / "old_lora.safetensors")  # lies there, and is no component
    report = verify_merge(before, after, tmp_path / "lora.safetensors")
    assert (report.exit_code, report.untouched.extra, report.untouched.missing) == (0, (), ())
    assert "the component vae not compared: a pickle, which is never opened" in report.untouched.notes
    assert "nothing else of what was compared" in report.overall.title


@pytest.mark.parametrize("forgotten", ["", "te1", "te2"])
def test_the_text_encoders_of_a_pipeline_are_judged(forgotten: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = {"lora_unet_mid_block_attentions_0_proj_in": "unet.mid_block.attentions.0.proj_in"}
    layers |= {f"lora_{k}_text_model_{FIRST.replace('.', '_')}": f"{v}.text_model.{FIRST}" for k, v in ENCODERS.items()}
    base = {f"{layer}.weight": drawn(WIDTH, WIDTH).half() for layer in layers.values()}
    lora = pairs(dict.fromkeys(layers, (WIDTH, WIDTH)))
    done = {name: layer for name, layer in layers.items() if not forgotten or f"_{forgotten}_" not in name}
    save_file(lora, tmp_path / "lora.safetensors")
    before, after = pipeline(tmp_path / "base", base), pipeline(tmp_path / "merged", merged(base, lora, done))
    report = verify_merge(before, after, tmp_path / "lora.safetensors")
    assert (report.exit_code, len(report.modules)) == (int(bool(forgotten)), 3), report.overall.text()
    assert report.overall.code == ("LH102" if forgotten else None)


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_shard_that_is_not_there_is_told_without_an_index(missing: int, tmp_path: Path) -> None:
    for number in {1, 2, 3} - {missing}:
        save_file({f"a{number}.weight": drawn(4, 4)}, tmp_path / f"model-0000{number}-of-00003.safetensors")
    with pytest.raises(LoraFileError, match=f"lacks the shard model-0000{missing}-of-00003"):
        Checkpoint.open(tmp_path)


def test_variants_beside_the_plain_file_are_left_out(tmp_path: Path) -> None:
    weight = drawn(4, 4)
    save_file({"a.weight": weight}, tmp_path / "model.safetensors")
    save_file({"a.weight": weight.half()}, tmp_path / "model.fp16.safetensors")
    assert Checkpoint.open(tmp_path).dtype("a.weight") == "float32"
