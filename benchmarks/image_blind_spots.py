"""Which partial faults do pictures miss? Parts of a LoRA left out, judged from pictures and from one denoiser call.

python -m benchmarks.image_blind_spots
"""

from __future__ import annotations

from pathlib import Path

import torch

from harness.images import base_pipeline, lora_file, open_pipeline, run_sweep
from harness.images.reference import Reference, open_lora
from harness.loaders.protocol import Subject

PARTS = {
    "nothing": (),
    "all of QKV": ("to_qkv", "add_qkv_proj"),
    "img_mod and txt_mod": ("img_mod", "txt_mod"),
    "img_mlp": ("img_mlp",),
    "one block of four": ("transformer_blocks.2.",),
    "one layer (blocks.1 img_mlp.net.2)": ("blocks.1.img_mlp.net.2",),
    "one layer (blocks.1 attn.to_out.0)": ("blocks.1.attn.to_out.0",),
    "all txt_mlp": ("txt_mlp",),
    "all to_add_out": ("to_add_out",),
    "the last block's text path": ("blocks.3.txt_mlp", "blocks.3.attn.to_add_out", "blocks.3.txt_mod"),
}


_HEADING = """## What pictures miss

`benchmarks/image_blind_spots.py`, r8_a16 on the first base, 8 pictures, float32, parts of the LoRA left out; in bold
what they miss:"""
_CLOSING = """Pictures see the size of the effect, not its cause: a part left out is reported as a wrong strength, and
what hardly reaches the picture not at all. `lora-harness check` reads every layer's weights; no picture replaces it."""


def section() -> str:
    """Measure, and return the section of the document: one row per left-out part."""
    opened, lora = open_pipeline(base_pipeline()), lora_file("r8_a16", "peft")
    trained = Reference(opened, open_lora(lora, opened)).at(1.0).state_dict()
    trained = {name: value.clone() for name, value in trained.items()}
    rows = ["| left out | pictures say | looks like | probe says | looks like |", "| --- | --- | --- | --- | --- |"]
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
            what = found.judgement.finding
            missed = bool(parts) and found.judgement.code is None
            cells += [f"**{what}**" if missed else what, f"{seen.strength:.3f}"]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([_HEADING, "", *rows, "", _CLOSING])


if __name__ == "__main__":
    print(section())
