"""Whatever a file holds, repair writes what reads back as trained, or says one sentence and leaves nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.doctor import repair_file
from harness.errors import UserError
from harness.files import FORMATS

PREFIXES = {
    "kohya": ("lora_unet_", "lora_down", "lora_up"),
    "comfyui": ("diffusion_model.", "lora_A", "lora_B"),
    "diffusers": ("transformer.", "lora_A", "lora_B"),
    "bare": ("", "lora_A", "lora_B"),
    "peft": ("base_model.model.", "lora_A", "lora_B"),
}
NAMES = (
    "blocks.0.to_q", ".lead", "trail.", "a..b", "x" * 300, "ünï.ß", "a b", "a/b", "lora_A", "0", "_a", "a_", "\u202e.x",
    "transformer.x", "te.text_model.x", "down_blocks.0.x", "double_blocks.0.img_attn.qkv", "q.weight",
)  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
ALPHAS = (None, 1.0, 4.0, 0.0, -2.0, float("nan"), float("inf"), 1e300)


def halves(draw: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    rank, dims = draw.choice((0, 1, 2, 4)), draw.choice((1, 2, 2, 2, 3, 4, 5, 6))
    a = torch.randn([rank, *(draw.choice((1, 2, 3)) for _ in range(dims - 1))])
    b = torch.randn([draw.choice((1, 3, 4)), rank, *[1] * (dims - 2)][: max(dims, 2)])
    return a.to(draw.choice(DTYPES)), b.to(draw.choice(DTYPES))


def some_file(draw: random.Random, folder: Path) -> Path:
    format = draw.choice(list(PREFIXES))
    prefix, down, up = PREFIXES[format]
    tensors: dict[str, torch.Tensor] = {}
    for name in draw.sample(NAMES, draw.randint(1, 3)):
        tensors[f"{prefix}{name}.{down}.weight"], tensors[f"{prefix}{name}.{up}.weight"] = halves(draw)
        if (alpha := draw.choice(ALPHAS)) is not None and format != "peft":
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
    if format != "peft":
        save_file(tensors, folder / "in.safetensors")
        return folder / "in.safetensors"
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": draw.choice((1, 2, 4)), "lora_alpha": draw.choice((1, 4, 0, -1))}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def options(draw: random.Random) -> dict[str, object]:
    every = {"scale": (1.0, 0.5, 1e30, 0.0, -1.0), "lora_alpha": (4.0,), "dtype": ("float32", "bfloat16", "float16")}
    return {name: draw.choice(values) for name, values in every.items() if draw.random() < 0.4}


@pytest.mark.parametrize("seed", range(150))
def test_repair_writes_what_reads_back_or_says_a_sentence(seed: int, tmp_path: Path) -> None:
    for number in range(4):
        draw = random.Random(4 * seed + number)
        (folder := tmp_path / str(number)).mkdir()
        lora, to, out = some_file(draw, folder), draw.choice(list(FORMATS)), tmp_path / f"out{number}" / "file"
        before = {file: file.read_bytes() for file in folder.iterdir()}
        said = ""
        try:
            assert Path(repair_file(lora, to, out, **options(draw)).path).exists()
        except UserError as error:
            said = str(error)
        assert "\n" not in said
        assert not said or not list(out.parent.iterdir() if out.parent.exists() else ())
        assert {file: file.read_bytes() for file in folder.iterdir()} == before
