"""Every malformed and hostile file, through the commands: one sentence, the right exit code, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from fixtures.build_malformed import (
    CASES,
    FILE_CASES,
    HAZARD_CASES,
    MODULE_CASES,
    Case,
    P,
    build,
    dotted,
    floats,
    framed,
    kohya,
    tensors_file,
)
from harness.cli import main

CATASTROPHIC = "(a|aa)+[^a]"


def content(tensors: dict[str, Any], **metadata: str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(tensors_file(tensors, metadata))


def folder(tensors: dict[str, Any] | None = None, **config: object) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        path.mkdir()
        (path / "adapter_model.safetensors").write_bytes(tensors_file(tensors or dotted(P)))
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
        (path / "adapter_config.json").write_text(json.dumps(fields))

    return write


def linked(path: Path) -> None:
    folder()(path)
    weights = path / "adapter_model.safetensors"
    weights.rename(path.parent / "elsewhere.safetensors")
    weights.symlink_to(path.parent / "elsewhere.safetensors")


LONG = dotted(f"{P}.{'a' * 60}")
NAN, INF = float("nan"), float("inf")
# what is wrong with these is not in the header, or not wrong at all: the answer may not hang, crash or load anything
MORE = (
    Case("weights_nan", content(kohya(A=floats(2, 4, value=NAN))), ("NaN or infinite weights",), "LH707"),
    Case("weights_infinite", content(kohya(B=floats(3, 2, value=INF))), ("NaN or infinite weights",), "LH707"),
    Case("regex_in_target_modules", folder(LONG, target_modules=CATASTROPHIC), ("PEFT ignores",), "LH720", "lora"),
    Case("regex_in_exclude_modules", folder(LONG, exclude_modules=CATASTROPHIC), ("too long",), "LH727", "lora"),
    Case("unknown_configuration_key", folder(whatever=[1]), (), "", "lora"),
    Case("module_to_import", folder(auto_mapping={"parent_library": "this"}, megatron_core="this"), (), "", "lora"),
    Case("base_that_leads_out", folder(base_model_name_or_path="../../etc\x1b[2J"), (), "", "lora"),
    Case("weights_behind_a_link", linked, (), "", "lora"),
    Case("header_of_spaces", lambda path: path.write_bytes(framed(b"{}" + b" " * 26_000_000)), ("26,000,002 bytes",)),
)  # fmt: skip
WITH_ENERGIES = [*HAZARD_CASES, *MORE[:8]]
WHOLE_FILE_FINE = {"not_a_lora", "mixed_formats", "duplicate_tensor", "sparse_4_terabytes"}


@dataclass
class Model:
    """A base, a merge and a LoRA that are well."""

    folder: Path

    def verify(self, **given: Path) -> Result:
        paths = {name: self.folder / f"{name}.safetensors" for name in ("base", "merged", "lora")} | given
        return run("verify", *(word for name, path in paths.items() for word in (f"--{name}", str(path))))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    home = tmp_path_factory.mktemp("model")
    save_file({"x.weight": torch.ones(3, 4)}, home / "base.safetensors")
    save_file({"x.weight": torch.full((3, 4), 2.0)}, home / "merged.safetensors")
    (home / "lora.safetensors").write_bytes(tensors_file(kohya()))
    return Model(home)


def run(*arguments: str) -> Result:
    start = time.perf_counter()
    done = CliRunner().invoke(main, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    assert time.perf_counter() - start < 20
    assert "Traceback" not in done.output
    assert all(line.isprintable() for line in done.output.splitlines()), done.output
    return done


def refused(done: Result, *says: str) -> None:
    assert done.exit_code == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in says), lines[0]


@pytest.mark.parametrize("case", [*FILE_CASES, *MODULE_CASES], ids=lambda case: case.name)
def test_verify_refuses_the_lora_in_one_sentence(tmp_path: Path, model: Model, case: Case) -> None:
    path = build(case, tmp_path)
    refused(model.verify(lora=path), str(tmp_path), *case.says)


@pytest.mark.parametrize("case", [c for c in FILE_CASES if c.name not in WHOLE_FILE_FINE], ids=lambda case: case.name)
def test_no_checkpoint_is_read_from_a_broken_file(tmp_path: Path, model: Model, case: Case) -> None:
    path = build(case, tmp_path)
    refused(model.verify(base=path), str(path))
    refused(model.verify(merged=path), str(path))
    refused(run("inspect", str(model.folder / "lora.safetensors"), "--base", str(path)), str(path))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_inspect_says_what_is_wrong_on_the_terminal(tmp_path: Path, case: Case) -> None:
    done = run("inspect", str(build(case, tmp_path)))
    unreadable = any(said in done.output for said in ("LH799 unreadable", "LH797 no known LoRA layout"))
    assert done.exit_code == 2 if unreadable else done.exit_code in (0, 1)
    assert unreadable == (case.code in ("LH799", "LH797"))
    assert case.code in done.output
    if unreadable and case.name != "duplicate_tensor":  # of which the rest can still be read
        assert done.output.count("\n") == 2  # the path and the sentence


@pytest.mark.parametrize("case", WITH_ENERGIES, ids=lambda case: case.name)
def test_what_can_be_read_is_verified_or_explained(tmp_path: Path, model: Model, case: Case) -> None:
    done = model.verify(lora=build(case, tmp_path))
    assert done.exit_code in (1, 2, 3)
    assert "scale nan" not in done.output
    if case.code == "LH707":
        assert all(word in done.output for word in (case.code, *case.says)), done.output


@pytest.mark.parametrize("case", MORE, ids=lambda case: case.name)
def test_inspect_with_energies_neither_hangs_nor_imports_anything(tmp_path: Path, case: Case) -> None:
    done = run("inspect", str(build(case, tmp_path)), "--energy", "--html", str(tmp_path / "page.html"))
    assert done.exit_code == {"LH707": 1, "LH720": 1, "LH727": 1, "LH797": 2, "LH799": 2}.get(case.code, 0)
    assert all(word in done.output for word in case.says)
    assert "this" not in sys.modules


def test_a_base_without_any_layer_of_the_lora_is_said(tmp_path: Path, model: Model) -> None:
    save_file({"other.weight": torch.ones(3, 4)}, tmp_path / "base.safetensors")
    done = run("inspect", str(model.folder / "lora.safetensors"), "--base", str(tmp_path / "base.safetensors"))
    assert "not for this base" in done.output
    assert done.exit_code == 1


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_options_that_are_no_number_are_refused(model: Model, value: str) -> None:
    lora = str(model.folder / "lora.safetensors")
    done = run("inspect", lora, "--lora-alpha", value)
    assert done.exit_code == 2
    assert "is no finite number" in done.stderr
    new = model.folder / "new.safetensors"
    for option in ("--scale", "--lora-alpha"):
        done = run("repair", lora, "--to", "comfyui", "--out", str(new), option, value)
        assert (done.exit_code, new.exists()) == (2, False)
        assert "is no finite number" in done.stderr
    paths = ("--base", lora, "--merged", lora, "--lora", lora)
    assert run("verify", *paths, "--strength", value).exit_code == 2


# A child's peak memory starts at that of the process that forked it: a small process between this one and the child.
_MEASURED = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(child.pid, 0)
print(os.waitstatus_to_exitcode(status), used.ru_maxrss, used.ru_utime + used.ru_stime)
"""


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="the system does not tell what a child used")
def test_all_of_them_together_stay_below_a_gigabyte_and_half_a_minute(tmp_path: Path) -> None:
    paths = [str(build(case, tmp_path)) for case in (*CASES, *MORE)]
    command = [sys.executable, "-c", _MEASURED, sys.executable, "-m", "harness", "inspect", *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    exit_code, kilobytes, seconds = done.stdout.split()
    assert (exit_code, done.stderr) == ("2", "")
    assert int(kilobytes) < 1_000_000
    assert float(seconds) < 30
