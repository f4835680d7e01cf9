"""What PEFT itself saves is read whole: experts, replaced modules, token rows, biases, copies, other methods."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn

from fixtures.build_malformed import floats, tensors_file
from harness.files import read_lora, with_alpha

E, D, H = 6, 16, 12


class Experts(nn.Module):
    def __init__(self, *, turned: bool) -> None:
        super().__init__()
        up, down = ((D, 2 * H), (H, D)) if turned else ((2 * H, D), (D, H))
        self.gate_up_proj = nn.Parameter(torch.randn(E, *up))
        self.down_proj = nn.Parameter(torch.randn(E, *down))
        if turned:
            self.is_transposed = True


class Block(nn.Module):
    def __init__(self, *, turned: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(D, D)
        self.experts = Experts(turned=turned)
        self.norm = nn.LayerNorm(D)


class Model(nn.Module):
    def __init__(self, *, turned: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="toy", tie_word_embeddings=False, to_dict=dict)
        self.embed_tokens = nn.Embedding(20, D)
        self.layers = nn.ModuleList(Block(turned=turned) for _ in range(2))
        self.score = nn.Linear(D, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


Tensors = dict[str, torch.Tensor]


@torch.no_grad()
def saved(folder: Path, config: Any, *, turned: bool = False) -> tuple[Tensors, Tensors]:
    """Save an adapter with random weights and return the base's tensors and those of PEFT's own merge."""
    torch.manual_seed(0)
    model = Model(turned=turned)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn_like(parameter) * 0.3 + parameter * ("modules_to_save" in name))
    adapted.save_pretrained(folder)
    return before, adapted.merge_and_unload().state_dict()


@pytest.mark.filterwarnings("ignore:The following")  # PEFT looks for modules that a pattern names, not for parameters
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("names", [("gate_up_proj", "down_proj"), ("down_proj", "gate_up_proj"), ("down_proj",)])
@pytest.mark.parametrize("rslora", [False, True])
def test_each_expert_is_what_peft_merges(tmp_path: Path, names: tuple[str, ...], *, turned: bool, rslora: bool) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=[f"experts.{name}" for name in names],
        use_rslora=rslora, rank_pattern={"experts.down_proj": 2}, alpha_pattern={"down_proj": 5},
    )  # fmt: skip
    before, after = saved(tmp_path, config, turned=turned)
    adapter = read_lora(tmp_path)
    assert (adapter.problems, adapter.unused_keys) == ((), ())
    stacked = {name for name, module in adapter.modules.items() if module.variant == "experts"}
    assert stacked == {f"layers.{i}.experts.{name}" for i in range(2) for name in names}
    for name in stacked:
        module = adapter.modules[name]
        a, b = adapter.tensors(name)
        assert module.rank == (2 if "down" in name else 4)
        assert (module.experts, a.shape[:2], b.shape[0], b.shape[2]) == (E, (E, module.rank), E, module.rank)
        assert (a.shape[2], b.shape[1]) == (module.in_features, module.out_features)
        update = module.trained_scale * (b @ a)
        merged = after[name] - before[name]
        torch.testing.assert_close(update.transpose(1, 2) if turned else update, merged, rtol=1e-4, atol=1e-5)


def test_a_parameter_called_weight_is_its_layer(tmp_path: Path) -> None:
    before, after = saved(tmp_path, peft.LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"]))
    module = read_lora(tmp_path).modules["layers.0.q_proj"]
    a, b = read_lora(tmp_path).tensors("layers.0.q_proj")
    assert (module.rank, module.experts) == (4, 1)
    merged = after["layers.0.q_proj.weight"] - before["layers.0.q_proj.weight"]
    torch.testing.assert_close((module.trained_scale * b @ a).reshape(D, D), merged, rtol=1e-4, atol=1e-5)


def test_experts_that_do_not_divide_are_a_fault_with_a_name(tmp_path: Path) -> None:
    saved(tmp_path, peft.LoraConfig(r=4, target_modules=[], target_parameters=["experts.down_proj"]))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 5}))
    adapter = read_lora(tmp_path, strict=False)
    assert {problem.code for problem in adapter.problems} == {"LH706"}


def test_saved_modules_replace_weights(tmp_path: Path) -> None:
    _, after = saved(tmp_path, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["score", "embed_tokens"]))
    adapter = read_lora(tmp_path)
    assert adapter.unused_keys == ()
    kept = {name: module for name, module in adapter.modules.items() if module.variant == "set"}
    assert {name: set(module.keys) for name, module in kept.items()} == {
        "score": {"set_weight", "set_bias"}, "embed_tokens": {"set_weight"},
    }  # fmt: skip
    assert torch.equal(adapter.part("score", "set_bias"), after["score.bias"])
    assert (kept["score"].in_features, kept["score"].out_features, kept["score"].rank) == (D, 3, 0)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_replace_biases(tmp_path: Path, bias: str) -> None:
    _, after = saved(tmp_path, peft.LoraConfig(target_modules=["q_proj"], bias=bias))  # type: ignore[arg-type]
    adapter = read_lora(tmp_path)
    assert adapter.unused_keys == ()
    biases = {name for name, module in adapter.modules.items() if "set_bias" in module.keys}
    others = {"layers.0.norm", "layers.1.norm", "score"} if bias == "all" else set()
    assert biases == {"layers.0.q_proj", "layers.1.q_proj"} | others
    for name in biases:
        assert torch.equal(adapter.part(name, "set_bias"), after[f"{name}.bias"])
    assert adapter.modules["layers.0.q_proj"].rank == 8


@pytest.mark.parametrize("indices", [[1, 5, 7], {"embed_tokens": [1, 5, 7]}])
def test_trained_token_rows_are_read_with_their_indices(tmp_path: Path, indices: Any) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=indices)
    before, after = saved(tmp_path, config)
    adapter = read_lora(tmp_path)
    assert (adapter.modules["embed_tokens"].variant, adapter.unused_keys) == ("tokens", ())
    assert adapter.token_indices("embed_tokens") == (1, 5, 7)
    rows = adapter.part("embed_tokens", "token_rows")
    table = before["embed_tokens.weight"].clone()
    table[[1, 5, 7]] = rows
    torch.testing.assert_close(table, after["embed_tokens.weight"])


def test_a_copy_of_the_base_is_understood(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    adapter = read_lora(tmp_path)
    assert (adapter.unused_keys, adapter.modules["embed_tokens"].variant) == ((), "embedding")
    assert adapter.modules["embed_tokens"].keys["base_copy"] == "base_model.model.embed_tokens.base_layer.weight"


METHODS: dict[str, Any] = {
    "ia3": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0),
    "vera": peft.VeraConfig(target_modules=["q_proj"], r=4),
    "hra": peft.HRAConfig(target_modules=["q_proj"], r=4),
    "ln_tuning": peft.LNTuningConfig(target_modules=["norm"]),
    "fourierft": peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=9),
    "vblora": peft.VBLoRAConfig(target_modules=["q_proj"], vector_length=4, num_vectors=8),
    "randlora": peft.RandLoraConfig(target_modules=["q_proj"], r=4),
    "shira": peft.ShiraConfig(target_modules=["q_proj"], r=4),
    "miss": peft.MissConfig(target_modules=["q_proj"], r=4),
    "c3a": peft.C3AConfig(target_modules=["q_proj"], block_size=4),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("kind", METHODS)
def test_other_methods_are_read_by_name(kind: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(Model(), METHODS[kind])
    model.save_pretrained(tmp_path)
    adapter = read_lora(tmp_path)
    assert (adapter.format, adapter.kind, adapter.problems, adapter.unused_keys) == ("peft", kind, (), ())
    layer = "norm" if kind == "ln_tuning" else "q_proj"
    assert {f"layers.{i}.{layer}" for i in range(2)} <= set(adapter.modules)
    assert {module.rank for module in adapter.modules.values()} == {0}


def test_adalora_has_its_ranks(tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, lora_alpha=6, total_step=10)
    saved(tmp_path, config)
    adapter = read_lora(tmp_path)
    module = adapter.modules["layers.0.q_proj"]
    assert (adapter.kind, module.variant, adapter.unused_keys) == ("adalora", "adalora", ())
    assert (module.rank, module.alpha) == (4, 6.0)
    assert set(module.keys) == {"lora_A", "lora_B", "lora_E"}


def test_alpha_of_the_training_counts_where_the_file_has_none_or_zero(tmp_path: Path) -> None:
    saved(tmp_path, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"]))
    adapter = read_lora(tmp_path)
    assert with_alpha(adapter, 12.0) is adapter
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 0}))
    given = with_alpha(read_lora(tmp_path), 12.0)
    assert {module.trained_scale for module in given.modules.values()} == {3.0}
    assert given.alpha_source == "option"


@pytest.mark.parametrize(
    "word", [".base_layer", ".trainable_tokens_delta.a", "_embed", ".modules_to_save", "_orig_mod."]
)
def test_a_name_of_a_million_characters_is_read_in_no_time(word: str, tmp_path: Path) -> None:
    keys = {
        f"base_model.model.{word * (200_000 // len(word))}!": floats(3),
        "base_model.model.q.lora_A.weight": floats(2, 4),
    }
    (tmp_path / "adapter_model.safetensors").write_bytes(
        tensors_file({**keys, "base_model.model.q.lora_B.weight": floats(3, 2)})
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    start = time.process_time()
    assert "q" in read_lora(tmp_path).modules
    assert time.process_time() - start < 2
