from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.benches import get_bench
from harness.checks.cell import Cell
from harness.checks.family import judge
from harness.checks.known import shipped_known_failures
from harness.checks.plan import smoke_example
from harness.checks.trial import run_trial
from harness.errors import LoaderSpecError
from harness.loaders.live import diffsynth, live_loaders
from harness.loaders.protocol import CORE_BENCHES, CORE_FORMATS
from harness.loaders.registry import installed, resolve
from harness.loaders.releases import Release

from .conftest import effective, factors, trained, weights, written

LIVE = ("peft", "diffusers", "diffusers-fused")
CELLS = [
    (name, form, bench)
    for name in LIVE
    for form, bench in resolve(name).cells
    if form in CORE_FORMATS and bench in CORE_BENCHES  # the rest of the matrix is the suite's
]


@pytest.mark.parametrize(("name", "form", "bench_name"), CELLS)
@pytest.mark.parametrize("strength", [1.0, -0.7, 0.0])
def test_every_declared_cell_gives_strength_times_alpha_over_rank(name, form, bench_name, strength, tmp_path):
    bench = get_bench(bench_name)
    model = bench.build()
    lora = written(bench, form, tmp_path)
    result = resolve(name).load(model, lora, strength=strength)
    found = factors(bench, model if result is None else result, weights(bench))
    assert found == pytest.approx(trained(weights(bench), strength), rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("name", LIVE)
def test_a_second_load_adds_to_the_first(name, bench, tmp_path):
    subject = resolve(name)
    lora = written(bench, subject.formats[0], tmp_path)
    model = bench.build()
    for strength in (1.0, -0.5):
        result = subject.load(model, lora, strength=strength)
        model = model if result is None else result
    found = factors(bench, model, weights(bench))
    assert found == pytest.approx(trained(weights(bench), 0.5), rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("name", ["diffusers", "diffusers-fused"])
def test_unload_undoes_the_last_load_only(name, bench, tmp_path):
    subject = resolve(name)
    lora = written(bench, "diffusers", tmp_path)
    model = bench.build()
    subject.load(model, lora, strength=1.0)
    subject.load(model, lora, strength=3.0)
    subject.declaration.unload(model)
    assert factors(bench, model, weights(bench)) == pytest.approx(trained(weights(bench), 1.0), rel=2e-5, abs=2e-5)


def test_unloading_every_diffusers_adapter_gives_the_base_back(bench, tmp_path):
    subject = resolve("diffusers")
    model = bench.build()
    subject.load(model, written(bench, "kohya", tmp_path))
    subject.declaration.unload(model)
    for name in bench.lora_layers:
        assert torch.equal(effective(model, name), effective(bench.base(), name))
    assert set(model.state_dict()) == set(bench.base().state_dict())


@pytest.mark.parametrize("name", ["diffusers", "diffusers-fused"])
def test_what_diffusers_is_said_not_to_support_really_fails(name, tmp_path):
    bench = get_bench("qwen-image-fused")
    model = bench.build()
    resolve(name).load(model, written(bench, "kohya", tmp_path))
    found = factors(bench, model, weights(bench))
    assert found["transformer_blocks.0.attn.to_qkv"] == pytest.approx(0.0, abs=1e-9)
    assert resolve(name).unsupported("kohya", "qwen-image-fused")


@pytest.mark.parametrize("name", ["diffusers", "diffusers-fused"])
def test_a_file_of_which_diffusers_takes_nothing_leaves_the_model_and_earlier_loads_alone(name, bench, tmp_path):
    subject, model = resolve(name), bench.build()
    nothing = written(bench, "peft", tmp_path)
    subject.load(model, nothing)
    assert factors(bench, model, weights(bench)) == dict.fromkeys(weights(bench), 0.0)
    subject.load(model, written(bench, "kohya", tmp_path), strength=0.5)
    subject.load(model, nothing)
    if name == "diffusers":
        subject.declaration.set_strength(model, 3.0)
    subject.declaration.unload(model)
    assert factors(bench, model, weights(bench)) == pytest.approx(trained(weights(bench), 0.5), rel=2e-5, abs=2e-5)


def test_of_a_file_that_diffusers_takes_nothing_of_it_is_said_that_it_has_no_effect():
    cell = Cell(resolve("diffusers"), "kohya", "ltx")
    seen = run_trial(cell, smoke_example(cell, cell.targets))
    assert seen.raised is None
    assert "LH101" in {finding.code for finding in judge(seen)}


def test_diffusers_refuses_a_model_that_has_no_pipeline(bench, tmp_path):
    with pytest.raises(NotImplementedError, match="no diffusers pipeline is known for Linear"):
        resolve("diffusers").load(torch.nn.Linear(2, 2), written(bench, "diffusers", tmp_path))


def test_peft_merges_into_any_module(tmp_path):
    from harness.files import LoraWeights, write_lora

    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    before = model[0].weight.detach().clone()
    a, b = torch.ones(2, 3), torch.ones(2, 2)
    folder = write_lora(tmp_path / "adapter", "peft", {"0": LoraWeights(a, b, 1.0)})
    merged = resolve("peft").load(model, folder, strength=-3.0)
    assert torch.allclose(merged[0].weight - before, -3.0 * 0.5 * b @ a)


def test_peft_names_the_file_that_its_folder_lacks(bench, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        resolve("peft").load(bench.build(), tmp_path)


def test_the_live_loaders_print_and_warn_nothing(bench, tmp_path, capfd, recwarn):
    for name, form in (("peft", "peft"), ("diffusers", "diffusers")):
        resolve(name).load(bench.build(), written(bench, form, tmp_path))
    captured = capfd.readouterr()
    assert (captured.out, captured.err, list(recwarn)) == ("", "", [])


@pytest.mark.parametrize("bench_name", ["qwen-image", "qwen-image-fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_current_diffsynth_divides_alpha_by_rank(bench_name, dtype, needs_diffsynth, tmp_path):
    needs_diffsynth("2.1.12")
    bench = get_bench(bench_name)
    model = bench.build(dtype)
    resolve("diffsynth-2.1.12").load(model, written(bench, "diffsynth", tmp_path), strength=0.5)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    found = factors(bench, model, weights(bench))
    assert found == pytest.approx(trained(weights(bench), 0.5), rel=tolerance, abs=tolerance)


def test_diffsynth_2_0_4_never_reads_alpha(bench, needs_diffsynth, tmp_path, capfd):
    needs_diffsynth("2.0.4")
    model = bench.build()
    resolve("diffsynth-2.0.4").load(model, written(bench, "diffsynth", tmp_path), strength=0.5)
    assert factors(bench, model, weights(bench)) == pytest.approx(dict.fromkeys(weights(bench), 0.5), rel=2e-5)
    assert capfd.readouterr().out == ""


def test_two_releases_run_side_by_side(tmp_path, monkeypatch):
    for version, factor in (("2.0.9", 2), ("2.0.10", 3)):
        _fake_release(tmp_path, version, factor)
    monkeypatch.setenv("LORA_HARNESS_RELEASES", str(tmp_path))
    changes = {}
    for name in ("diffsynth-2.0.9", "diffsynth"):
        model = torch.nn.Linear(1, 1)
        before = model.weight.item()
        resolve(name).load(model, tmp_path / "lora.safetensors", strength=10.0)
        changes[name] = model.weight.item() - before
    assert changes == pytest.approx({"diffsynth-2.0.9": 20.0, "diffsynth": 30.0})
    assert resolve("diffsynth").version == "2.0.10"


def test_a_release_that_is_not_there_is_named_with_the_command_that_gets_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_HARNESS_RELEASES", str(tmp_path))
    with pytest.raises(LoaderSpecError, match=r"lora-harness install diffsynth==9\.9\.9"):
        resolve("diffsynth-9.9.9")


def test_a_release_is_imported_without_its_own_package_init(tmp_path):
    _fake_release(tmp_path, "0.0.1", 1)
    (tmp_path / "diffsynth-0.0.1" / "diffsynth" / "__init__.py").write_text("import torchvision_is_not_here")
    release = Release("diffsynth", "0.0.1", tmp_path / "diffsynth-0.0.1")
    assert diffsynth._module(release, "utils.lora.general").GeneralLoRALoader


def _fake_release(root, version, factor):
    package = root / f"diffsynth-{version}" / "diffsynth"
    (package / "utils" / "lora").mkdir(parents=True)
    (package / "core" / "loader").mkdir(parents=True)
    (package / "core" / "loader" / "file.py").write_text("def load_state_dict(path, torch_dtype, device): return {}\n")
    (package / "utils" / "lora" / "__init__.py").write_text("from .general import GeneralLoRALoader\n")
    (package / "utils" / "lora" / "general.py").write_text(
        "class GeneralLoRALoader:\n"
        "    def __init__(self, torch_dtype, device): pass\n"
        "    def convert_state_dict(self, weights): return weights\n"
        "    def fuse_lora_to_base_model(self, model, weights, alpha):\n"
        f"        model.weight.data += {factor} * alpha\n"
    )


def test_every_loader_of_a_package_can_be_named_with_a_release(tmp_path, monkeypatch):
    for version in ("1.0.9", "1.0.10"):
        _fake_release(tmp_path, version, 1)
    monkeypatch.setenv("LORA_HARNESS_RELEASES", str(tmp_path))
    assert resolve("diffsynth-flux-1.0.9").version == "1.0.9"
    assert resolve("diffsynth-hot").version == "1.0.10"
    listed = [entry.name for entry in installed() if entry.name.startswith("diffsynth")]
    assert listed == ["diffsynth", "diffsynth-1.0.9", "diffsynth-hot", "diffsynth-flux"]


def test_a_loader_without_releases_has_no_versions_in_its_name():
    with pytest.raises(LoaderSpecError, match=r"no loader is called 'peft-0\.1'"):
        resolve("peft-0.1")


def test_one_process_has_one_release_under_one_name(tmp_path):
    for version in ("1", "2"):
        (tmp_path / f"acme_hollow-{version}" / "acme_hollow").mkdir(parents=True)
    first, second = (Release("acme_hollow", v, tmp_path / f"acme_hollow-{v}") for v in "12")
    first.hollow(("", ".part"))
    first.hollow(("",))
    with pytest.raises(LoaderSpecError, match="another release of it already"):
        second.hollow(("",))


def test_known_failures_are_files_of_loaders_that_exist():
    bases = {live.name for live in live_loaders().values()}
    for known in shipped_known_failures():
        base, _, version = known.loader.rpartition("-")
        assert known.loader in bases or (base in bases and version[0].isdigit())


def test_a_live_loader_is_found_in_its_own_file():
    for name, live in live_loaders().items():
        assert live_loaders(name)[name].load is live.load
    assert live_loaders("no_such") == {}


def test_the_page_of_the_loaders_has_every_one_of_them():
    page = (Path(__file__).parents[2] / "docs" / "loaders.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?`) \|", page, re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(.+?)`", row)) == sorted(live_loaders())


def test_naming_the_live_loaders_imports_none_of_the_libraries():
    code = (
        "import sys; from harness.loaders.live import live_loaders; live_loaders();"
        "print([m for m in ('torch', 'numpy', 'peft', 'diffusers', 'lycoris', 'loralib', 'click') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
