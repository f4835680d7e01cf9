"""What to write into which field, and what a tool prints of what it leaves out, for a user who runs no Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.doctor.diagnose import diagnose
from harness.doctor.told import lines

UNET = "lora_unet_down_blocks_1_attentions_{}_transformer_blocks_0_attn1_to_q"
TEXT = "lora_te_text_model_encoder_layers_{}_self_attn_q_proj"
PREFIXED = "Some_video_model_lora_double_blocks_{}_img_attn_qkv"


def kohya(path: Path, *stems: str, alpha: float = 4.0, side: int = 640, **parts: torch.Tensor) -> Path:
    tensors = {}
    for name in (stem.format(block) for stem in stems for block in range(2)):
        width = 768 if name.startswith("lora_te") else side
        tensors |= {f"{name}.lora_down.weight": torch.ones(4, width), f"{name}.lora_up.weight": torch.ones(width, 4)}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        tensors |= {f"{name}.{part}": value.clone() for part, value in parts.items()}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("stems", "fields"),
    [
        ((UNET,), "strength_model = 1"),
        ((TEXT,), "strength_clip = 1"),
        ((UNET, TEXT), "strength_model = 1, strength_clip = 1"),
    ],
)
def test_each_part_of_the_pipeline_has_its_field(tmp_path: Path, stems: tuple[str, ...], fields: str) -> None:
    found = dict(lines(diagnose(kohya(tmp_path / "lora.safetensors", *stems), tool="comfyui")))
    assert found["pass"].partition("  (")[0] == fields


def test_a_tool_with_a_log_is_asked_for_what_it_prints(tmp_path: Path) -> None:
    found = list(lines(diagnose(kohya(tmp_path / "lora.safetensors", UNET), tool="comfyui", saw="nothing")))
    (test,) = [said for label, said in found if label == "  test" and "prints of keys left out" in said]
    assert "ComfyUI: `lora key not loaded` in its console" in test


def test_flattened_names_behind_a_prefix_that_no_tool_has_are_no_names_of_layers(tmp_path: Path) -> None:
    found = diagnose(kohya(tmp_path / "lora.safetensors", PREFIXED), tool="diffsynth")
    assert (found.answers["diffsynth"].effect, found.answers["diffsynth"].strength) == ("unknown", None)


@pytest.mark.parametrize(
    ("alpha", "shape", "effect"),
    [(4.0, (1, 640), "law"), (8.0, (1, 640), "wrong"), (4.0, (640, 1), "wrong"), (4.0, (640,), "wrong")],
)
def test_a_dora_whose_change_is_multiplied_as_a_whole(
    tmp_path: Path, alpha: float, shape: tuple[int, ...], effect: str
) -> None:
    path = kohya(tmp_path / "lora.safetensors", UNET, alpha=alpha, dora_scale=torch.ones(shape))
    assert diagnose(path, tool="sd-next").answers["sd-next"].effect == effect
