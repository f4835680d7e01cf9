"""Public reports about files, rebuilt with their key names, ranks and alphas: what `inspect` and `repair` must say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as diffusers
from safetensors.torch import load_file, save_file

from harness.doctor import inspect_file, repair_file
from harness.doctor.verify.verify import verify_merge
from harness.errors import UserError
from tests.doctor.drawn import BF16, Drawn, Tensors, plus

D = 64
Sizes = dict[str, tuple[int, int]]  # module: rows, columns


def sizes(stems: str, names: Sizes, blocks: int = 2) -> Sizes:
    return {f"{stems.format(i)}.{name}": size for i in range(blocks) for name, size in names.items()}


def halves(drawn: Drawn, modules: Sizes, rank: int, prefix: str, down: str, up: str) -> Tensors:
    found = {}
    for name, (rows, columns) in modules.items():
        a, b = drawn.pair(rows, columns, rank)
        found |= {f"{prefix}{name}.{down}": a, f"{prefix}{name}.{up}": b}
    return found


def base(drawn: Drawn, modules: Sizes, prefix: str = "") -> Tensors:
    return {f"{prefix}{name}.weight": drawn.weight(*size) for name, size in modules.items()}


SQUARE = (D, D)
FLUX2 = sizes(
    "transformer_blocks.{}",
    {f"attn.{n}": SQUARE for n in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out")}
    | {"ff.linear_in": (6 * D, D), "ff_context.linear_out": (D, 3 * D)},
) | sizes("single_transformer_blocks.{}", {"attn.to_qkv_mlp_proj": (9 * D, D), "attn.to_out": (D, 4 * D)})


def test_a_flux2_file_of_diffsynth_reaches_diffusers_through_repair(tmp_path: Path) -> None:
    """diffusers#13547: `lora_A.default.weight` without a prefix, no alpha; diffusers loads nothing of it."""
    drawn = Drawn(tmp_path)
    lora = drawn.save(
        "lora.safetensors", halves(drawn, FLUX2, 32, "", "lora_A.default.weight", "lora_B.default.weight")
    )
    record = inspect_file(lora, base=drawn.save("base.safetensors", base(drawn, FLUX2)))
    assert (record.format, record.codes, record.fit and record.fit.applied) == ("diffsynth", ("LH701",), 20)
    assert "loads none of its modules" in record.unprescribed["diffusers"]
    with pytest.raises(UserError, match="carries no alpha"):
        repair_file(lora, "diffusers", tmp_path / "fixed.safetensors")
    repair_file(lora, "diffusers", tmp_path / "fixed.safetensors", lora_alpha=16)
    fixed, first = load_file(tmp_path / "fixed.safetensors"), next(iter(FLUX2))
    a, b = (load_file(lora)[f"{first}.lora_{half}.default.weight"].float() for half in "AB")
    new_a, new_b = (fixed[f"transformer.{first}.lora_{half}.weight"].float() for half in "AB")
    assert torch.allclose(new_b @ new_a, 0.5 * b @ a, rtol=0.02, atol=1e-4)
    assert len(fixed) == 2 * len(FLUX2)


