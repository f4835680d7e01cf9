"""q, k and v that a model keeps in one layer, head by head: by transformers' own code, a LoRA and a model of three."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BloomConfig, FalconConfig
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.falcon.modeling_falcon import FalconAttention

from harness.doctor import inspect_file
from harness.doctor.verify.verify import MergeReport, verify_merge

HEADS, SIZE = 4, 8
WIDE = HEADS * SIZE
Split = tuple[Tensor, Tensor, Tensor]  # the rows of the fused layer that q, k and v are
Tensors = dict[str, Tensor]


def bloom() -> Split:
    attention = BloomAttention(BloomConfig(hidden_size=WIDE, n_head=HEADS), layer_idx=0)
    parts = attention._reshape(torch.arange(3 * WIDE).reshape(1, 1, -1))
    return tuple(part.transpose(1, 2).flatten() for part in parts)  # type: ignore[return-value]


def gpt_neox() -> Split:
    """GPTNeoXAttention.forward: `.view(*input_shape, -1, 3 * head_size).chunk(3, dim=-1)`."""
    return tuple(part.flatten() for part in torch.arange(3 * WIDE).view(-1, 3 * SIZE).chunk(3, dim=-1))  # type: ignore[return-value]


def falcon(kv: int, **fields: Any) -> Callable[[], Split]:
    def split() -> Split:
        config = FalconConfig(hidden_size=WIDE, num_attention_heads=HEADS, num_kv_heads=kv, **fields)
        total = (HEADS + 2 * kv) * SIZE
        parts = FalconAttention(config)._split_heads(torch.arange(total).reshape(1, 1, -1))
        return tuple(part[0, 0].flatten().unique() for part in parts)  # type: ignore[return-value]

    return split


def internlm2() -> Split:
    """InternLM2's own code: `rearrange(qkv, "b q (h gs d) -> b q h gs d")`, then [..., :-2, :], -2 and -1 of gs."""
    rows = torch.arange((HEADS + 4) * SIZE).view(2, HEADS // 2 + 2, SIZE)
    return rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()


_COUNTS = {"num_attention_heads": HEADS}
_NEW = {"new_decoder_architecture": True, "num_kv_heads": 2}
_OLD = {"new_decoder_architecture": False, "multi_query": False}
MODELS: Mapping[str, tuple[dict[str, Any], str, str, Callable[[], Split]]] = {
    "gpt_neox": ({"model_type": "gpt_neox", **_COUNTS}, "attention.query_key_value", "attention.{}_proj", gpt_neox),
    "bloom": ({"model_type": "bloom", "n_head": HEADS}, "self_attention.query_key_value",
              "self_attention.{}_proj", bloom),
    "falcon": ({"model_type": "falcon", **_COUNTS, **_NEW}, "self_attention.query_key_value", "self_attention.{}_proj",
               falcon(2, new_decoder_architecture=True)),
    "falcon-rw": ({"model_type": "falcon", **_COUNTS, **_OLD}, "self_attention.query_key_value",
                  "self_attention.{}_proj", falcon(HEADS, multi_query=False)),
    "falcon-7b": ({"model_type": "falcon", **_COUNTS, "multi_query": True}, "self_attention.query_key_value",
                  "self_attention.{}_proj", falcon(1, multi_query=True)),
    "internlm2": ({"model_type": "internlm2", "num_key_value_heads": 2, **_COUNTS}, "attention.wqkv",
                  "self_attn.{}_proj", internlm2),
    "llamafied": ({"model_type": "llama", "num_key_value_heads": 2, **_COUNTS}, "attention.wqkv", "self_attn.{}_proj",
                  internlm2),
}  # fmt: skip


class Case:
    """One layer of a model, kept fused or split, and a LoRA of it, likewise."""

    def __init__(self, folder: Path, model: str) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.config, fused, split, parts = MODELS[model]
        self.fused, self.split = f"layers.0.{fused}", [f"layers.0.{split.format(letter)}" for letter in "qkv"]
        self.rows = parts()
        self.weight = 0.02 * torch.randn(int(sum(map(len, self.rows))), WIDE)
        self.a, self.b = torch.randn(4, WIDE), 0.02 * torch.randn(len(self.weight), 4)

    def model(self, name: str, weight: Tensor, *, split: bool) -> Path:
        weights = {key: weight[rows] for key, rows in zip(self.split, self.rows, strict=True)}
        (self.folder / name).mkdir()
        tensors = {f"{key}.weight": tensor for key, tensor in (weights if split else {self.fused: weight}).items()}
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()}, self.folder / name / "model.safetensors"
        )
        (self.folder / name / "config.json").write_text(json.dumps(self.config))
        return self.folder / name

    def lora(self, *, split: bool) -> Path:
        halves = {key: self.b[rows] for key, rows in zip(self.split, self.rows, strict=True)}
        tensors: Tensors = {}
        for key, b in (halves if split else {self.fused: self.b}).items():
            tensors |= {f"base_model.model.{key}.lora_A.weight": self.a.clone(),
                        f"base_model.model.{key}.lora_B.weight": b.contiguous()}  # fmt: skip
        (self.folder / "lora").mkdir()
        save_file(tensors, self.folder / "lora/adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
        (self.folder / "lora/adapter_config.json").write_text(json.dumps(config))
        return self.folder / "lora"

    def verified(self, update: Tensor, base: bool, merged: bool, lora: bool) -> MergeReport:
        before, after = (
            self.model("base", self.weight, split=base),
            self.model("merged", self.weight + update, split=merged),
        )
        return verify_merge(before, after, self.lora(split=lora))


WAYS = [(base, merged, lora) for base in (False, True) for merged in (False, True) for lora in (False, True)]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "".join("split " if one else "fused " for one in way).strip())
@pytest.mark.parametrize("model", MODELS)
def test_a_right_merge_is_right_and_a_stacked_one_wrong(
    model: str, way: tuple[bool, bool, bool], tmp_path: Path
) -> None:
    case = Case(tmp_path, model)
    report = case.verified(2 * case.b @ case.a, *way)
    assert report.exit_code == 0, report.overall.text()
    (tmp_path / "again").mkdir()
    other = Case(tmp_path / "again", model)
    order = torch.cat(other.rows)
    if not torch.equal(order, torch.arange(len(order))):  # taken for stacked: q first, then k, then v
        stacked = torch.empty_like(other.b)
        stacked[order] = other.b
        report = other.verified(2 * stacked @ other.a, *way)
        assert report.exit_code == 1, report.overall.text()


