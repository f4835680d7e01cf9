"""`lora-harness benches`: every bench by name, and of one what is measured and what is not."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from harness.benches import bench_names, more_benches
from harness.commands.benches import command


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
