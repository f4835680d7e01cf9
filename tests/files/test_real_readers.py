"""The written files do in the real loaders what the files say, and what real libraries save is read right."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.loaders import QwenImageLoraLoaderMixin

from harness.files import LoraWeights, read_lora, write_lora

TARGETS = ("to_q", "add_q_proj", "to_out.0", "img_mlp.net.2", "img_mod.1")
CHOICES = ((1, 0.5), (3, 4.0), (4, 8.0), (4, 3.25), (8, -2.0))


def qwen() -> Any:
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip


def lora_for(model: torch.nn.Module, *, alpha: bool = True, negative: bool = True) -> dict[str, LoraWeights]:
    names = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    modules = {}
    for place, name in enumerate(name for name in names if name.endswith(TARGETS)):
        rank, value = CHOICES[place % len(CHOICES)]
        rows, columns = model.get_submodule(name).weight.shape
        value = value if negative else abs(value)
        modules[name] = LoraWeights(torch.randn(rank, columns), torch.randn(rows, rank), value if alpha else None)
    return modules


@torch.no_grad()
def worst_error(model: torch.nn.Module, modules: dict[str, LoraWeights], path: Path) -> float:
    """Return the largest relative error of W' - W against the trained scale the file gives, over all Linear layers."""
    adapter, base = read_lora(path), qwen()
    by_model_name = {name.replace(".", "_") if adapter.flattened else name: name for name in modules}
    trained = {by_model_name[name]: module.trained_scale for name, module in adapter.modules.items()}
    assert set(trained) == set(modules)
    errors = []
    for name, layer in base.named_modules():
        if isinstance(layer, torch.nn.Linear):
            delta = (model.get_submodule(name).weight - layer.weight).double()
            expected = torch.zeros_like(delta)
            if name in modules:
                expected = trained[name] * (modules[name].b.double() @ modules[name].a.double())
            errors.append(float((delta - expected).norm() / expected.norm().clamp_min(1e-9)))
    return max(errors)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_merges_the_written_folder_as_it_says(tmp_path: Path, rslora: bool) -> None:
    modules = lora_for(qwen())
    path = write_lora(tmp_path / "x", "peft", modules, rslora=rslora, key_order=random.Random(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns when keys are missing or a pattern fits nothing
        merged = peft.PeftModel.from_pretrained(qwen(), str(path)).merge_and_unload(safe_merge=True)
    assert worst_error(merged, modules, path) < 1e-5


@pytest.mark.parametrize(("rslora", "alpha"), [(False, True), (True, True), (False, False)])
def test_diffusers_loads_the_written_file_as_it_says(tmp_path: Path, rslora: bool, alpha: bool) -> None:
    modules = lora_for(qwen(), alpha=alpha)
    path = write_lora(tmp_path / "x", "diffusers", modules, rslora=rslora, key_order=random.Random(0))
    assert worst_error(diffusers_loaded(path), modules, path) < 1e-5


@pytest.mark.parametrize("format", ["kohya", "comfyui", "diffsynth"])
@pytest.mark.parametrize("alpha", [True, False])
def test_diffusers_converts_the_other_formats_to_the_same_weights(tmp_path: Path, format: str, alpha: bool) -> None:
    modules = lora_for(qwen(), alpha=alpha, negative=False)  # its converter never returns for a negative alpha
    path = write_lora(tmp_path / "x", format, modules)
    assert worst_error(diffusers_loaded(path), modules, path) < 1e-5


def diffusers_loaded(path: Path) -> Any:
    model = qwen()
    state, metadata = QwenImageLoraLoaderMixin.lora_state_dict(path, return_lora_metadata=True)
    QwenImageLoraLoaderMixin.load_lora_into_transformer(state, transformer=model, metadata=metadata)
    model.fuse_lora()
    model.unload_lora()
    return model


def peft_model(**config: Any) -> Any:
    return peft.get_peft_model(qwen(), peft.LoraConfig(r=4, lora_alpha=6, **config))


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saves_is_read_with_its_scales(tmp_path: Path, rslora: bool) -> None:
    model = peft_model(
        target_modules=["to_q", "img_mlp.net.2"], rank_pattern={"to_q": 2}, alpha_pattern={r"0\.attn.to_q": 5},
        use_rslora=rslora,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    adapter = read_lora(tmp_path)
    assert (adapter.format, adapter.alpha_source, len(adapter.modules), adapter.problems) == ("peft", "config", 4, ())
    for name, module in adapter.modules.items():
        layer = model.base_model.model.get_submodule(name)
        assert (layer.r["default"], layer.scaling["default"]) == (module.rank, pytest.approx(module.trained_scale))
        assert torch.equal(layer.lora_A["default"].weight, adapter.tensors(name)[0])
        assert torch.equal(layer.lora_B["default"].weight, adapter.tensors(name)[1])


@pytest.mark.parametrize("whole_pipeline", [False, True])
def test_what_diffusers_saves_is_read_with_its_scales(tmp_path: Path, whole_pipeline: bool) -> None:
    model = qwen()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], alpha_pattern={r"0\.attn.to_q": 5})
    model.add_adapter(config)
    if whole_pipeline:
        layers = peft.get_peft_model_state_dict(model)
        metadata = model.peft_config["default"].to_dict()
        QwenImageLoraLoaderMixin.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=metadata)
    else:
        model.save_lora_adapter(tmp_path)
    adapter = read_lora(tmp_path)
    assert (adapter.format, adapter.alpha_source, adapter.problems, adapter.unused_keys) == (
        "diffusers",
        "header",
        (),
        (),
    )
    assert {name: module.alpha for name, module in adapter.modules.items()} == {
        "transformer_blocks.0.attn.to_q": 5.0, "transformer_blocks.1.attn.to_q": 6.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("config", "variant", "roles"),
    [
        (peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], use_dora=True), "dora", {"A", "B", "magnitude"}),
        (peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], lora_bias=True), "lora_bias", {"A", "B", "bias"}),
        (
            peft.LoHaConfig(r=2, alpha=6, target_modules=["to_q"]),
            "loha",
            {f"hada_w{i}_{j}" for i in "12" for j in "ab"},
        ),
        (peft.LoKrConfig(r=2, alpha=6, target_modules=["to_q"]), "lokr", {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}),
    ],
)
@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT 0.21.2 takes the one-dimensional lora_B.bias for a shard
def test_variants_that_peft_saves_are_named_and_scaled(
    tmp_path: Path, config: Any, variant: str, roles: set[str]
) -> None:
    model = peft.get_peft_model(qwen(), config)
    model.save_pretrained(tmp_path)
    adapter = read_lora(tmp_path)
    assert not adapter.unused_keys
    assert not adapter.problems
    for name, module in adapter.modules.items():
        layer = model.base_model.model.get_submodule(name)
        assert (module.variant, set(module.keys)) == (variant, roles)
        assert (module.in_features, module.out_features) == (layer.in_features, layer.out_features)
        assert module.trained_scale == pytest.approx(layer.scaling["default"])


def test_fully_trained_modules_beside_the_lora_replace_weights(tmp_path: Path) -> None:
    peft_model(target_modules=["to_q"], modules_to_save=["proj_out"]).save_pretrained(tmp_path)
    adapter = read_lora(tmp_path)
    assert adapter.unused_keys == ()
    module = adapter.modules["proj_out"]
    assert (module.variant, module.rank, set(module.keys)) == ("set", 0, {"set_weight", "set_bias"})


class _Mixed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = torch.nn.Conv2d(4, 6, 3), torch.nn.Embedding(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_convolutions_and_embeddings_are_variants(tmp_path: Path) -> None:
    peft.get_peft_model(_Mixed(), peft.LoraConfig(r=2, target_modules=["conv", "table"])).save_pretrained(tmp_path)
    modules = read_lora(tmp_path).modules
    assert [(m.variant, m.in_features, m.out_features, m.kernel) for m in modules.values()] == [
        ("conv", 4, 6, (3, 3)), ("embedding", 10, 6, ()),
    ]  # fmt: skip
