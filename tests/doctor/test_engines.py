"""`inspect --for`: what vLLM and SGLang do with a PEFT folder, by their own rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from harness.cli import main
from harness.doctor.inspect.engines import engine_hazards, engines
from harness.errors import UserError
from harness.files import LoraWeights, read_lora, write_lora

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def folder(path: Path, *, rank: int = 8, names: tuple[str, ...] = (Q, V), **fields: object) -> Path:
    pairs = {name: LoraWeights(torch.randn(rank, 8), torch.randn(8, rank), 16.0) for name in names}
    written = write_lora(path / "lora", "peft", pairs)
    file = written / "adapter_config.json"
    config = {"peft_type": "LORA", **json.loads(file.read_text()), "rank_pattern": {}, "alpha_pattern": {}, **fields}
    file.write_text(json.dumps({key: value for key, value in config.items() if value != "left out"}))
    return written


def codes(lora: Path, engine: str, **options: int) -> list[str]:
    return [hazard.code for hazard in engine_hazards(read_lora(lora, strict=False), engine, **options)]


# fields of the configuration: the codes for vLLM and for SGLang (LH724 refused, LH725 with a reservation)
RULES: list[tuple[dict[str, object], list[str], list[str]]] = [
    ({}, [], []),
    ({"use_dora": True}, ["LH724"], ["LH724"]),
    ({"use_rslora": True}, [], ["LH725"]),
    ({"modules_to_save": ["lm_head"]}, ["LH724"], ["LH725"]),
    ({"modules_to_save": ["score"]}, [], ["LH725"]),
    ({"bias": "all"}, ["LH724"], ["LH725"]),
    ({"lora_bias": True}, ["LH724"], ["LH725"]),
    ({"init_lora_weights": "pissa"}, ["LH724"], []),
    ({"init_lora_weights": "eva"}, [], []),
    ({"init_lora_weights": True}, [], []),
    ({"alora_invocation_tokens": [1]}, ["LH724"], ["LH725"]),
    ({"layer_replication": [[0, 1]]}, ["LH724"], ["LH725"]),
    ({"alpha_pattern": {"v_proj": 4}}, [], ["LH725"]),
    ({"target_modules": ".*(q|v)_proj"}, [], ["LH724"]),
    ({"target_modules": "all-linear"}, [], []),
    ({"lora_alpha": "left out"}, ["LH724"], ["LH724"]),
    ({"peft_type": "left out"}, [], ["LH724"]),
]


@pytest.mark.parametrize(("fields", "vllm", "sglang"), RULES, ids=lambda value: str(value)[:40])
def test_the_configuration_decides(
    tmp_path: Path, fields: dict[str, object], vllm: list[str], sglang: list[str]
) -> None:
    lora = folder(tmp_path, **fields)
    assert (codes(lora, "vllm"), codes(lora, "sglang")) == (vllm, sglang)


@pytest.mark.parametrize(
    ("rank", "limit", "found"), [(16, None, []), (48, None, ["LH725"]), (48, 64, []), (48, 32, ["LH724"])]
)
def test_the_rank_is_held_against_the_limit_of_the_server(
    tmp_path: Path, rank: int, limit: int | None, found: list[str]
) -> None:
    lora = folder(tmp_path, rank=rank)
    assert [hazard.code for hazard in engine_hazards(read_lora(lora), "vllm", limit)] == found


def test_the_largest_rank_of_a_pattern_counts(tmp_path: Path) -> None:
    (hazard,) = engine_hazards(read_lora(folder(tmp_path, rank_pattern={"nothing": 300})), "vllm")
    assert "rank 300 needs --max-lora-rank 320" in hazard.what


def test_a_query_alone_is_stacked_by_sglang_only(tmp_path: Path) -> None:
    lora = folder(tmp_path, names=(Q,))
    assert (codes(lora, "vllm"), codes(lora, "sglang")) == ([], ["LH724"])


def test_another_format_is_refused(tmp_path: Path) -> None:
    pairs = {Q: LoraWeights(torch.randn(4, 8), torch.randn(8, 4), 4.0)}
    assert codes(write_lora(tmp_path / "lora", "kohya", pairs), "vllm") == ["LH724"]


def test_added_tokens_are_said(tmp_path: Path) -> None:
    lora = folder(tmp_path)
    (lora / "added_tokens.json").write_text('{"<x>": 100}')
    assert codes(lora, "sglang") == ["LH725"]


def test_every_rule_says_what_happens_and_where() -> None:
    for engine in engines().values():
        assert {"title", "version", "date"} <= engine.keys()
        for rule in engine["rules"]:
            assert ("refuses" in rule) + ("leaves_out" in rule) == 1
            assert sum(kind in rule for kind in ("set", "missing", "not_in")) == 1
            assert rule["where"]


def test_the_command_line_tells_version_date_and_place(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["inspect", str(folder(tmp_path, use_dora=True)), "--for", "vllm"])
    assert done.exit_code == 1
    said = " ".join(done.output.split())
    assert all(word in said for word in ("vLLM 0.33.0 (2026-11-01) refuses it", "peft_helper.py", "LH724"))


def test_an_unknown_engine_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="known are vllm, sglang"):
        codes(folder(tmp_path), "ollama")
    assert CliRunner().invoke(main, ["inspect", str(tmp_path / "lora"), "--for", "ollama"]).exit_code == 2
