"""Files as trainers write them, in the sizes of real models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from harness.doctor.answer import Answer, Question
from harness.doctor.answers import answers
from harness.doctor.traits import Traits
from harness.files import read_lora
from tests.cases.layouts import Layout, of

HF = "base_model.model."
A, DOWN = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]}
LLM = [f"model.layers.{number}.self_attn.{name}_proj" for number in range(3) for name in "qv"]
Tensors = dict[str, tuple[int, ...]]


def pairs(
    names: Iterable[str], width: int, inputs: int = 0, *, halves: tuple[str, str] = A, prefix: str = "",
    alpha: bool = False,
) -> Tensors:  # fmt: skip
    """Return pairs of rank 2 [width, inputs] for these layers; alpha is 4 where there is one."""
    found: Tensors = {}
    for name in names:
        stem = f"{prefix}{name}"
        found |= {f"{stem}.{halves[0]}": (2, inputs or width), f"{stem}.{halves[1]}": (width, 2)}
        found |= {f"{stem}.alpha": ()} if alpha else {}
    return found


def kohya(names: Iterable[str], width: int, inputs: int = 0) -> Tensors:
    return pairs((n.replace(".", "_") for n in names), width, inputs, halves=DOWN, prefix="lora_unet_", alpha=True)


def written(folder: Path, tensors: Mapping[str, tuple[int, ...]], **fields: Any) -> Path:
    layout: Layout = of("file", tensors, **fields)
    return layout.write(folder)


def asked(path: Path, **question: Any) -> dict[str, Answer]:
    return answers(Traits(read_lora(path, strict=False)), Question(**question))


def blocks(stack: str, number: int, *layers: str) -> list[str]:
    return [f"{stack}.{place}.{layer}" for place in range(number) for layer in layers]
