"""A merger in another process: base and LoRA file in, merged file out; needs only torch and safetensors.

    lora-harness check "cmd:python examples/merge_cmd.py --base {base} --lora {lora} --strength {strength} --out {out}"

It reads every core format: PEFT folders, kohya, diffusers and DiffSynth files. Only the changed weights are written.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PAIR = re.compile(r"(?P<name>.+)\.(?:lora_(?:down|A)|lora\.down)(?:\.default)?\.weight")
PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "lora_unet_")


def main() -> None:
    """Merge one LoRA file into the weights of `--base`."""
    options = _options()
    try:
        save_file(merge(load_file(options.base), options.lora, options.strength), options.out)
    except NotImplementedError as error:
        raise SystemExit(str(error)) from None


def merge(base: dict[str, torch.Tensor], path: Path, strength: float) -> dict[str, torch.Tensor]:
    """Return the weights of `base` that the LoRA at `path` changes, changed."""
    lora, config = _read(path)
    names = {key.removesuffix(".weight").replace(".", "_"): key for key in base}
    merged, left = {}, set(lora)
    for down in filter(PAIR.fullmatch, lora):
        name = PAIR.fullmatch(down)["name"]  # type: ignore[index]  # filtered above
        a, b = lora[down], lora[_up(down)]
        left -= {down, _up(down), f"{name}.alpha"}
        module = _without_prefix(name)
        key = names[module.replace(".", "_")]
        factor = strength * _scale(lora.get(f"{name}.alpha"), config, module, a.shape[0])
        merged[key] = (base[key].double() + factor * (b.double() @ a.double())).to(base[key].dtype)
    if left:
        raise NotImplementedError(f"{len(left)} keys are not supported, first {min(left)}")
    return merged


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the model's weights, .safetensors")
    parser.add_argument("--lora", type=Path, required=True, help="the LoRA file, or the PEFT folder")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--out", type=Path, required=True, help="where the merged weights go, .safetensors")
    return parser.parse_args()


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the configuration (of the PEFT folder, or of diffusers' header; else empty)."""
    if path.is_dir():
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        return load_file(path / "adapter_model.safetensors"), config
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    return load_file(path), {key.removeprefix("transformer."): value for key, value in header.items()}


def _scale(alpha: torch.Tensor | None, config: dict[str, Any], module: str, rank: int) -> float:
    """Return alpha / rank (alpha / sqrt(rank) for rsLoRA), or 1 when the file carries no alpha."""
    if alpha is not None:
        return float(alpha) / rank
    if "lora_alpha" not in config:
        return 1.0
    # PEFT's rule: a pattern is a regular expression that must match the end of the name, the first one wins.
    patterns = config.get("alpha_pattern") or {}
    found = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)]
    return float((found or [config["lora_alpha"]])[0]) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _up(down: str) -> str:
    for old, new in (("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora.down", "lora.up")):
        if f".{old}." in down:
            return down.replace(f".{old}.", f".{new}.")
    raise KeyError(down)


def _without_prefix(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


if __name__ == "__main__":
    main()
