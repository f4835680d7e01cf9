"""Header-only work stays light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from harness.files import LoraWeights, write_lora

_READ = """
import sys
import harness.files
assert "numpy" not in sys.modules
from harness.files import read_lora
adapter = read_lora(sys.argv[1])
assert adapter.modules["x"].alpha == 3.0, adapter
heavy = {"torch", "peft", "diffusers", "pydantic"} & set(sys.modules)
assert not heavy, heavy
"""


def test_reading_a_header_and_its_alphas_imports_no_torch(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x", "kohya", {"x": LoraWeights(torch.ones(2, 3), torch.ones(4, 2), 3.0)})
    done = subprocess.run([sys.executable, "-c", _READ, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