def test_a_lokr_of_z_image_has_an_alpha_that_means_nothing(tmp_path: Path) -> None:
    """diffusers#13221: full factors and alphas of 1e10, which no reader divides by a rank."""
    drawn, lokr = Drawn(tmp_path), {}
    modules = sizes(
        "layers.{}", {"attention.to_q": (96, 96), "feed_forward.w1": (256, 96), "adaLN_modulation.0": (384, 32)}
    )
    for name, (rows, columns) in modules.items():
        parts = {"lokr_w1": drawn.weight(4, 4), "lokr_w2": drawn.weight(rows // 4, columns // 4)}
        lokr |= {f"diffusion_model.{name}.{part}": tensor for part, tensor in parts.items()}
        lokr[f"diffusion_model.{name}.alpha"] = torch.tensor(1e10, dtype=BF16)
    lora = drawn.save("lora.safetensors", lokr)
    record = inspect_file(lora, base=drawn.save("base.safetensors", base(drawn, modules)))
    assert (record.codes, record.variants, record.fit and record.fit.applied) == ((), {"lokr": 6}, 6)
    assert {record.prescription[tool] for tool in ("comfyui", "diffusers", "diffsynth")} == {None}
    assert "was not measured" in record.unprescribed["comfyui"]  # 0.3.64 knows no diffusers' names of Z-Image
    with pytest.raises(UserError, match="12 trained tensors have no place in a diffusers file"):
        repair_file(lora, "diffusers", tmp_path / "fixed.safetensors")


def test_an_alpha_of_0_in_the_configuration_is_no_zero_product(tmp_path: Path) -> None:
    """verl#5337: lora_alpha is 0 in adapter_config.json, B @ A is not zero."""
    drawn = Drawn(tmp_path)
    modules = sizes("model.layers.{}.self_attn", {"q_proj": SQUARE, "v_proj": SQUARE})
    lora = drawn.peft(
        halves(drawn, modules, 16, "base_model.model.", "lora_A.weight", "lora_B.weight"),
        r=16,
        lora_alpha=0,
        target_modules=["q_proj", "v_proj"],
    )
    weights = base(drawn, modules)
    paths = drawn.save("base.safetensors", weights), drawn.save("merged.safetensors", weights)
    assert inspect_file(lora, base=paths[0]).codes == ("LH705",)
    given = inspect_file(lora, base=paths[0], lora_alpha=32)
    assert (given.trained, given.codes) == ((2.0, 2.0), ())
    assert (verify_merge(*paths, lora).exit_code, verify_merge(*paths, lora, lora_alpha=32).exit_code) == (3, 1)
    repair_file(lora, "peft", tmp_path / "fixed", lora_alpha=32)
    assert inspect_file(tmp_path / "fixed").codes == ()


LIGHTNING = sizes(
    "blocks.{}",
    {f"{part}.{n}": SQUARE for part in ("self_attn", "cross_attn") for n in "qkvo"}
    | {"ffn.0": (4 * D, D), "ffn.2": (D, 4 * D)},
)


def lightning(drawn: Drawn, prefix: str) -> Tensors:
    found = halves(drawn, LIGHTNING, 64, prefix, "lora_down.weight", "lora_up.weight")
    return found | {f"{prefix}{name}.alpha": torch.tensor(8.0) for name in LIGHTNING}


@pytest.mark.parametrize("prefix", ["diffusion_model.", ""])
def test_wan_lightning_is_an_eighth_as_strong_as_readers_without_alpha_have_it(prefix: str, tmp_path: Path) -> None:
    """Wan2GP#677: alpha 8, rank 64, with and without a prefix."""
    drawn = Drawn(tmp_path)
    lora, weights = drawn.save("lora.safetensors", lightning(drawn, prefix)), base(drawn, LIGHTNING)
    before = drawn.save("base.safetensors", weights)
    record = inspect_file(lora, base=before)
    assert (record.trained, record.codes, record.fit and record.fit.applied) == ((0.125, 0.125), (), 20)
    assert record.prescription["diffsynth-2.0.4"] == 0.125
    merged = {}
    for scale in (1.0, 0.125):
        tensors = {}
        for name in LIGHTNING:
            a, b = (load_file(lora)[f"{prefix}{name}.lora_{half}.weight"] for half in ("down", "up"))
            tensors[f"{name}.weight"] = plus(weights[f"{name}.weight"], a, b, scale)
        merged[scale] = drawn.save(f"merged_{scale}.safetensors", tensors)
    wrong = verify_merge(before, merged[1.0], lora)
    assert (wrong.exit_code, wrong.overall.ratio) == (1, pytest.approx(8, rel=1e-2))
    assert verify_merge(before, merged[0.125], lora).exit_code == 0


def test_wan_lightning_with_its_scale_folded_in_has_no_alpha_left(tmp_path: Path) -> None:
    """DiffSynth-Studio#1067: sqrt(8 / 64) in both halves, names of `.default`: nothing in the file tells."""
    drawn, found = Drawn(tmp_path), {}
    for key, tensor in lightning(drawn, "").items():
        half = {"lora_down": "lora_A", "lora_up": "lora_B"}.get(key.split(".")[-2])
        if half:
            found[f"{key.rpartition('.lora_')[0]}.{half}.default.weight"] = (
                tensor.float() * math.sqrt(1 / 8)
            ).bfloat16()
    record = inspect_file(drawn.save("lora.safetensors", found))
    assert (record.codes, record.trained) == (("LH701",), None)


def ltx2(drawn: Drawn) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Yield the module in the file, its layer in the base, and its size."""
    for name in sizes(
        "transformer_blocks.{}",
        {f"{a}.{n}": SQUARE for a in ("attn1", "audio_to_video_attn") for n in ("to_q", "to_out.0")},
    ):
        yield f"diffusion_model.{name}", f"model.diffusion_model.{name}", SQUARE
    for name in ("attn1.to_q", "attn1.to_out.0"):
        own = f"connectors.audio_connector.transformer_blocks.0.{name}"
        layer = f"audio_embeddings_connector.transformer_1d_blocks.0.{name}"
        yield f"diffusion_model.{own}", f"model.diffusion_model.{layer}", SQUARE
    embed = "text_embedding_projection.aggregate_embed"
    yield embed, embed, (D, 4 * D)


def test_two_components_of_ltx2_are_one_file(tmp_path: Path) -> None:
    """SimpleTuner#2349: `diffusion_model.`, connectors, `text_embedding_projection.`: diffusers converts all."""
    drawn, lora, weights = Drawn(tmp_path), {}, {}
    for module, layer, (rows, columns) in ltx2(drawn):
        a, b = drawn.pair(rows, columns, 32)
        lora |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b, f"{module}.alpha": torch.tensor(32.0)}
        weights[f"{layer}.weight"] = drawn.weight(rows, columns)
    path = drawn.save("lora.safetensors", lora)
    record = inspect_file(path, base=drawn.save("base.safetensors", weights))
    assert (record.codes, record.fit and record.fit.applied, len(lora) // 3) == ((), 11, 11)
    kept = {key: tensor for key, tensor in lora.items() if not key.endswith("alpha")}
    converted = [
        diffusers._convert_non_diffusers_ltx2_lora_to_diffusers(kept, prefix)
        for prefix in ("diffusion_model", "text_embedding_projection")
    ]
    assert sum(map(len, converted)) == len(kept)
    repair_file(path, "comfyui", tmp_path / "fixed.safetensors")
    assert load_file(tmp_path / "fixed.safetensors").keys() >= kept.keys()


def test_magnitudes_that_a_merge_left_out(tmp_path: Path) -> None:
    """ComfyUI-DoRA-Dynamic-LoRA-Loader#24: `lora_magnitude_vector` behind diffusers' prefix, alpha in the header."""
    drawn, lora, weights, dropped = Drawn(tmp_path), {}, {}, {}
    for name, (rows, columns) in sizes(
        "single_transformer_blocks.{}", {"attn.to_out": (D, 4 * D), "attn.to_qkv_mlp_proj": (9 * D, D)}
    ).items():
        weight, (a, b) = drawn.weight(rows, columns, dtype=torch.float32), drawn.pair(rows, columns, 16)
        key = f"transformer.{name}"
        magnitude = weight.norm(dim=1) * (1 + drawn.weight(rows, std=0.1, dtype=torch.float32))
        lora |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, f"{key}.lora_magnitude_vector": magnitude}
        weights[f"{name}.weight"], dropped[f"{name}.weight"] = weight, plus(weight, a, b, 0.5)
    said = {"transformer.r": 16, "transformer.lora_alpha": 8, "transformer.use_dora": True}
    save_file(lora, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(said)})
    record = inspect_file(tmp_path / "lora.safetensors")
    assert (record.variants, record.trained) == ({"dora": 4}, (0.5, 0.5))
    assert any(note.startswith("DoRA magnitudes (lora_magnitude_vector) in 4 modules") for note in record.notes)
    stores = drawn.save("base.safetensors", weights), drawn.save("merged.safetensors", dropped)
    report = verify_merge(*stores, tmp_path / "lora.safetensors")
    assert (report.exit_code, report.overall.code) == (1, "LH304")


