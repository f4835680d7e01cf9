from __future__ import annotations

import os

import pytest
import torch

from harness.benches import get_bench
from harness.errors import LoaderSpecError
from harness.loaders.checkouts import Checkout
from harness.loaders.live import live_loaders
from harness.loaders.registry import installed, resolve

from .conftest import effective, factors, trained, weights, written

HOT = ("diffsynth-hot", "diffsynth")
ALWAYS = (("peft-runtime", "peft"), ("lycoris", "kohya"), ("lycoris-runtime", "kohya"), ("loralib", "peft"))
OPTIONAL = (("comfyui", "kohya"), ("comfyui", "diffsynth"), ("sd-scripts", "kohya"), ("invokeai", "kohya"))
CELLS = [*ALWAYS, *OPTIONAL, HOT, ("invokeai-sidecar", "kohya")]


@pytest.fixture
def subject_of():
    def resolved(name):
        status = {entry.name: entry for entry in installed()}[name]
        if not status.available:
            pytest.skip(f"{name}: {status.reason}")
        return resolve(name)

    return resolved


@pytest.mark.parametrize(("name", "form"), CELLS)
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_it_gives_strength_times_alpha_over_rank(name, form, strength, bench, subject_of, tmp_path):
    model = bench.build()
    result = subject_of(name).load(model, written(bench, form, tmp_path), strength=strength)
    found = factors(bench, model if result is None else result, weights(bench))
    assert found == pytest.approx(trained(weights(bench), strength), rel=2e-5, abs=2e-5)


@pytest.mark.parametrize(("name", "form"), CELLS)
def test_a_second_load_adds_to_the_first(name, form, bench, subject_of, tmp_path):
    subject, lora, model = subject_of(name), written(bench, form, tmp_path), bench.build()
    for strength in (1.0, -0.5):
        result = subject.load(model, lora, strength=strength)
        model = model if result is None else result
    assert factors(bench, model, weights(bench)) == pytest.approx(trained(weights(bench), 0.5), rel=2e-5, abs=2e-5)


@pytest.mark.parametrize(
    ("name", "form"),
    [("peft-runtime", "peft"), ("lycoris-runtime", "kohya"), ("comfyui", "kohya"), ("invokeai", "kohya")],
)
def test_unload_takes_the_last_load_away_and_then_gives_the_base_back(name, form, bench, subject_of, tmp_path):
    subject, lora, model = subject_of(name), written(bench, form, tmp_path), bench.build()
    for strength in (1.0, 3.0):
        result = subject.load(model, lora, strength=strength)
        model = model if result is None else result
    model = subject.declaration.unload(model) or model
    assert factors(bench, model, weights(bench)) == pytest.approx(trained(weights(bench), 1.0), rel=2e-5, abs=2e-5)
    model = subject.declaration.unload(model) or model
    for layer in bench.lora_layers:
        assert torch.equal(effective(model, layer), effective(bench.base(), layer))


def test_lycoris_refuses_a_file_without_alpha(bench, subject_of, tmp_path):
    lora = written(bench, "kohya", tmp_path, alphas=(None,))
    with pytest.raises(TypeError, match="NoneType"):
        subject_of("lycoris").load(bench.build(), lora)


def test_lycoris_keeps_its_own_prefix_setting(bench, subject_of, tmp_path):
    subject_of("lycoris").load(bench.build(), written(bench, "kohya", tmp_path))
    from lycoris import LycorisNetwork

    assert LycorisNetwork.LORA_PREFIX == "lycoris"


@pytest.mark.parametrize("name", ["comfyui", "sd-scripts", "sd-scripts-runtime", "musubi-tuner", "lightx2v"])
def test_a_checkout_that_is_not_there_is_listed_with_its_variable(name, monkeypatch):
    monkeypatch.delenv(live_loaders()[name].checkout.variable, raising=False)
    entry = next(entry for entry in installed() if entry.name == name)
    assert not entry.available
    assert "LORA_HARNESS_" in str(entry.reason)
    with pytest.raises(LoaderSpecError, match="LORA_HARNESS_"):
        resolve(name)


def test_a_folder_that_is_no_checkout_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_HARNESS_COMFYUI", str(tmp_path))
    entry = next(entry for entry in installed() if entry.name == "comfyui")
    assert "is no checkout: it has no comfy/lora.py" in str(entry.reason)


