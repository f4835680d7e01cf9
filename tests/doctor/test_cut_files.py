"""A file that is cut while it is read is one sentence and exit code 2, not a dead process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.doctor.checkpoint import Checkpoint
from harness.errors import LoraFileError
from harness.files import LoraWeights, read_header, read_lora, write_lora
from harness.files import safetensors_file as module

NAMES = ("blocks.0.to_q", "blocks.1.to_q")
WIDE = 40_000
CUT_AT = """
import os, sys
from harness.doctor.checkpoint import Checkpoint
from harness.files import LoraAdapter
path, owner, name, calls = sys.argv[1], *sys.argv[2].split("."), int(sys.argv[3])
owner = {"Checkpoint": Checkpoint, "LoraAdapter": LoraAdapter}[owner]
real, seen = getattr(owner, name), [0]
def cutting(self, *arguments):
    seen[0] += 1
    if seen[0] == calls:
        os.truncate(path, os.path.getsize(path) // 100)
    return real(self, *arguments)
setattr(owner, name, cutting)
sys.argv = ["lora-harness", *sys.argv[4:]]
from harness.cli import main
main()
"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A LoRA file in two containers, the model that it fits and a merge of it."""
    modules = {name: LoraWeights(torch.randn(4, WIDE), torch.randn(64, 4), 4.0) for name in NAMES}
    write_lora(tmp_path / "lora", "diffsynth", modules)
    base = {f"{name}.weight": torch.randn(64, WIDE) for name in NAMES}
    save_file(base, tmp_path / "base.safetensors")
    merged = {f"{name}.weight": base[f"{name}.weight"] + modules[name].b @ modules[name].a for name in NAMES}
    save_file(merged, tmp_path / "merged.safetensors")
    return tmp_path


def cut_while(folder: Path, file: str, call: str, at: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that finds `file` cut at call number `at`."""
    run = [sys.executable, "-c", CUT_AT, str(folder / file), call, str(at), *command]
    return subprocess.run(run, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def is_one_sentence(done: subprocess.CompletedProcess[str], file: str) -> None:
    """Exit code 2 and one line that names the file."""
    assert done.returncode == 2, done.stderr
    assert file in done.stderr
    assert "shorter than it was" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


LORA, TENSORS, ROWS = "lora.safetensors", "LoraAdapter.tensors", "Checkpoint.rows"
MERGE = ("verify", "--base", "base.safetensors", "--merged", "merged.safetensors", "--lora", LORA)


@pytest.mark.parametrize(
    ("file", "call", "command"),
    [
        (LORA, TENSORS, ("repair", LORA, "--to", "kohya", "--out", "new")),
        (LORA, TENSORS, ("inspect", LORA, "--energy")),
        ("base.safetensors", ROWS, MERGE),
        ("merged.safetensors", ROWS, (*MERGE, "--full")),
        ("base.safetensors", ROWS, ("inspect", LORA, "--energy", "--base", "base.safetensors")),
    ],
)
@pytest.mark.parametrize("at", [1, 2])
def test_every_command_that_reads_weights(
    library: Path, file: str, call: str, command: tuple[str, ...], at: int
) -> None:
    before = sorted(entry.name for entry in library.iterdir())
    is_one_sentence(cut_while(library, file, call, at, *command), file)
    assert sorted(entry.name for entry in library.iterdir()) == before


@pytest.mark.parametrize("command", [("inspect", "lora.gguf", "--energy"), ("repair", "lora.gguf", "--to", "kohya")])
@pytest.mark.parametrize("at", [1, 2])
def test_every_command_that_reads_gguf(tmp_path: Path, command: tuple[str, ...], at: int) -> None:
    pytest.importorskip("gguf")
    made = {f"blk.{block}.attn_q": LoraWeights(torch.randn(4, WIDE), torch.randn(64, 4), 4.0) for block in range(2)}
    write_lora(tmp_path / "lora", "gguf", made)
    where = ("--out", "new") if command[0] == "repair" else ()
    is_one_sentence(cut_while(tmp_path, "lora.gguf", "LoraAdapter.tensors", at, *command, *where), "lora.gguf")


@pytest.mark.parametrize("rows", [2, 4000])
def test_a_checkpoint_cut_between_two_reads(tmp_path: Path, rows: int) -> None:
    save_file({"layer.weight": torch.randn(4000, 300)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "model.safetensors")
    assert checkpoint.rows("layer.weight", 4000 - rows, 4000).shape == (rows, 300)
    os.truncate(tmp_path / "model.safetensors", 100_000)
    with pytest.raises(LoraFileError, match="shorter than it was"):
        checkpoint.rows("layer.weight", 4000 - rows, 4000)


def test_a_header_cut_before_safetensors_sees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It maps what it opens, so it never opens the file that somebody can cut."""
    path = tmp_path / "many.safetensors"
    save_file({f"layer.{number}": torch.ones(1) for number in range(50)}, path)
    whole, seen = read_header(path), []
    real = module._header_bytes

    def cutting(path: Path, size: int) -> bytes:
        raw = real(path, size)
        seen.append(os.truncate(path, 0))
        return raw

    monkeypatch.setattr(module, "_header_bytes", cutting)
    assert read_header(path) == whole
    assert seen
    with pytest.raises(LoraFileError, match="shorter than it was"):
        whole.tensor("layer.3")


def test_an_alpha_cut_before_it_is_read(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a", "kohya", {"x.to_q": LoraWeights(torch.ones(4, 9), torch.ones(9, 4), 4.0)})
    file = read_header(path)
    os.truncate(path, 100)
    with pytest.raises(LoraFileError, match="shorter than it was"):
        file.numbers([key for key in file.keys if key.endswith("alpha")])


def test_what_was_read_outlives_the_file(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a", "kohya", {"x.to_q": LoraWeights(torch.ones(4, 9), torch.ones(9, 4), 4.0)})
    adapter = read_lora(path)
    pair = adapter.tensors(next(iter(adapter.modules)))
    path.write_bytes(bytes(path.stat().st_size))
    assert all(bool((half == 1).all()) for half in pair)


@pytest.mark.parametrize("format", ["kohya", "gguf"])
def test_a_process_that_may_write_nothing_reads(tmp_path: Path, format: str) -> None:
    """As a loader's, which may have taken that right from itself."""
    if format == "gguf":
        pytest.importorskip("gguf")
    name = "blk.0.attn_q" if format == "gguf" else "x.to_q"
    path = write_lora(tmp_path / "a", format, {name: LoraWeights(torch.ones(4, 32), torch.ones(9, 4), 4.0)})
    program = (
        "import resource, sys\nfrom harness.files import read_lora\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "adapter = read_lora(sys.argv[1])\n"
        "sys.exit(0 if adapter.tensors(next(iter(adapter.modules)))[0].shape == (4, 32) else 1)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)], timeout=120, check=False).returncode == 0
