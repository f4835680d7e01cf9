"""`lora-harness benches`: every bench by name, what is measured of one and what is not, what a file for it holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from harness.benches import bench_names, more_benches
from harness.commands.benches import command
from harness.errors import UserError
from harness.files import read_lora

TAILS = ("alpha", "lora_down.weight", "lora_up.weight")


def told(*arguments: str) -> str:
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    return done.output


def test_every_bench_is_listed() -> None:
    lines = told().splitlines()
    assert [line.split()[0] for line in lines][: len(bench_names())] == list(bench_names())
    assert {line.split()[0] for line in lines} >= {*bench_names(), *more_benches()}
    assert len(told("--json").splitlines()) == len(lines)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mixtral", "not measured, only looked at for being changed: model.layers.*.mlp.gate.weight"),  # the router
        ("gpt2", "lm_head shares its weight with transformer.wte: a merge into one changes both"),
        ("sd-unet", "read, without a LoRA: conv_in"),
    ],
)
def test_what_is_not_measured_is_told(name: str, says: str) -> None:
    assert says in told("--bench", name)
    (row,) = map(json.loads, told("--bench", name, "--json").splitlines())
    assert row["name"] == name
    assert any(line.startswith(says) for line in row["told"])


def test_a_file_for_a_bench_is_told_and_kept(tmp_path: Path) -> None:
    options = ["--bench", "qwen-image", "--format", "kohya", "--module", "transformer_blocks.0.attn.to_q=3:6"]
    lines = told(*options, "--seed", "5", "--out", str(tmp_path)).splitlines()
    stem = "lora_unet_transformer_blocks_0_attn_to_q"
    assert [line.split()[-1] for line in lines[1:-2]] == [f"{stem}.{end}" for end in TAILS]
    (kept,) = tmp_path.iterdir()
    (module,) = read_lora(kept).modules.values()
    assert (module.rank, module.alpha) == (3, 6.0)
    (row,) = map(json.loads, told(*options, "--json").splitlines())
    assert row["tensors"][f"{stem}.lora_down.weight"] == {"dtype": "F32", "shape": [3, 48]}


def test_a_configuration_is_told_too() -> None:
    assert '"lora_alpha": 24' in told("--bench", "gpt2", "--format", "peft", "--rank", "2", "--alpha", "24")


@pytest.mark.parametrize(("bench", "other"), [("wan21-t2v", True), ("gpt2", False)])
def test_who_reads_the_authors_names_is_told_how_to_get_them(bench: str, other: bool) -> None:
    plain = told("--bench", bench, "--format", "kohya")
    assert ("--variant qkv-merged" in plain) == other
    if other:
        assert "blocks_0_self_attn_q.alpha" in told("--bench", bench, "--format", "kohya", "--variant", "qkv-merged")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--format", "kohya"], "say which with --bench or --model"),
        (["--bench", "gpt2", "--rank", "4"], "need --format"),
        (["--bench", "gpt2", "--format", "zip"], "format='zip': not a format"),
        (
            ["--bench", "gpt2", "--format", "kohya", "--variant", "conv"],
            "gpt2 has no layer for conv; benches that do: ",
        ),
        (["--bench", "gpt2", "--format", "mlx", "--variant", "dora"], "mlx has no place for dora (formats that have: "),
        (["--bench", "gpt2", "--format", "xlabs"], "xlabs has no names for the layers of bench gpt2"),
        (["--bench", "flux", "--format", "bfl-control", "--alpha", "4"], "has no place for alpha"),
    ],
)
def test_no_such_file(options: list[str], says: str) -> None:
    done = CliRunner().invoke(command, options)
    assert done.exit_code == 2 or isinstance(done.exception, UserError)
    assert says in done.output + str(done.exception)
