"""22 merges that PEFT made of tiny language models, right and wrong: each gets its answer, sampled and full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from harness.doctor.verify.verify import verify_merge
from tests.doctor.peft_merges import Tensors, gpt2, llama, lora, lost, scaled, write

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own
BF16 = torch.bfloat16
_TINY = {"dtype": BF16, "size": 0.0005}


class Merge(NamedTuple):
    """One merge: exit code, code and a piece of the title; how it is made."""

    exit_code: int = 0
    code: str | None = None
    title: str = ""
    config: dict[str, Any] = {}  # noqa: RUF012
    how: dict[str, Any] = {}  # noqa: RUF012
    model: Callable[[], Any] = llama


def at(factor: float) -> Callable[[Any], None]:
    """Return what lets PEFT merge at `factor` times the trained scale."""

    def change(model: Any) -> None:
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling = {name: factor * scale for name, scale in module.scaling.items()}

    return change


def stored(dtype: torch.dtype) -> Callable[[Any], None]:
    """Return what stores the LoRA in a dtype of its own."""

    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)

    return change


def edited(merged: Tensors, base: Tensors) -> None:
    """Change a layer that the LoRA leaves alone."""
    merged["model.layers.0.mlp.up_proj.weight"] += 0.01


def moved(merged: Tensors, base: Tensors) -> None:
    """Start from another base."""
    for name in base:
        merged[name] += 1e-3 * torch.randn_like(merged[name])


LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
MERGES = {
    "float32": Merge(config=LLAMA),
    "bfloat16": Merge(config=LLAMA, how={"dtype": BF16}),
    "bfloat16, safe_merge": Merge(config=LLAMA, how={"dtype": BF16, "safe_merge": True}),
    "bfloat16, a weak LoRA": Merge(config=LLAMA, how=_TINY),
    "8 times a weak LoRA": Merge(1, "LH201", "or 8 times the trained scale", LLAMA, {**_TINY, "before": at(8)}),
    "twice": Merge(1, "LH206", "merged twice", LLAMA, {"before": at(2)}),
    "half, bfloat16": Merge(1, "LH202", "or 0.5 times the trained scale", LLAMA, {"dtype": BF16, "before": at(0.5)}),
    "one layer left out": Merge(
        1, "LH102", "not merged: 1 of 6", LLAMA, {"dtype": BF16, "change": lost("layers.1.self_attn.q_proj")}
    ),
    "an edit elsewhere": Merge(1, "LH401", "", LLAMA, {"change": edited}),
    "nothing merged": Merge(1, "LH101", "nothing was merged", LLAMA, {"change": lost("")}),
    "merged again": Merge(1, "LH206", "merged twice", LLAMA, {"change": scaled("", 2)}),
    "rank-stabilised": Merge(config={"use_rslora": True}),
    "patterns": Merge(config={"rank_pattern": {"layers.1.self_attn.q_proj": 4}, "alpha_pattern": {"v_proj": 3}}),
    "embedding": Merge(config={"target_modules": ["q_proj", "embed_tokens"]}),
    "tied embedding": Merge(config={"target_modules": ["q_proj", "embed_tokens"]}, model=lambda: llama(tie=True)),
    "saved head": Merge(config={"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved head lost": Merge(
        1, "LH102", "not merged: 1 of 3 modules (lm_head)",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"change": lost("lm_head")},
    ),
    "DoRA": Merge(config={"use_dora": True}),
    "Conv1D": Merge(config={"target_modules": ["c_attn"], "fan_in_fan_out": True}, model=gpt2),
    "LoRA in bfloat16": Merge(config=LLAMA, how={"before": stored(BF16)}),
    "no bias": Merge(config={"target_modules": ["q_proj"], "lora_bias": False}),
    "another base": Merge(1, "LH401", "wrong base", LLAMA, {"change": moved}),
}  # fmt: skip


@pytest.mark.parametrize("name", MERGES)
def test_every_merge_gets_its_answer(name: str, tmp_path: Path) -> None:
    merge = MERGES[name]
    paths = write(tmp_path, merge.model(), lora(**merge.config), **merge.how)
    for full in (False, True):
        report = verify_merge(*paths, full=full)
        assert (report.exit_code, report.overall.code) == (merge.exit_code, merge.code), report.overall.text()
        assert merge.title in report.overall.title


def test_all_22_are_here() -> None:
    assert len(MERGES) == 22
