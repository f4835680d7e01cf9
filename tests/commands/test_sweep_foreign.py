"""`sweep` on a LoRA of another model says so before it imports what draws, and how to name a pipeline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from harness.commands import sweep
from harness.errors import UserError
from harness.fixtures import fixtures_folder

_QUICKLY = """
import sys
from harness.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print(end.code, sorted({"torch", "diffusers", "peft"} & set(sys.modules)))
"""
FOREIGN = {
    "sd": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "flux": "lora_unet_double_blocks_0_img_attn_proj",
    "wan": "lora_unet_blocks_0_self_attn_q",
    "text": "lora_te_text_model_encoder_layers_0_mlp_fc1",
}


def lora(path: Path, name: str, width: int = 64) -> Path:
    halves = {"lora_down": (4, width), "lora_up": (width, 4)}
    tensors = {f"{name}.{half}.weight": np.ones(shape, np.float32) for half, shape in halves.items()}
    save_file({**tensors, f"{name}.alpha": np.ones((), np.float32)}, path)
    return path


@pytest.mark.parametrize("name", FOREIGN)
def test_a_lora_of_another_model_is_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    path = lora(tmp_path / "a.safetensors", FOREIGN[name])
    with pytest.raises(UserError) as told:
        sweep._refuse_lora_of_another_model(path)
    for words in (str(path), "0 of its 1 module fit it", "toy model", "--pipeline DIR", "--allow-download"):
        assert words in str(told.value)


def test_a_lora_of_a_larger_model_of_the_same_kind_is_refused(tmp_path: Path) -> None:
    path = lora(tmp_path / "a.safetensors", "lora_unet_transformer_blocks_0_attn_to_out_0", 3072)
    with pytest.raises(UserError, match="toy model"):
        sweep._refuse_lora_of_another_model(path)


def test_every_committed_lora_is_taken() -> None:
    found = [path for path in (fixtures_folder() / "loras").glob("*/*") if path.suffix in ("", ".safetensors")]
    assert len(found) > 15
    for path in found:
        sweep._refuse_lora_of_another_model(path)


def test_it_is_said_before_anything_that_draws_is_imported(tmp_path: Path) -> None:
    path = lora(tmp_path / "a.safetensors", FOREIGN["flux"])
    command = [sys.executable, "-c", _QUICKLY, "sweep", "peft", "--lora", str(path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["2 []"], done.stdout + done.stderr
    assert "toy model" in done.stderr
    assert not (tmp_path / "out").exists()


def test_seeds_and_prompts_are_those_that_were_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(sweep, "_sweep_one", lambda writer, loader, options, **_: seen.append(options) or [])
    monkeypatch.setattr(sweep.shared, "show", lambda out, **more: None)
    asked = ["peft", "--seed", "1234", "--seeds", "3", "--prompt", "a red fox", "--out", str(tmp_path)]
    CliRunner().invoke(sweep.command, asked, catch_exceptions=False)
    (options,) = seen
    assert (options.seeds, list(options.prompts)) == ((1234, 1235, 1236), ["a red fox"])