def test_differences_of_biases_beside_pairs_in_float8(tmp_path: Path) -> None:
    """ComfyUI-HunyuanVideoWrapper#234: ComfyUI's names, a base in the authors' own."""
    drawn, lora, weights, fp8 = Drawn(tmp_path), {}, {}, torch.float8_e4m3fn
    for name, (rows, columns) in sizes(
        "double_blocks.{}", {f"{s}_attn.{n}": (k * D, D) for s in ("img", "txt") for n, k in (("qkv", 3), ("proj", 1))}
    ).items():
        a, b = drawn.pair(rows, columns, 32, 0.05)
        key = f"diffusion_model.{name}"
        lora |= {f"{key}.lora_down.weight": a.to(fp8), f"{key}.lora_up.weight": b.to(fp8)}
        lora[f"{key}.diff_b"] = drawn.weight(rows).to(fp8)
        weights[f"{name.replace('_attn.', '_attn_')}.weight"] = drawn.weight(rows, columns)
    record = inspect_file(drawn.save("lora.safetensors", lora), base=drawn.save("base.safetensors", weights))
    assert (record.codes, record.variants, record.coverage) == ((), {"lora_diff": 8}, 1.0)
    assert record.fit is not None
    assert record.fit.applied == 8


def test_differences_in_a_text_encoder_beside_a_transformer(tmp_path: Path) -> None:
    """ComfyUI-nunchaku#64: `.diff` and `.diff_b` of clip_l beside FLUX."""
    drawn = Drawn(tmp_path)
    blocks = sizes("double_blocks.{}", {"img_attn.qkv": (3 * D, D), "img_attn.proj": SQUARE})
    lora = halves(drawn, blocks, 16, "diffusion_model.", "lora_down.weight", "lora_up.weight")
    for name in sizes(
        "text_encoders.clip_l.transformer.text_model.encoder.layers.{}",
        {f"self_attn.{n}": SQUARE for n in ("q_proj", "out_proj")},
    ):
        lora |= halves(drawn, {name: SQUARE}, 16, "", "lora_down.weight", "lora_up.weight")
        lora[f"{name}.diff_b"] = drawn.weight(D)
    lora["text_encoders.clip_l.transformer.text_model.encoder.layers.0.layer_norm1.diff"] = drawn.weight(D)
    record = inspect_file(drawn.save("lora.safetensors", lora))
    assert (record.codes, record.coverage, set(record.variants)) == ((), 1.0, {"lora", "lora_diff", "diff"})