@pytest.mark.parametrize("lora", [False, True])
def test_one_part_that_was_left_out_is_named(lora: bool, tmp_path: Path) -> None:
    case = Case(tmp_path, "gpt_neox")
    update = 2 * case.b @ case.a
    update[case.rows[1]] = 0
    report = case.verified(update, True, True, lora)
    assert (report.exit_code, report.overall.code) == (1, "LH102"), report.overall.text()
    assert [("k_proj" in (verdict.worst_module or "")) for verdict in report.modules if not verdict.ok] == [True]


def test_without_a_configuration_the_rows_are_not_judged(tmp_path: Path) -> None:
    case = Case(tmp_path, "gpt_neox")
    before, after = case.model("base", case.weight, split=True), case.model("merged", case.weight, split=True)
    for folder in (before, after):
        (folder / "config.json").unlink()
    lora = case.lora(split=False)
    assert verify_merge(before, after, lora).exit_code == 3
    record = inspect_file(lora, base=before)
    assert record.fit is not None
    assert "interleave q, k and v by head" in next(iter(record.fit.unplaced.values()))


@pytest.mark.parametrize("split", [False, True])
def test_a_layer_that_a_module_may_be_is_not_blamed_for_its_change(split: bool, tmp_path: Path) -> None:
    case = Case(tmp_path, "gpt_neox")
    case.config = {}
    report = case.verified(2 * case.b @ case.a, not split, not split, split)
    assert (report.exit_code, report.untouched.changed) == (3, ()), report.overall.text()
