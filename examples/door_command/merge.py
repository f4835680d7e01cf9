"""merge.py BASE LORA STRENGTH OUT: merge a kohya file; needs torch and safetensors, not the harness."""

from __future__ import annotations

import sys

from safetensors.torch import load_file, save_file


def main(base_file: str, lora_file: str, strength: str, out: str) -> None:
    """Write the changed weights, under their names in the base."""
    base, lora = load_file(base_file), load_file(lora_file)
    if other := [key for key in lora if not key.endswith((".lora_down.weight", ".lora_up.weight", ".alpha"))]:
        raise SystemExit(f"{other[0]} is no key that is supported")
    keys = {"lora_unet_" + key.removesuffix(".weight").replace(".", "_"): key for key in base}
    merged = {}
    for down_key, down in lora.items():
        name, found, _ = down_key.partition(".lora_down.weight")
        if found:
            up, rank = lora[f"{name}.lora_up.weight"], down.shape[0]
            alpha = float(lora.get(f"{name}.alpha", rank))  # a file without alpha was trained at scale 1
            weight = base[keys[name]]
            delta = float(strength) * alpha / rank * (up.double() @ down.double())
            merged[keys[name]] = (weight.double() + delta).to(weight.dtype)
    save_file(merged, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
