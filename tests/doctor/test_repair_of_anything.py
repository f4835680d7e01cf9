"""Whatever a file holds, repair writes what reads back as trained, or says one sentence and leaves nothing."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.doctor import repair_file
from harness.errors import UserError
from harness.files import FORMATS, detect_format

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


SANE = (
    "blocks.0.to_q",
    "blocks.1.to_q",
    "double_blocks.0.img_attn.qkv",
    "down_blocks.0.x",
    "layers.3.self_attn.k_proj",
)


def halves(draw: random.Random, *, sane: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if sane:
        rank, dtype = draw.choice((1, 2, 4)), draw.choice(DTYPES[:3])
        return torch.randn(rank, 3).to(dtype), torch.randn(draw.choice((3, 4)), rank).to(dtype)
    rank, dims = draw.choice((0, 1, 2, 4)), draw.choice((1, 2, 2, 2, 3, 4, 5, 6))
    a = torch.randn([rank, *(draw.choice((1, 2, 3)) for _ in range(dims - 1))])
    b = torch.randn([draw.choice((1, 3, 4)), rank, *[1] * (dims - 2)][: max(dims, 2)])
    return a.to(draw.choice(DTYPES)), b.to(draw.choice(DTYPES))


OTHERS = (
    "diff", "diff_b", "set_weight", "dora_scale", "lora_magnitude_vector", "lora_B.bias", "weight", "bias",
    "modules_to_save.default.weight", "token_adapter.trainable_tokens_delta", "base_layer.bias", "w_norm",
    "hada_w1_a", "lokr_w1", "lora_mid.weight", "on_input", "alpha", "odd", "lora_A.other.weight",
)  # fmt: skip
FACTORS = ("lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "lora_B.bias", "lora_mid.weight")
STARTS = ("", "_orig_mod.", "module.", "lora_te1_", "lora_te2_", "text_encoder.", "text_encoders.clip_l.transformer.")


def others(draw: random.Random, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Add tensors that are no half of a pair, beside the modules and elsewhere."""
    stems = [key.rsplit(".lora_", 1)[0] for key in tensors]
    for _ in range(draw.choice((0, 0, 1, 2))):
        stem = draw.choice([*stems, f"{draw.choice(STARTS)}{prefix}{draw.choice(NAMES)}"])
        shape = draw.choice(((), (3,), (3, 1), (4, 3), (3, 3)))
        tensors.setdefault(f"{stem}.{draw.choice(OTHERS)}", torch.randn(shape).to(draw.choice(DTYPES[:4])))


def some_file(draw: random.Random, folder: Path) -> Path:
    format, sane = draw.choice(list(PREFIXES)), draw.random() < 0.6
    prefix, down, up = PREFIXES[format]
    tensors: dict[str, torch.Tensor] = {}
    for name in draw.sample(SANE if sane else NAMES, draw.randint(1, 3)):
        name = name.replace(".", "_") if sane and format == "kohya" else name
        tensors[f"{prefix}{name}.{down}.weight"], tensors[f"{prefix}{name}.{up}.weight"] = halves(draw, sane=sane)
        if (alpha := draw.choice((2.0, 4.0) if sane else ALPHAS)) is not None and format != "peft":
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(alpha, dtype=torch.float64)
    if draw.random() < (0.1 if sane else 0.3):
        start = draw.choice(STARTS)
        tensors = {f"{start}{key.removeprefix(prefix) if '_' in start else key}": one for key, one in tensors.items()}
    others(draw, tensors, prefix)
    if format != "peft":
        save_file(tensors, folder / "in.safetensors")
        return folder / "in.safetensors"
    save_file(tensors, folder / "adapter_model.safetensors")
    halves_a = {key: one for key, one in tensors.items() if key.endswith("lora_A.weight") and one.dim()}
    ranks = {key.split("model.", 2)[-1].split(".lora_A")[0]: len(one) for key, one in halves_a.items()}
    config = {"peft_type": "LORA", "r": draw.choice((1, 2, 4)), "lora_alpha": draw.choice((1, 4, 0, -1))}
    config |= {"rank_pattern": ranks, "lora_alpha": 3, "bias": draw.choice(("none", "all"))} if sane else {}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def some_format(draw: random.Random, lora: Path) -> str:
    """Return the file's own format every other time, where it has one."""
    with contextlib.suppress(UserError):
        if draw.random() < 0.5:
            return detect_format(lora)
    return draw.choice(list(FORMATS))


def options(draw: random.Random) -> dict[str, object]:
    every = {"scale": (1.0, 0.5, 1e30, 0.0, -1.0), "lora_alpha": (4.0,), "dtype": ("float32", "bfloat16", "float16")}
    return {name: draw.choice(values) for name, values in every.items() if draw.random() < 0.4}


def stored(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file or folder, read by nobody but safetensors; empty for GGUF."""
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return load_file(files[0]) if files[0].suffix == ".safetensors" else {}


def same_direction(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Tell whether two tensors are one but for a factor, the dtype and the way they are stored."""
    left, right = one.double().flatten(), other.double()
    turned = [right.flatten(), right.t().flatten()] if right.dim() == 2 else [right.flatten()]
    bound = 0.2 * float(left.norm())  # an 8-bit float is rounded by up to 1/16
    for flat in (flat for flat in turned if len(flat) == len(left)):
        factor = float(left @ flat / (flat @ flat)) if flat.any() else 0.0
        if float((left - factor * flat).norm()) <= bound or not flat.any():
            return True
    return False


def assert_nothing_is_lost(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> None:
    """Everything but alpha and copies of the base is in the new file: as it was, or but for a factor and rounding."""
    for key, tensor in old.items():
        if not key.endswith(("alpha", "base_layer.bias")):
            exact = any(
                one.dtype == tensor.dtype
                and one.shape == tensor.shape
                and one.contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8))
                for one in new.values()
                if one.dim()
            )
            factor = key.endswith(FACTORS)
            assert exact or not tensor.dim() or (factor and any(same_direction(tensor, one) for one in new.values())), (
                key
            )


@pytest.mark.parametrize("seed", range(150))
def test_repair_writes_what_reads_back_or_says_a_sentence(seed: int, tmp_path: Path) -> None:
    for number in range(4):
        draw = random.Random(4 * seed + number)
        (folder := tmp_path / str(number)).mkdir()
        lora, out = some_file(draw, folder), tmp_path / f"out{number}" / "file"
        to = some_format(draw, lora)
        before = {file: file.read_bytes() for file in folder.iterdir()}
        said = ""
        try:
            new = stored(Path(repair_file(lora, to, out, **options(draw)).path))
            assert_nothing_is_lost(stored(lora), new or stored(lora))
        except UserError as error:
            said = str(error)
        assert "\n" not in said
        assert not said or not list(out.parent.iterdir() if out.parent.exists() else ())
        assert {file: file.read_bytes() for file in folder.iterdir()} == before
