"""The authors' names of a bench, at the width of the real model: diffusers' own converter gives each layer those rows.

Some converters have widths of the released models in their code, so that a small model cannot be asked. No model is
needed for it: the shapes are those of one on the device meta, and the files are of rank 2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import diffusers
import pytest
import torch
from torch import Tensor

from harness.benches.layer import Layer, Rows
from harness.benches.table import _layers, _merged, rows

COMFY, KOHYA = "diffusion_model", "lora_unet"
# family and layout: names that the converter is known not to read, each by a page of docs/findings or in a refusal
CASES: dict[tuple[str, str], str] = {
    ("flux", KOHYA): "",
    ("chroma", KOHYA): "",
    ("flux2", COMFY): r"final_layer\.adaLN",  # diffusers-flux2-norm-out-halves-not-swapped
    ("flux2", KOHYA): r"modulation|guidance_in|final_layer\.adaLN",
    ("wan21-t2v", COMFY): "",
    ("wan21-t2v", KOHYA): "",
    ("wan21-i2v", COMFY): "",
    ("wan21-i2v", KOHYA): "",
    ("wan-vace", COMFY): r"vace",
    ("wan-animate", COMFY): "",
    ("chronoedit", KOHYA): "",
    ("anyflow", COMFY): "",
    ("helios", COMFY): "",
    # diffusers-hunyuan-refiner-qkv-rank-split, diffusers-hunyuan-norm-out-down-half-swapped
    ("hunyuan-video", COMFY): r"individual_token_refiner.*qkv|final_layer\.adaLN",
    ("hunyuan-framepack", COMFY): r"individual_token_refiner.*qkv|final_layer\.adaLN|clean_x|image_projection",
    ("ltx", COMFY): r"patchify_proj|adaln_single",  # diffusers-ltx-outer-modules-dropped
    ("ltx2", COMFY): "",
    ("lumina2", COMFY): r"embed|norm_out",
    ("z-image", KOHYA): "",
    ("anima", COMFY): "",
    ("krea2", COMFY): "",
    ("ideogram4", COMFY): r"^(?!layers)",
    ("flux3", COMFY): "",
}


def at_width(family: str) -> tuple[Mapping[str, Rows], Mapping[str, Layer]]:
    """Return where the rows of the authors' layers are, and the layers, of the real model's width where that counts."""
    row = rows()[family]
    wide = replace(row, config={**row.config, **(row.wide or {})})
    with torch.device("meta"):
        return _merged(wide), _layers(wide)


def written(layout: str, name: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    if layout == COMFY:
        return {f"{COMFY}.{name}.lora_A.weight": a, f"{COMFY}.{name}.lora_B.weight": b}
    flat = f"{KOHYA}_{name.replace('.', '_')}"
    return {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b, f"{flat}.alpha": torch.tensor(2.0)}


def answers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what each layer's update makes of the same three inputs; the updates themselves are large."""
    stems = [key.partition(".lora_A")[0] for key in state if ".lora_A" in key]
    halves = {s: (state[f"{s}.lora_B.weight"], state[f"{s}.lora_A.weight"]) for s in stems}
    return {s.removeprefix("transformer."): b @ (a @ inputs(a.shape[1])) for s, (b, a) in halves.items()}


def inputs(columns: int) -> Tensor:
    return torch.randn(columns, 3, generator=torch.Generator().manual_seed(columns)) / columns**0.5


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_the_rows_of_the_authors_layers_are_those_that_diffusers_takes(family: str, layout: str) -> None:
    merged, layers = at_width(family)
    generator = torch.Generator().manual_seed(5)
    tensors, wanted = dict[str, Tensor](), dict[str, Tensor]()
    unread = CASES[family, layout]
    for name, parts in merged.items():
        if unread and re.search(unread, name):
            continue
        high, wide = sum(rows_.stop - rows_.start for _, rows_ in parts), layers[parts[0][0]].columns
        a, b = torch.randn(2, wide, generator=generator), torch.randn(high, 2, generator=generator)
        tensors |= written(layout, name, a, b)
        start = 0
        for layer, rows_ in parts:
            whole = wanted.setdefault(layer, torch.full((layers[layer].rows, 3), torch.nan))
            whole[rows_] = b[start : start + rows_.stop - rows_.start] @ (a @ inputs(wide))
            start += rows_.stop - rows_.start
    mixin = getattr(diffusers.loaders, rows()[family].mixin or "")
    found = mixin.lora_state_dict(tensors)
    got = answers(found[0] if isinstance(found, tuple) else found)
    assert len(wanted) >= 5
    assert got.keys() == wanted.keys()
    for layer, answer in wanted.items():
        assert torch.allclose(got[layer], answer, atol=1e-4), layer


def test_every_row_with_names_of_the_authors_is_tried_and_the_wide_ones_are_wide() -> None:
    named = {name for name, row in rows().items() if row.original}
    assert {family for family, _ in CASES} == named - {"cosmos"}  # Anima's class and names; its mixin converts nothing
    for family in ("flux", "chroma", "hunyuan-video", "lumina2"):
        assert max(layer.rows for layer in at_width(family)[1].values()) >= 2304