def test_what_stands_in_for_an_absent_library_is_gone_afterwards(monkeypatch, tmp_path):
    (tmp_path / "acme_app.py").write_text("from not_installed_here import part\nVALUE = 3\n")
    monkeypatch.setenv("ACME", str(tmp_path))
    checkout = Checkout("acme", "ACME", "acme_app.py", "https://example.com", absent=("not_installed_here",))
    (module,) = checkout.modules("acme_app")
    assert module.VALUE == 3
    with pytest.raises(ImportError):
        __import__("not_installed_here")


def test_an_import_that_fails_says_which_and_why(monkeypatch, tmp_path):
    (tmp_path / "acme_broken.py").write_text("import not_installed_either\n")
    monkeypatch.setenv("ACME", str(tmp_path))
    with pytest.raises(LoaderSpecError, match=r"acme: cannot import .*not_installed_either"):
        Checkout("acme", "ACME", "acme_broken.py", "https://example.com").modules("acme_broken")


def test_comfyui_takes_scale_1_for_a_file_whose_alpha_is_in_the_header(bench, subject_of, tmp_path):
    model = bench.build()
    subject_of("comfyui").load(model, written(bench, "diffusers", tmp_path))
    assert factors(bench, model, weights(bench)) == pytest.approx(dict.fromkeys(weights(bench), 1.0), rel=2e-5)


def test_sd_scripts_merges_on_the_merged_bench(subject_of, tmp_path):
    fused, before = get_bench("qwen-image-fused"), dict(os.environ)
    model = fused.build()
    subject_of("sd-scripts").load(model, written(fused, "kohya", tmp_path))
    assert factors(fused, model, weights(fused)) == pytest.approx(trained(weights(fused), 1.0), rel=2e-5, abs=2e-5)
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("name", "form"), [("peft-runtime", "peft"), ("lycoris-runtime", "kohya"), ("diffusers", "kohya")]
)
def test_a_strength_set_later_is_that_of_the_last_load(name, form, bench, subject_of, tmp_path):
    subject, lora, model = subject_of(name), written(bench, form, tmp_path), bench.build()
    subject.load(model, lora, strength=1.0)
    subject.load(model, lora, strength=3.0)
    subject.declaration.set_strength(model, -0.25)
    assert factors(bench, model, weights(bench)) == pytest.approx(trained(weights(bench), 0.75), rel=2e-5, abs=2e-5)


def test_hot_loaded_loras_are_cleared_together(bench, subject_of, tmp_path):
    subject, lora, model = subject_of("diffsynth-hot"), written(bench, "diffsynth", tmp_path), bench.build()
    for strength in (1.0, 3.0):
        subject.load(model, lora, strength=strength)
    subject.declaration.unload(model)
    for layer in bench.lora_layers:
        assert torch.equal(effective(model, layer), effective(bench.base(), layer))


def test_loralib_has_the_kernel_of_a_peft_convolution(subject_of, tmp_path):
    from harness.files import LoraWeights, write_lora

    model = torch.nn.Sequential(torch.nn.Conv2d(5, 4, 3, stride=2, padding=1))
    before = model[0].weight.detach().clone()
    a, b = torch.randn(2, 5, 3, 3), torch.randn(4, 2, 1, 1)
    folder = write_lora(tmp_path / "adapter", "peft", {"0": LoraWeights(a, b, 6.0)})
    subject_of("loralib").load(model, folder, strength=0.5)
    kernel = torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
    assert torch.allclose(model[0].conv.weight - before, 0.5 * 3.0 * kernel, atol=1e-5)


@pytest.mark.parametrize("name", ["loralib", "peft-runtime", "sd-scripts", "comfyui", "invokeai"])
def test_every_reason_names_something_the_loader_declares(name):
    entry = {entry.name: entry for entry in installed()}[name]
    if not entry.available:
        pytest.skip(f"{name}: {entry.reason}")
    subject = resolve(name)
    declared = {*subject.formats, *subject.benches, *subject.variants}
    assert all(set(names) <= declared for names in subject.declaration.unsupported)


def test_rows_of_a_merged_layer_are_views_of_it():
    from harness.loaders.models import renamed

    model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 2) for name in "qkv"})
    places = {f"{name}.weight": ("both.qkv.weight", (0, 2 * i, 2)) for i, name in enumerate("qkv")}
    merged = renamed(model, places).get_submodule("both.qkv")
    merged.weight.data += torch.arange(6.0)[:, None]
    stacked = torch.cat([model[name].weight for name in "qkv"])
    assert torch.equal(stacked, merged.weight)
    assert model["v"].weight.data_ptr() == merged.weight[4:].data_ptr()
