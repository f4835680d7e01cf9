"""A repaired file gives the trained effect at strength 1.0, whatever the reader, and never replaces its source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from harness.benches import get_bench
from harness.commands.repair import command
from harness.doctor.repair.repair import repair_file
from harness.errors import UserError
from harness.files import LoraWeights, read_lora, write_lora
from harness.law.known import known_laws
from harness.loaders.registry import installed, resolve

NAMES = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_k")
FORMATS = ("peft", "kohya", "diffusers", "diffsynth", "comfyui")


def weights(
    alphas: tuple[float | None, ...] = (8.0, 2.0), dtype: torch.dtype = torch.float32
) -> dict[str, LoraWeights]:
    torch.manual_seed(0)
    ranks = (4, 16)
    return {
        name: LoraWeights(torch.randn(rank, 48).to(dtype), torch.randn(48, rank).to(dtype), alpha)
        for name, rank, alpha in zip(NAMES, ranks, alphas, strict=True)
    }


def product(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    a, b = (half.double() for half in pair)
    return b @ a


@pytest.mark.parametrize("source", FORMATS)
@pytest.mark.parametrize("to", FORMATS)
def test_the_effect_is_the_trained_one_in_every_format(tmp_path: Path, source: str, to: str) -> None:
    lora = weights()
    path = write_lora(tmp_path / "old", source, lora)
    report = repair_file(path, to, tmp_path / "new", model_names=NAMES)
    new = read_lora(report.path)
    assert new.format == to
    for name, module in new.modules.items():
        old = next(w for n, w in lora.items() if n.replace(".", "_") == module.name.replace(".", "_"))
        assert module.alpha == module.rank
        assert torch.equal(product(new.tensors(name)), product((old.a, old.b)) * old.alpha / old.rank)
    assert (report.rounded, report.error, report.scales) == (0, 0.0, (0.125, 2.0))


def test_readers_that_ignore_alpha_and_readers_that_divide_agree(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "old", "diffsynth", weights())
    new = read_lora(repair_file(path, "diffsynth", tmp_path / "new").path)
    for law in ("diffsynth", "diffsynth-2.0.4"):
        assert {known_laws()[law].at_one(module) for module in new.modules.values()} == {1.0}


def test_rounding_is_measured_and_said(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "old", "kohya", weights((3.0, 2.0), torch.bfloat16))
    report = repair_file(path, "kohya", tmp_path / "new")
    assert report.rounded == 1
    assert 1e-4 < report.error < 2**-8
    assert "rounded to bfloat16 in 1 module" in report.notes[0]
    exact = repair_file(path, "kohya", tmp_path / "exact", dtype="float32")
    assert exact.error < 1e-7


@pytest.mark.parametrize(("options", "scales"), [({"lora_alpha": 8.0}, (0.5, 2.0)), ({"scale": 0.5}, (0.5, 0.5))])
def test_a_file_without_alpha_needs_the_training(
    tmp_path: Path, options: dict[str, float], scales: tuple[float, float]
) -> None:
    path = write_lora(tmp_path / "old", "diffsynth", weights((None, None)))
    with pytest.raises(UserError, match="carries no alpha"):
        repair_file(path, "diffsynth", tmp_path / "new")
    assert repair_file(path, "diffsynth", tmp_path / "new", **options).scales == scales  # type: ignore[arg-type]


def test_one_scale_is_said_in_one_way(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "old", "diffsynth", weights((None, None)))
    with pytest.raises(UserError, match="scale and lora_alpha say the same in two ways: give one of them"):
        repair_file(path, "diffsynth", tmp_path / "new", scale=1.0, lora_alpha=8.0)


def test_modules_that_lack_alpha_are_named(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "old", "comfyui", weights((4.0, None)))
    with pytest.raises(UserError, match=r"carries no alpha in 1 of 2 modules \([^)]*\); give lora_alpha"):
        repair_file(path, "comfyui", tmp_path / "new")


def test_rslora_becomes_plain(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "old", "peft", weights((8.0, 8.0)), rslora=True)
    report = repair_file(path, "peft", tmp_path / "new")
    assert report.scales == (2.0, 4.0)
    assert not any(module.rslora for module in read_lora(report.path).modules.values())


def test_flattened_names_need_the_model(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "old", "kohya", weights())
    with pytest.raises(UserError, match="--model-names"):
        repair_file(path, "diffusers", tmp_path / "new")
    with pytest.raises(UserError, match="fit no single layer"):
        repair_file(path, "diffusers", tmp_path / "new", model_names=NAMES[:1])
    assert not list(tmp_path.glob("*new*"))


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_nothing_is_replaced_without_force_and_the_source_never(tmp_path: Path, format: str) -> None:
    path = write_lora(tmp_path / "old", format, weights())
    new = Path(repair_file(path, format, tmp_path / "new").path)
    with pytest.raises(UserError, match="exists already"):
        repair_file(path, format, new)
    before = {file.name: file.read_bytes() for file in (new.iterdir() if new.is_dir() else [new])}
    repair_file(path, format, new, scale=4.0, force=True)
    assert {file.name: file.read_bytes() for file in (new.iterdir() if new.is_dir() else [new])} != before
    for force in (False, True):
        with pytest.raises(UserError, match="is the file itself"):
            repair_file(path, format, path, force=force)
    link = tmp_path / "link.safetensors"
    link.symlink_to(path if path.is_file() else path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is the file itself"):
        repair_file(path, "kohya", link, force=True)


def test_a_failed_check_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import harness.doctor.repair.proof as module

    path = write_lora(tmp_path / "old", "kohya", weights())
    monkeypatch.setattr(module, "_pair_error", lambda *_: 0.5)
    with pytest.raises(UserError, match="not written"):
        repair_file(path, "kohya", tmp_path / "new")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda w: {n: LoraWeights(x.a, x.b * 6e4, 64.0) for n, x in w.items()}, "overflows float16"),
        (lambda w: {n: LoraWeights(x.a, x.b, 0.0) for n, x in w.items()}, "alpha is 0"),
    ],
)
def test_what_cannot_be_repaired_is_refused(tmp_path: Path, make: object, words: str) -> None:
    path = write_lora(tmp_path / "old", "kohya", make(weights()))  # type: ignore[operator]
    with pytest.raises(UserError, match=words):
        repair_file(path, "kohya", tmp_path / "new", dtype="float16")


def test_a_loader_that_is_not_here_is_taken_from_the_table(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "old", "kohya", weights())
    report = repair_file(path, "kohya", tmp_path / "new", loader="raw alpha")
    assert not report.measured
    law = known_laws()["raw alpha"]
    new = read_lora(report.path)
    for module in new.modules.values():
        old = next(w for n, w in weights().items() if n.replace(".", "_") == module.name)
        effect = law.at_one(module) * product(new.tensors(module.name))
        assert torch.allclose(effect, product((old.a, old.b)) * old.alpha / old.rank, rtol=1e-6)
    assert "readers that use alpha / rank" in report.notes[0]
    with pytest.raises(UserError, match="no loader is called"):
        repair_file(path, "kohya", tmp_path / "other", loader="nobody")


def test_a_real_loader_gives_the_trained_effect_at_strength_one(tmp_path: Path) -> None:
    """DiffSynth up to 2.0.4 ignores alpha; its repaired file merges as PEFT would merge the original."""
    if not any(entry.name == "diffsynth-2.0.4" and entry.available for entry in installed()):
        pytest.skip("diffsynth 2.0.4 is not here")
    bench = get_bench("qwen-image")
    path = write_lora(tmp_path / "old", "diffusers", weights())
    report = repair_file(path, "diffsynth", tmp_path / "new", loader="diffsynth-2.0.4")
    assert (report.measured, report.law) == (True, "strength")
    model = bench.build()
    resolve("diffsynth-2.0.4").load(model, Path(report.path), strength=1.0)
    for name, lora in weights().items():
        change = model.get_submodule(name).weight - bench.base().get_submodule(name).weight
        wanted = (lora.b @ lora.a) * lora.alpha / lora.rank
        assert torch.allclose(change, wanted, atol=1e-4)


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "old", "kohya", weights())
    names = tmp_path / "names.txt"
    names.write_text("\n".join(NAMES))
    arguments = [str(path), "--to", "diffusers", "--out", str(tmp_path / "new"), "--model-names", str(names)]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0
    assert "lossless" in result.output
    again = CliRunner().invoke(command, [*arguments, "--force", "--json"])
    assert json.loads(again.output)["modules"] == 2


def test_an_alpha_that_is_given_and_not_needed_is_said(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x", "kohya", {"a.b": LoraWeights(torch.ones(2, 4), torch.ones(3, 2), 1.0)})
    (note,) = repair_file(path, "kohya", tmp_path / "new", lora_alpha=8.0).notes[-1:]
    assert note == "--lora-alpha 8 is not used: the file has its own alpha"
