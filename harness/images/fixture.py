"""Where the tiny trained pipeline and its LoRAs lie: in the checkout, or inside the installed package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.errors import UserError
from harness.fixtures import fixtures_folder

MERGED_LORA, SPLIT_LORA = "r8_a16", "r8_a16_split"  # alpha differs from rank: rank = alpha hides the two commonest bugs
_LORAS = {"qwen-image-fused": MERGED_LORA, "qwen-image": SPLIT_LORA}  # by bench, the one to prefer first
_FILES = {
    "peft": "peft",
    "kohya": "kohya.safetensors",
    "diffusers": "diffusers.safetensors",
    "diffsynth": "diffsynth.safetensors",
}


def base_pipeline() -> Path:
    """Return the folder of the tiny trained Qwen-Image pipeline.

    Raises:
        UserError: it is not there (an installation without its data files).
    """
    return _find(Path("base") / "model_index.json").parent


def lora_file(name: str, form: str) -> Path:
    """Return a committed LoRA, `name` as in fixtures/loras (`r8_a16`, `r16_a4_rslora`, ...), in `form`.

    Raises:
        UserError: there is no such LoRA or format.
    """
    if form not in _FILES:
        raise UserError(
            f"form={form!r}: committed LoRAs come as {', '.join(_FILES)}; diffsynth only for rank 8, alpha 16"
        )
    return _find(Path("loras") / name / _FILES[form])


def lora_for(cells: Sequence[tuple[str, str]]) -> Path:
    """Return the default LoRA (rank 8, alpha 16) for a loader that supports these (format, bench) cells.

    Merged QKV, on which the founding case was trained, comes first; then the stock layers.

    Raises:
        UserError: none of the committed formats is among them.
    """
    found = _choice(cells)
    if found is None:
        said = ", ".join(dict.fromkeys(f"{form} on {bench}" for form, bench in cells))
        known = f"{', '.join(_FILES)} on {' and '.join(_LORAS)}"
        raise UserError(f"this loader takes {said}, but the committed LoRAs are {known}: pass a LoRA file of your own")
    return lora_file(*found)


def has_lora_for(cells: Sequence[tuple[str, str]]) -> bool:
    """Tell whether `lora_for` has a LoRA for these (format, bench) cells."""
    return _choice(cells) is not None


def _choice(cells: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    choices = ((name, form) for bench, name in _LORAS.items() for form, on in cells if on == bench and form in _FILES)
    return next(choices, None)


def _find(relative: Path) -> Path:
    path = fixtures_folder() / relative
    if not path.exists():
        raise UserError(f"{path}: not there; build it with `python fixtures/build_base.py` and build_loras.py")
    return path
