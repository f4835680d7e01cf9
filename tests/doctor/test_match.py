"""`inspect`, `verify` and `repair` find the same layers, whatever prefix either side has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.doctor import inspect_file, repair_file, verify_merge
from harness.doctor.match import Placement, match_layers, place
from harness.doctor.repair.naming import layers_from
from harness.doctor.spelling import layers_by_spelling
from harness.files import LoraWeights, read_lora, write_lora

QWEN = ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")
DIFFUSERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0")
# names, prefix in the checkpoint, prefix in the LoRA, format of the LoRA
CASES = [
    *((QWEN, base, lora, "peft") for base in ("model.", "") for lora in ("model.", "")),
    *((QWEN, base, lora, "kohya") for base in ("model.", "") for lora in ("model.", "")),
    *((DIFFUSERS, base, "", format) for base in ("", "transformer.", "model.diffusion_model.")
      for format in ("peft", "diffusers", "comfyui", "kohya")),
]  # fmt: skip
Files = tuple[Path, Path, Path, list[str]]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[1]}{case[0][0]}-{case[2]}{case[3]}")
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Files:
    """A base, its right merge, the LoRA, and the names that the LoRA's modules have with dots."""
    names, base_prefix, lora_prefix, format = request.param
    torch.manual_seed(0)
    pairs = {name: LoraWeights(torch.randn(4, 48), 0.1 * torch.randn(48, 4), 8.0) for name in names}
    base = {f"{base_prefix}{name}.weight": torch.randn(48, 48) for name in names}
    merged = {f"{base_prefix}{name}.weight": 2 * pair.b @ pair.a for name, pair in pairs.items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file({key: value + base[key] for key, value in merged.items()}, tmp_path / "merged.safetensors")
    lora = write_lora(tmp_path / "lora", format, {lora_prefix + name: pair for name, pair in pairs.items()})
    return tmp_path / "base.safetensors", tmp_path / "merged.safetensors", lora, [lora_prefix + name for name in names]


def test_inspect_measures_every_module_against_its_layer(files: Files) -> None:
    base, _, lora, names = files
    record = inspect_file(lora, base=base)
    assert not [note for note in record.notes if "no module" in note]
    assert [energy.relative is not None for energy in (record.energies or {}).values()] == [True] * len(names)


def test_verify_measures_every_module(files: Files) -> None:
    base, merged, lora, names = files
    report = verify_merge(base, merged, lora)
    assert report.ok, report.overall.text()
    assert len(report.modules) == len(names)


@pytest.mark.parametrize("to", ["peft", "kohya"])
def test_repair_writes_the_names_of_the_lora_with_dots(files: Files, tmp_path: Path, to: str) -> None:
    base, merged, lora, names = files
    repaired = read_lora(repair_file(lora, to, tmp_path / "new", model_names=layers_from(base)).path)
    wanted = [name.replace(".", "_") for name in names] if to == "kohya" else names
    assert sorted(module.name for module in repaired.modules.values()) == sorted(wanted)
    assert verify_merge(base, merged, repaired.path).ok


def lora_with(folder: Path, format: str, *names: str) -> Path:
    return write_lora(
        folder / "lora", format, {name: LoraWeights(torch.ones(2, 4), torch.ones(4, 2), 2.0) for name in names}
    )


def test_a_layers_own_name_comes_before_a_prefix_left_out(tmp_path: Path) -> None:
    adapter = read_lora(lora_with(tmp_path, "peft", "x.q"))
    assert match_layers(adapter, ["model.x.q", "x.q"])["x.q"].layer == "x.q"


def test_a_name_that_fits_two_layers_fits_none(tmp_path: Path) -> None:
    adapter = read_lora(lora_with(tmp_path, "peft", "x.q"))
    assert match_layers(adapter, ["model.x.q", "unet.x.q"]) == {}


def test_a_layer_that_two_modules_claim_is_left_out(tmp_path: Path) -> None:
    adapter = read_lora(lora_with(tmp_path, "peft", "model.x.q", "x.q"))
    assert match_layers(adapter, ["x.q", "y"]) == {}


def test_a_flattened_name_is_not_taken_for_a_prefix_and_another_model() -> None:
    assert "transformer.blocks.0.q" not in layers_by_spelling(["blocks.0.q"], flattened=True)
    assert "transformer.blocks.0.q" in layers_by_spelling(["blocks.0.q"], flattened=False)


def placed(
    folder: Path, format: str, modules: dict[str, tuple[int, int]], layers: dict[str, tuple[int, ...] | None]
) -> Placement:
    """Return where modules of these shapes [out, in] go."""
    alpha = None if format == "xlabs" else 2.0
    pairs = {
        name: LoraWeights(torch.ones(2, shape[1]), torch.ones(shape[0], 2), alpha) for name, shape in modules.items()
    }
    return place(read_lora(write_lora(folder / "lora", format, pairs)), layers)


def slot(found: Placement, name: str) -> tuple[str, tuple[int, int] | None, tuple[int, int] | None]:
    (one,) = found.slots[name]
    return one.layer, one.rows, one.part


ATTENTION = "model.layers.0.self_attn"
QUERY, KEY = (64, 32), (16, 32)


@pytest.mark.parametrize("fused", ["qkv_proj", "Wqkv"])
@pytest.mark.parametrize(("part", "shape", "rows"), [("q", QUERY, (0, 64)), ("k", KEY, (64, 80)), ("v", KEY, (80, 96))])
def test_one_of_q_k_and_v_finds_its_rows_of_a_fused_layer(
    tmp_path: Path, fused: str, part: str, shape: tuple[int, int], rows: tuple[int, int]
) -> None:
    found = placed(tmp_path, "peft", {f"{ATTENTION}.{part}_proj": shape}, {f"{ATTENTION}.{fused}": (96, 32)})
    assert slot(found, f"{ATTENTION}.{part}_proj") == (f"{ATTENTION}.{fused}", rows, None)


def test_a_fused_module_is_cut_for_split_layers(tmp_path: Path) -> None:
    split = {f"{ATTENTION}.q_proj": QUERY, f"{ATTENTION}.k_proj": KEY, f"{ATTENTION}.v_proj": KEY}
    found = placed(tmp_path, "peft", {f"{ATTENTION}.qkv_proj": (96, 32)}, dict(split))
    parts = [(one.layer, one.rows, one.part) for one in found.slots[f"{ATTENTION}.qkv_proj"]]
    assert parts == [(name, None, rows) for name, rows in zip(split, ((0, 64), (64, 80), (80, 96)), strict=True)]


def test_rows_that_interleave_by_head_are_not_guessed(tmp_path: Path) -> None:
    found = placed(tmp_path, "peft", {"h.0.attn.q_proj": (32, 32)}, {"h.0.attn.query_key_value": (96, 32)})
    assert not found.slots
    assert "interleave" in found.ambiguous["h.0.attn.q_proj"]


def test_a_layer_of_another_shape_is_a_misfit(tmp_path: Path) -> None:
    found = placed(tmp_path, "peft", {"x.q": (8, 8), "x.k": (8, 8)}, {"x.q": (8, 16), "x.k": (8, 8)})
    assert list(found.slots) == ["x.k"]
    assert found.misfits == {"x.q": "it is 8x8, x.q is 8x16"}


def test_parts_that_do_not_add_up_are_a_misfit(tmp_path: Path) -> None:
    found = placed(tmp_path, "peft", {f"{ATTENTION}.k_proj": (40, 32)}, {f"{ATTENTION}.qkv_proj": (60, 32)})
    assert not found.slots


@pytest.mark.parametrize(
    ("module", "layer", "replaced"),
    [
        ("model.language_model.layers.0.q", "model.layers.0.q", ("model.language_model.", "model.")),
        ("model.layers.0.q", "model.language_model.layers.0.q", ("model.", "model.language_model.")),
        ("layers.0.q", "language_model.model.layers.0.q", ("", "language_model.model.")),
        ("encoder.layers.0.q", "text_model.encoder.layers.0.q", ("", "text_model.")),
        ("policy.actor.model.layers.0.q", "model.layers.0.q", ("policy.actor.", "")),
        ("layers.0.q", "student.layers.0.q", ("", "student.")),
    ],
)
def test_prefixes_are_replaced_and_named(tmp_path: Path, module: str, layer: str, replaced: tuple[str, str]) -> None:
    found = placed(tmp_path, "peft", {module: (8, 8)}, {layer: (8, 8), "lm_head": (9, 8)})
    assert slot(found, module) == (layer, None, None)
    assert [one[:2] for one in found.replaced] == [replaced]


def test_a_name_that_ends_in_two_layers_fits_none(tmp_path: Path) -> None:
    found = placed(
        tmp_path, "peft", {"layers.0.q": (8, 8)}, {"encoder.layers.0.q": (8, 8), "decoder.layers.0.q": (8, 8)}
    )
    assert not found.slots


def test_another_stack_of_blocks_is_no_place(tmp_path: Path) -> None:
    layers: dict[str, tuple[int, ...] | None] = {"single_transformer_blocks.0.attn.to_q": (8, 8)}
    found = placed(tmp_path, "diffusers", {"transformer_blocks.0.attn.to_q": (8, 8)}, layers)
    assert found.missing == ("transformer_blocks.0.attn.to_q",)


def test_xlabs_modules_stop_before_the_mlp(tmp_path: Path) -> None:
    layers: dict[str, tuple[int, ...] | None] = {
        f"single_transformer_blocks.0.{name}": (high, 8)
        for name, high in (("attn.to_q", 8), ("attn.to_k", 8), ("attn.to_v", 8), ("proj_mlp", 32))
    }
    found = placed(tmp_path, "xlabs", {"single_blocks.0.linear1": (24, 8)}, layers)
    assert [one.part for one in found.slots["single_blocks.0.linear1"]] == [(0, 8), (8, 16), (16, 24)]
    whole = placed(tmp_path / "2", "xlabs", {"single_blocks.0.linear1": (24, 8)}, {"single_blocks.0.linear1": (56, 8)})
    assert slot(whole, "single_blocks.0.linear1") == ("single_blocks.0.linear1", (0, 24), None)


def test_text_encoders_of_a_checkpoint_are_told_apart(tmp_path: Path) -> None:
    name = "text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {
        f"lora_{te}_{name}.{half}.weight": torch.ones(4, 4)
        for te in ("te1", "te2")
        for half in ("lora_down", "lora_up")
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    homes = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
    layers = {f"{home}text_model.encoder.layers.0.self_attn.q_proj": (4, 4) for home in homes}
    found = place(read_lora(tmp_path / "lora.safetensors"), dict(layers))
    assert sorted(one.layer for some in found.slots.values() for one in some) == sorted(layers)


def test_a_name_of_several_authors_is_that_of_the_other_modules(tmp_path: Path) -> None:
    names = ["final_layer.linear", "blocks.0.self_attn.q_proj"]  # the first is called so in other models too
    layers = ["norm_out.linear_2", "proj_out", "transformer_blocks.0.attn1.to_q"]
    pairs = {name: LoraWeights(torch.randn(2, 8), torch.randn(8, 2), 2.0) for name in names}
    adapter = read_lora(write_lora(tmp_path / "lora", "comfyui", pairs))
    found = place(adapter, dict.fromkeys(layers))
    assert not found.ambiguous
    assert {name: slots[0].layer for name, slots in found.slots.items()} == dict(zip(names, layers[1:], strict=True))
    assert found.families == ("Cosmos",)


def test_a_name_of_several_authors_alone_is_ambiguous(tmp_path: Path) -> None:
    pair = LoraWeights(torch.randn(2, 8), torch.randn(8, 2), 2.0)
    adapter = read_lora(write_lora(tmp_path / "lora", "comfyui", {"final_layer.linear": pair}))
    assert place(adapter, dict.fromkeys(["norm_out.linear_2", "proj_out"])).ambiguous
