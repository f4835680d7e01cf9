"""Which partial faults do pictures miss? Parts of a LoRA left out, judged from pictures and from one denoiser call.

python benchmarks/image_blind_spots.py
"""

from __future__ import annotations

from pathlib import Path

import torch

from harness.images import base_pipeline, lora_file, open_pipeline, run_sweep
from harness.images.reference import Reference, open_lora
from harness.loaders.protocol import Subject

PARTS = {
    "nothing left out": (),
    "all of QKV": ("to_qkv", "add_qkv_proj"),
    "img_mod, txt_mod": ("img_mod", "txt_mod"),
    "img_mlp": ("img_mlp",),
    "block 2": ("transformer_blocks.2.",),
    "one layer (blocks.1 img_mlp.net.2)": ("blocks.1.img_mlp.net.2",),
    "one layer (blocks.1 attn.to_out.0)": ("blocks.1.attn.to_out.0",),
    "txt_mlp": ("txt_mlp",),
    "to_add_out": ("to_add_out",),
    "last block's text path": ("blocks.3.txt_mlp", "blocks.3.attn.to_add_out", "blocks.3.txt_mod"),
}


def main() -> None:
    """Print one row per left-out part."""
    opened, lora = open_pipeline(base_pipeline()), lora_file("r8_a16", "peft")
    trained = Reference(opened, open_lora(lora, opened)).at(1.0).state_dict()
    trained = {name: value.clone() for name, value in trained.items()}
    print("| left out | pictures | looks like | unexplained | probe | looks like | unexplained |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for label, parts in PARTS.items():

        def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0, parts: tuple[str, ...] = parts) -> None:
            kept = {n: v for n, v in trained.items() if not any(part in n for part in parts)}
            model.load_state_dict(kept, strict=False)

        cells = []
        for quick in (False, True):
            subject = Subject(label, load)
            found = run_sweep(subject, pipeline=opened, lora=lora, alphas=(1,), progress=False, quick=quick)
            seen = found.observations[0].estimate
            assert seen is not None
            assert found.judgement is not None
            cells += [found.judgement.finding, f"{seen.strength:.3f}", f"{seen.residual:.3f}"]
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
