"""The table of two names per layer, held against diffusers' own converters: which rows go where, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from safetensors.torch import save_file

from harness.doctor.match import Placement, place
from harness.files import read_lora
from harness.files.architectures import rows

# title in the table: diffusers' converter, heights that it has built in, and what its names need beside the table's
FAMILIES: dict[str, tuple[str, dict[str, int], dict[str, Any]]] = {
    "FLUX": ("convert_flux_transformer_checkpoint_to_diffusers", {"D": 3072, "M": 12288}, {}),
    "Chroma": ("convert_chroma_transformer_checkpoint_to_diffusers", {"D": 3072, "M": 12288}, {}),
    "FLUX.2": ("convert_flux2_transformer_checkpoint_to_diffusers", {}, {}),
    "FLUX.3": ("convert_flux3_transformer_checkpoint_to_diffusers", {}, {}),
    "HunyuanVideo": ("convert_hunyuan_video_transformer_to_diffusers", {"D": 3072, "M": 12288}, {}),
    "Wan": ("convert_wan_transformer_to_diffusers", {}, {}),
    "Z-Image": ("convert_z_image_transformer_checkpoint_to_diffusers", {}, {}),
    "Lumina 2": ("convert_lumina2_to_diffusers", {"Q": 2304, "K": 768}, {}),
    "Stable Diffusion 3": ("convert_sd3_transformer_checkpoint_to_diffusers", {}, {}),
    "Sana": ("convert_sana_transformer_to_diffusers", {}, {}),
    "Mochi": ("convert_mochi_transformer_checkpoint_to_diffusers", {}, {}),
    "AuraFlow": ("convert_auraflow_transformer_checkpoint_to_diffusers", {}, {}),
    "Cosmos": ("convert_cosmos_transformer_checkpoint_to_diffusers", {}, {}),
    "LTX-Video": ("convert_ltx2_transformer_to_diffusers", {}, {}),
    "Krea 2": ("convert_krea2_transformer_checkpoint_to_diffusers", {}, {}),
    "Qwen-Image": ("convert_qwen_image21_transformer_checkpoint_to_diffusers", {}, {}),
    "MiniMax-H3": ("convert_minimax_h3_transformer_checkpoint_to_diffusers", {}, {"config": {}}),
    "Stable Diffusion 1, 2 and XL": (
        "convert_ldm_unet_checkpoint", {}, {"config": {"layers_per_block": 2, "addition_embed_type": "text_time"}},
    ),
}  # fmt: skip
# rows of the table that are another model's of the family: FLUX' guidance layer is Chroma's, Chroma has no modulation;
# the last context block of SD3 has no MLP; an upsampler of SD stands at .1 or .2
UNCONVERTED = {"FLUX": 2, "Chroma": 10, "Stable Diffusion 3": 3, "Stable Diffusion 1, 2 and XL": 3}
MOST_ROWS = 21504


class Yielding(dict[str, torch.Tensor]):
    """A checkpoint that has whatever a converter takes out of it beside what a test gave it."""

    def pop(self, key: str, *default: Any) -> torch.Tensor:  # type: ignore[override]
        return super().pop(key, torch.zeros(MOST_ROWS))

    def __missing__(self, key: str) -> torch.Tensor:
        return torch.zeros(MOST_ROWS)


def originals(title: str, heights: dict[str, int]) -> dict[str, torch.Tensor]:
    """Return the authors' layers of an architecture, every row of which holds a number of its own."""
    found: dict[str, torch.Tensor] = {}
    for row in rows():
        of_diffusers = title == "FLUX" and "transformer_blocks." in row.left
        if row.family == title and not row.order and not of_diffusers:
            name = row.left.replace("**", "layers.0" if row.left.startswith("**") else "linear_1").replace("*", "0")
            high = sum(heights.get(letter, 8) for letter in row.sizes) if len(row.right) > 1 else 8
            known = sum(tensor.numel() for tensor in found.values())
            found.setdefault(name, torch.arange(known, known + high, dtype=torch.float64).reshape(-1, 1))
    return found


def placement(folder: Path, modules: dict[str, torch.Tensor], layers: dict[str, torch.Tensor], width: int) -> Placement:
    """Return where a LoRA of `modules` goes in a model of `layers`."""
    tensors = {}
    for name, rows_ in modules.items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = torch.zeros(1, width)
        tensors[f"diffusion_model.{name}.lora_B.weight"] = torch.zeros(len(rows_), 1)
    save_file(tensors, folder / "lora.safetensors")
    return place(read_lora(folder / "lora.safetensors"), {name: (len(rows_), width) for name, rows_ in layers.items()})


def check(found: Placement, modules: dict[str, torch.Tensor], layers: dict[str, torch.Tensor]) -> None:
    """Every module must be placed, and each of its rows must lie where its number lies in the model."""
    for name, rows_ in modules.items():
        assert name in found.slots, (name, found.missing, found.misfits, found.ambiguous)
        got = torch.full_like(rows_, -1)
        for slot in found.slots[name]:
            part, there = slice(*(slot.part or (None,))), slice(*(slot.rows or (None,)))
            got[part] = layers[slot.layer][there]
        assert torch.equal(got, rows_), name


@pytest.mark.parametrize("title", FAMILIES)
def test_rows_go_where_diffusers_own_converter_puts_them(title: str, tmp_path: Path) -> None:
    convert, heights, options = FAMILIES[title]
    old = originals("FLUX" if title == "Chroma" else title, heights)
    prefix = "model.diffusion_model." if title.startswith("Stable Diffusion 1") else ""
    checkpoint = Yielding({f"{prefix}{name}.weight": rows_.clone() for name, rows_ in old.items()})
    checkpoint |= {f"{prefix}{name}.bias": rows_.flatten() for name, rows_ in old.items()}
    converted = getattr(converters, convert)(checkpoint, **options)
    numbers = torch.cat(list(old.values())).flatten()
    new = {
        key.removesuffix(".weight"): value
        for key, value in converted.items()
        if key.endswith(".weight") and value is not None and value.dim() == 2 and value.dtype == torch.float64
    }
    there = torch.cat(list(new.values())).flatten()
    known = {name: rows_ for name, rows_ in old.items() if torch.isin(rows_, there).all()}
    assert len(known) >= len(old) - UNCONVERTED.get(title, 0)
    assert torch.isin(torch.cat(list(new.values())).flatten(), numbers).all()
    check(placement(tmp_path, known, new, 4), known, new)
    check(placement(tmp_path, new, known, 4), new, known)
