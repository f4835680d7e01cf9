"""The repair that `diagnose` prints: it runs as printed, and the tool reads what it writes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from harness.cli import main
from harness.doctor.answer import Question
from harness.doctor.answers import answer, answers
from harness.doctor.diagnose import FileDiagnosis, diagnose
from harness.doctor.repair.preview import is_plain, preview
from harness.doctor.repair.repair import repair_file
from harness.doctor.told import as_data
from harness.doctor.traits import Traits
from harness.errors import LoraFileError, UserError
from harness.files import FORMATS, LoraAdapter, read_lora, with_alpha
from tests.cases.layouts import BUILT, Layout, seen

LAYOUTS = [*seen(), *BUILT]
QUESTIONS = (Question(), Question(lora_alpha=3.0))


def commands(found: FileDiagnosis) -> dict[str, list[str]]:
    """Return, by command, the tools for which it is printed."""
    every: dict[str, list[str]] = {}
    for row in as_data(found)["answers"]:
        if row["do"].startswith("lora-harness repair "):
            every.setdefault(row["do"], []).append(row["tool"])
    return every


def run(command: str, folder: Path) -> Path:
    """Run a printed command, with its new file in `folder`, and return that file."""
    words = shlex.split(command)[1:]
    at = words.index("--out") + 1
    words[at] = str(folder / words[at])
    done = CliRunner().invoke(main, [*words, "--force"])
    assert done.exit_code == 0, f"{command}\n{done.output}"
    return Path(words[at])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_repair_that_is_printed_runs_and_is_read_as_trained(layout: Layout, tmp_path: Path) -> None:
    path = layout.write(tmp_path)
    for asked in QUESTIONS:
        try:
            found = diagnose(path, asked=asked)
        except LoraFileError:
            return
        for command, tools in commands(found).items():
            new = Traits(read_lora(run(command, tmp_path)))
            given = {name: answer(found.answers[name].tool, new).strength for name in tools}
            assert given == dict.fromkeys(tools, pytest.approx(1.0)), command


def test_many_files_get_a_repair(tmp_path: Path) -> None:
    """Guard the test above against an empty promise."""
    found = 0
    for layout in LAYOUTS:
        (tmp_path / layout.name).mkdir()
        path = layout.write(tmp_path / layout.name)
        try:
            found += bool(commands(diagnose(path, asked=QUESTIONS[1])))
        except LoraFileError:
            continue
    assert found >= 8


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_preview_is_what_is_written(layout: Layout, tmp_path: Path) -> None:
    try:
        adapter = with_alpha(read_lora(layout.write(tmp_path)), 3.0)
    except LoraFileError:
        return
    if not is_plain(adapter):
        return
    for to in ("diffusers", "kohya", "comfyui", "diffsynth", "peft"):
        target = tmp_path / f"new-{to}{FORMATS[to].suffix if to != 'peft' else ''}"
        try:
            planned = preview(adapter, to)
        except (LoraFileError, UserError):
            with pytest.raises(UserError):
                repair_file(adapter.path, to, target, lora_alpha=3.0)
            continue
        assert described(planned) == described(read_lora(repair_file(adapter.path, to, target, lora_alpha=3.0).path))


def described(adapter: LoraAdapter) -> object:
    traits, modules = Traits(adapter), adapter.modules
    numbers = {n: (m.rank, m.alpha, m.in_features, m.out_features, m.kernel, m.variant) for n, m in modules.items()}
    keys = {name: dict(module.keys) for name, module in modules.items()}
    return adapter.format, keys, numbers, [group.spelled for group in traits.groups], traits.alphas


def test_a_file_without_alpha_is_repaired_by_the_rule_of_its_trainer(tmp_path: Path) -> None:
    names = [f"transformer_blocks.{i}.attn.{part}" for i in range(3) for part in ("to_q", "to_k", "to_out.0")]
    tensors = {f"_orig_mod.{n}.lora_{h}.default.weight": torch.randn(4, 4) for n in names for h in "AB"}
    save_file(tensors, tmp_path / "wrapped.safetensors", metadata={"software": '{"name": "ai-toolkit"}'})
    found = diagnose(tmp_path / "wrapped.safetensors", tool="diffusers")
    assert found.rule
    (command,) = commands(found)
    assert "--scale 1" in command
    assert read_lora(run(command, tmp_path)).modules[names[0]].trained_scale == 1


def test_nan_gets_no_repair(tmp_path: Path) -> None:
    names = [f"transformer_blocks.{i}.attn.to_q" for i in range(3)]
    tensors = {f"_orig_mod.{n}.lora_{h}.default.weight": torch.full((4, 4), torch.nan) for n in names for h in "AB"}
    tensors |= {f"_orig_mod.{n}.alpha": torch.tensor(2.0) for n in names}
    save_file(tensors, tmp_path / "lora.safetensors")
    found = diagnose(tmp_path / "lora.safetensors", tool="diffusers")
    assert as_data(found)["answers"][0]["do"] == "no repair makes NaN right: take an earlier step of the training"


def test_a_question_about_names_needs_no_torch(tmp_path: Path) -> None:
    import subprocess

    path = next(layout for layout in LAYOUTS if layout.name == "musubi_torch_compile").write(tmp_path)
    code = (
        "import sys; from harness.doctor.diagnose import diagnose; from harness.doctor.told import as_data\n"
        "found = as_data(diagnose(sys.argv[1]))\n"
        "assert any('repair' in row['do'] for row in found['answers']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_repair_that_is_not_planned_would_not_have_helped(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's own names again are not planned where the names are what a tool leaves it for."""
    try:
        adapter = read_lora(layout.write(tmp_path), strict=False)
    except LoraFileError:
        return
    for asked in QUESTIONS:
        quick = answers(Traits(adapter), asked)
        with monkeypatch.context() as patch:
            patch.setattr("harness.doctor.mending.is_left_for_names", lambda tool, traits: False)
            assert answers(Traits(adapter), asked) == quick
