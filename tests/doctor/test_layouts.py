"""What `inspect` says of layouts that tools write: nothing unreadable, no false hazard, no strength that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from harness.doctor import inspect_file
from tests.cases.layouts import BUILT, Layout, foreign, seen

SEEN = {layout.name: layout for layout in seen()}
LAYOUTS = {layout.name: layout for layout in BUILT}
FOREIGN = {layout.name: (layout, what) for layout, what in foreign()}


class Truth(NamedTuple):
    """Format, variants, ranks, hazards, and the strength to pass to diffusers or PEFT (None: none is known)."""

    format: str
    variants: str
    ranks: str
    codes: str = ""
    strength: float | None = None
    loader: str = "diffusers"


SEEN_TRUTH = {
    "invoke_anima_lora_kohya": Truth("kohya", "lora", "8"),
    "invoke_anima_lora_lokr": Truth("comfyui", "lokr", "full"),
    "invoke_flux_control_lora": Truth("bfl-control", "lora_bias norm", "128", "LH709"),
    "invoke_flux_lokr_bfl": Truth("comfyui", "lokr", "full"),
    "invoke_flux_lora_diffusers_base_model": Truth("peft", "lora", "4", "LH701", None, "peft"),
    "invoke_flux_lora_diffusers_no_proj_mlp": Truth("diffusers", "lora", "16", "LH701"),
    "invoke_flux_lora_kohya_with_te1": Truth("kohya", "lora", "4", "", None),
    "invoke_krea2_lora_kohya": Truth("kohya", "lora", "32"),
    "invoke_qwen_image_lora_kohya": Truth("kohya", "lokr", "full"),
    "locon_sd15": Truth("kohya", "lora conv", "32 8", "LH703", None),
    "sdxl_kohya": Truth("kohya", "lora", "32", "", None),
    "lycoris_train_norm": Truth("kohya", "lora conv norm", "8"),
    "kohya_oft_flux": Truth("kohya", "oft", ""),
    "onetrainer_omi_sdxl_dora": Truth("diffusers", "dora", "16"),
    "onetrainer_ernie_image": Truth("diffusers", "lora", "16", "", None),
    "comfyui_extracted_flux_t5": Truth("comfyui", "lora lora_diff diff", "8"),
    "zimage_lokr_aitoolkit": Truth("comfyui", "lokr", "full"),
    "attn_procs_sdxl_bare": Truth("attn-procs", "lora", "4"),
    "sdxl_both_namings": Truth("kohya", "lora", "32", "LH715"),
    "wan_diffusion_pipe": Truth("comfyui", "lora", "32", "LH701"),
    "peft_saved_embeddings": Truth("peft", "lora set", "16", "LH721", None, "peft"),
    "peft_trainable_tokens": Truth("peft", "lora tokens", "64", "", 1.0, "peft"),
    "lycoris_loha_zimage": Truth("kohya", "loha", "8"),
    "krea2_aitoolkit_peft_prefix": Truth("peft", "lora", "32", "", None, "peft"),
    "minimax_h3_diffsynth": Truth("diffsynth", "lora", "16", "LH701"),
    "ideogram4_conditional_transformer": Truth("diffusers", "lora", "16", "LH701"),
    "fal_kontext": Truth("peft", "lora", "16", "LH701", None, "peft"),
    "aitoolkit_flux_diffusers": Truth("diffusers", "lora", "16", "", 1.0),
    "mlx_checkpoint_name": Truth("mlx", "lora", "8"),
    "xlabs_with_single_blocks": Truth("xlabs", "lora", "16", "", 1.0),
    "real_cloneofsimo_disney": Truth("cloneofsimo", "lora textual_inversion", "1"),
    "real_02_new": Truth("kohya", "lora", "4", "LH701"),
    "real_03_my_lora": Truth("diffusers", "lora", "4", "LH701"),
    "real_04_pytorch_lora": Truth("diffusers", "lora", "4", "", None),
    "real_05_bert_gpt2": Truth("peft", "lora set", "8", "", 1.0, "peft"),
    "real_06_gpt2": Truth("peft", "lora set", "8", "", 1.0, "peft"),
    "real_07_gemma3": Truth("peft", "lora", "4", "", 1.0, "peft"),
    "real_08_sift": Truth("peft", "lora set", "16", "", 1.0, "peft"),
    "real_09_lab08": Truth("peft", "lora", "16", "", 1.0, "peft"),
    "real_10_bloom": Truth("peft", "lora", "8", "", 1.0, "peft"),
    "real_peft_mrpc_40": Truth("peft", "finegates set", "", "", None, "peft"),
}
BUILT_TRUTH = {
    "sd3_sd_scripts": Truth("kohya", "lora", "8"),
    "lumina_sd_scripts": Truth("kohya", "lora", "8"),
    "wan22_musubi_high_noise": Truth("kohya", "lora", "8", "", None),
    "stable_cascade_onetrainer": Truth("kohya", "lora", "8"),
    "onetrainer_sdxl_omi": Truth("diffusers", "lora textual_inversion", "8"),
    "ltx2_connectors": Truth("comfyui", "lora", "8", "", None),
    "lightx2v_distilled": Truth("comfyui", "lora lora_diff diff", "8"),
    "qwen_lightning_bare": Truth("diffsynth", "lora", "8", "", 1.0),
    "simpletuner_lycoris_lokr": Truth("kohya", "lokr", "full"),
    "lycoris_loha_tucker": Truth("kohya", "loha", "8"),
    "lycoris_full": Truth("kohya", "diff", ""),
    "lycoris_ia3": Truth("kohya", "ia3", ""),
    "lycoris_glora": Truth("kohya", "glora", ""),
    "lycoris_boft": Truth("kohya", "boft", ""),
    "musubi_torch_compile": Truth("kohya", "lora", "8", "LH712"),
    "diffusers_torch_compile": Truth("diffusers", "lora", "8", "LH701 LH712"),
    "peft_ddp": Truth("peft", "lora", "8", "LH712", None, "peft"),
    "peft_fsdp": Truth("peft", "lora", "8", "LH712 LH712 LH720 LH720", None, "peft"),
    "peft_in_memory": Truth("peft", "lora", "8", "", 1.0, "peft"),
    "unsloth_vision": Truth("peft", "lora", "8", "", 1.0, "peft"),
    "llama_factory_head": Truth("peft", "lora set", "8", "", 1.0, "peft"),
    "axolotl_dora": Truth("peft", "dora", "8", "", 1.0, "peft"),
    "peft_bias_all": Truth("peft", "lora_diff set", "8", "", 1.0, "peft"),
    "peft_bare_ia3": Truth("peft", "ia3", "", "", 1.0, "peft"),
    "peft_vera": Truth("peft", "vera", "", "", 1.0, "peft"),
    "peft_prompt_tuning": Truth("peft", "prompt_tuning", "", "", 1.0, "peft"),
    "peft_adalora": Truth("peft", "adalora", "8", "", 1.0, "peft"),
    "automodel_experts": Truth("peft", "experts lora", "8", "", None, "peft"),
    "torchtune": Truth("diffsynth", "lora", "8", "LH701"),
    "loralib": Truth("diffsynth", "lora", "8", "LH701"),
    "nemo_bridge": Truth("diffsynth", "lora", "8", "LH701"),
    "nunchaku": Truth("diffsynth", "nunchaku", ""),
    "mlx_step": Truth("mlx", "lora", "8"),
    "mlx_before_june_2024": Truth("mlx", "lora", "8", "LH716"),
    "mlx_vlm": Truth("mlx-vlm", "lora", "8", "LH716"),
    "fused_beside_split": Truth("comfyui", "lora", "8", "LH715"),
    "old_diffusers_bare": Truth("diffsynth", "lora", "8", "LH701"),
}


def judge(layout: Layout, truth: Truth, folder: Path) -> None:
    record = inspect_file(layout.write(folder))
    assert (record.format, set(record.variants)) == (truth.format, set(truth.variants.split()))
    assert set(record.ranks) == set(truth.ranks.split())
    assert " ".join(record.codes) == truth.codes, record.hazards
    assert (record.coverage, record.weights_read) == (1.0, True)
    assert record.prescription.get(truth.loader) == truth.strength, record.unprescribed
    refused = {loader for loader, strength in record.prescription.items() if strength is None}
    assert refused == set(record.unprescribed)


@pytest.mark.parametrize("name", SEEN_TRUTH)
def test_a_layout_seen_in_public_is_read_and_named(name: str, tmp_path: Path) -> None:
    judge(SEEN[name], SEEN_TRUTH[name], tmp_path)


@pytest.mark.parametrize("name", BUILT_TRUTH)
def test_a_layout_by_the_rules_of_its_tool_is_read_and_named(name: str, tmp_path: Path) -> None:
    judge(LAYOUTS[name], BUILT_TRUTH[name], tmp_path)


def test_every_layout_has_its_truth() -> None:
    assert set(SEEN) == set(SEEN_TRUTH)
    assert set(LAYOUTS) == set(BUILT_TRUTH)
    assert len(SEEN) == 41


@pytest.mark.parametrize("name", FOREIGN)
def test_an_intact_file_that_is_no_lora_is_called_by_what_it_is(name: str, tmp_path: Path) -> None:
    layout, what = FOREIGN[name]
    record = inspect_file(layout.write(tmp_path))
    assert record.codes == ("LH797",)
    assert what in record.hazards[0].what


def test_a_scale_of_one_by_construction_is_no_unknown_alpha(tmp_path: Path) -> None:
    for name in (
        "attn_procs_sdxl_bare",
        "xlabs_with_single_blocks",
        "comfyui_extracted_flux_t5",
        "real_cloneofsimo_disney",
    ):
        record = inspect_file(SEEN[name].write(tmp_path))
        assert (record.trained, set(record.alphas)) == ((1.0, 1.0), {"none"})
        assert any("no alpha by construction" in note for note in record.notes)
        assert record.scales["alpha / rank"] == (1.0, 1.0)


def test_dora_magnitudes_are_shown_with_who_drops_them(tmp_path: Path) -> None:
    (note,) = inspect_file(SEEN["onetrainer_omi_sdxl_dora"].write(tmp_path)).notes
    assert note.startswith("DoRA magnitudes (dora_scale) in 3 modules: ")
    assert "diffusers filters dora_scale out" in note
