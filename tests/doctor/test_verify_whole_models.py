"""Everything that a training can leave in a merge of a language model: right is right, wrong is wrong, else exit 3."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.doctor.verify.verify import MergeReport, verify_merge
from harness.errors import UserError
from tests.doctor.peft_merges import Change, Tensors, gpt2, llama, lora, lost, scaled, write

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
HEADS = ["embed_tokens", "lm_head"]
TOKENS = {"trainable_token_indices": [3, 7, 150]}
FUSED = {"target_modules": ["q_proj", "v_proj", "up_proj"]}


def rewrite(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    """Edit the tensors of a checkpoint on disk."""
    tensors = edit(load_file(folder / "model.safetensors"))
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def renamed(*pairs: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    def edit(tensors: Tensors) -> Tensors:
        for old, new in pairs:
            tensors = {name.replace(old, new) if old else new + name: tensor for name, tensor in tensors.items()}
        return tensors

    return edit


def stored_as(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


def fused(tensors: Tensors) -> Tensors:
    """Return q, k and v, and gate and up, as one tensor each, as vLLM and Phi have them."""
    found = dict(tensors)
    for block in (f"model.layers.{number}." for number in range(2)):
        for end, parts in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
            owner = end.partition(".")[0]
            names = [f"{block}{owner}.{part}_proj.weight" for part in parts]
            found[f"{block}{end}_proj.weight"] = torch.cat([found.pop(name) for name in names])
    return found


def with_nan(name: str) -> Change:
    def change(merged: Tensors, base: Tensors) -> None:
        merged[name].view(-1)[5] = torch.nan

    return change


def added(name: str, rows: slice = slice(None)) -> Change:
    def change(merged: Tensors, base: Tensors) -> None:
        merged[name][rows] += 0.5

    return change


RIGHT = {
    "classifier": ({"classes": 3}, {"task_type": "SEQ_CLS"}),
    "bias all": ({"bias": True}, {"bias": "all"}),
    "bias lora_only": ({"bias": True}, {"bias": "lora_only"}),
    "saved embedding and head": ({}, {"modules_to_save": HEADS}),
    "saved embedding, tied": ({"tie": True}, {"modules_to_save": HEADS[:1]}),
    "saved head, tied": ({"tie": True}, {"modules_to_save": HEADS[1:]}),
    "saved both, tied": ({"tie": True}, {"modules_to_save": HEADS}),
    "low-rank embedding, tied": ({"tie": True}, {"target_modules": ["q_proj", "embed_tokens"]}),
    "low-rank head": ({}, {"target_modules": ["q_proj", "lm_head"]}),
    "low-rank head, tied": ({"tie": True}, {"target_modules": ["q_proj", "lm_head"]}),
    "all linear layers": ({}, {"target_modules": "all-linear"}),
    "token rows": ({}, TOKENS),
    "token rows, tied": ({"tie": True}, TOKENS),
    "bias of the low-rank pair": ({"bias": True}, {"lora_bias": True}),
    "DoRA": ({}, {"use_dora": True}),
    "rsLoRA": ({}, {"use_rslora": True}),
}


@each_dtype
@pytest.mark.parametrize("name", RIGHT)
def test_what_peft_merged_is_right(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model, config = RIGHT[name]
    report = verify_merge(*write(tmp_path, llama(**model), lora(**config), dtype=dtype))  # type: ignore[arg-type]
    assert report.exit_code == 0, report.overall.text()
    total = len(report.modules)
    assert report.overall.title.startswith(f"{total} of {total} right")


def test_a_conv1d_is_right(tmp_path: Path) -> None:
    config = lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    assert verify_merge(*write(tmp_path, gpt2(), config)).exit_code == 0


def test_a_conv1d_scaled_by_ia3_is_right(tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)
    report = verify_merge(*write(tmp_path, gpt2(), config))
    assert report.exit_code == 0, report.overall.text()
    assert sum("(bias)" in (verdict.worst_module or "") for verdict in report.modules) == 2


WRONG: dict[str, tuple[dict[str, object], dict[str, object], Change, str]] = {
    "lost classifier": ({"classes": 3}, {"task_type": "SEQ_CLS"}, lost("score"), "LH102"),
    "lost bias": ({"bias": True}, {"bias": "all"}, lost("o_proj.bias"), "LH102"),
    "lost embedding": ({}, {"modules_to_save": HEADS}, lost("embed_tokens"), "LH102"),
    "lost token rows": ({}, TOKENS, lost("embed_tokens"), "LH102"),
    "other token row": ({}, TOKENS, added("model.embed_tokens.weight", slice(9, 10)), "LH401"),
    "lost low-rank head": ({}, {"target_modules": ["q_proj", "lm_head"]}, lost("lm_head"), "LH102"),
    "another head": ({}, {"modules_to_save": HEADS}, added("lm_head.weight"), "LH101"),
    "NaN": ({}, {}, with_nan("model.layers.0.self_attn.q_proj.weight"), "LH502"),
    "NaN elsewhere": ({}, {}, with_nan("model.layers.0.mlp.up_proj.weight"), "LH502"),
    "NaN in a head": ({}, {"modules_to_save": HEADS}, with_nan("lm_head.weight"), "LH502"),
    "twice": ({}, {}, scaled("proj", 2), "LH206"),
    "one layer at 3x": ({}, {}, scaled("layers.1.self_attn.q_proj", 3), "LH209"),
    "edit elsewhere": ({}, {}, added("model.layers.0.mlp.up_proj.weight"), "LH401"),
}


@each_dtype
@pytest.mark.parametrize("name", WRONG)
def test_what_went_wrong_is_named(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model, config, change, code = WRONG[name]
    paths = write(tmp_path, llama(**model), lora(**config), dtype=dtype, change=change)  # type: ignore[arg-type]
    report = verify_merge(*paths, full=True)
    assert (report.exit_code, report.overall.code) == (1, code), report.overall.text()


def test_only_the_token_row_that_is_lost_is_named(tmp_path: Path) -> None:
    def change(merged: Tensors, base: Tensors) -> None:
        merged["model.embed_tokens.weight"][7] = base["model.embed_tokens.weight"][7]

    report = verify_merge(*write(tmp_path, llama(), lora(**TOKENS), change=change))
    assert "merged in part: 1 of 5 modules (model.embed_tokens); nothing in row 7" in report.overall.title


CONVERSIONS: dict[str, tuple[Callable[[Tensors], Tensors] | None, Callable[[Tensors], Tensors]]] = {
    "float16": (None, stored_as(torch.float16)),
    "bfloat16": (None, stored_as(torch.bfloat16)),
    "float32": (None, stored_as(torch.float32)),
    "compiled": (None, renamed(("", "_orig_mod."))),
    "parallel": (None, renamed(("", "module."))),
    "PEFT's wrapper": (None, renamed(("", "base_model.model."))),
    "inside a larger model": (None, renamed(("model.layers", "model.language_model.layers"))),
    "base_layer names": (None, renamed(("q_proj.", "q_proj.base_layer."), ("v_proj.", "v_proj.base_layer."))),
    "fused": (None, fused),
    "fused from the start": (fused, fused),
    "split": (fused, lambda tensors: tensors),
    "without EMA": (
        lambda tensors: tensors | {f"model_ema.{name}": tensor + 1 for name, tensor in tensors.items()},
        lambda tensors: tensors,
    ),
    "without a text encoder": (
        lambda tensors: tensors | {"text_encoder.layers.0.weight": torch.ones(8, 8)},
        lambda tensors: tensors,
    ),
}


@each_dtype
@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_right_conversion_is_no_violation(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    before, after = CONVERSIONS[name]
    base, merged, adapter = write(tmp_path, llama(), lora(**FUSED), dtype=dtype, size=0.1)
    rewrite(merged, after)
    if before:
        rewrite(base, before)
    report = verify_merge(base, merged, adapter)
    assert report.exit_code == 0, report.overall.text()


@pytest.mark.parametrize("name", ["compiled", "base_layer names", "fused", "fused from the start", "split"])
def test_a_layer_lost_in_a_conversion_is_named(tmp_path: Path, name: str) -> None:
    before, after = CONVERSIONS[name]
    change = lost("layers.0.self_attn.v_proj")
    base, merged, adapter = write(tmp_path, llama(), lora(**FUSED), dtype=torch.bfloat16, change=change)
    rewrite(merged, after)
    if before:
        rewrite(base, before)
    report = verify_merge(base, merged, adapter)
    assert (report.exit_code, report.overall.code) == (1, "LH102"), report.overall.text()
    assert [v.worst_module for v in report.modules if not v.ok] == ["model.layers.0.self_attn.v_proj"]


def test_other_rows_of_a_fused_layer_must_not_change(tmp_path: Path) -> None:
    change = added("model.layers.0.self_attn.k_proj.weight")
    base, merged, adapter = write(tmp_path, llama(), lora(**FUSED), change=change)
    for folder in (base, merged):
        rewrite(folder, fused)
    assert verify_merge(base, merged, adapter).overall.code == "LH401"


def test_an_adapter_left_in_the_merged_file_is_noted(tmp_path: Path) -> None:
    base, merged, adapter = write(tmp_path, llama(), lora())
    left = load_file(adapter / "adapter_model.safetensors")
    own = {
        name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): t for name, t in left.items()
    }
    rewrite(merged, lambda tensors: renamed(("", "base_model.model."))(tensors) | own)
    report = verify_merge(base, merged, adapter)
    assert report.exit_code == 0, report.overall.text()
    assert "no part of the model: 8 tensors" in report.overall.text()


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_tensor_that_is_gone_is_named(tmp_path: Path, name: str) -> None:
    base, merged, adapter = write(tmp_path, llama(), lora())
    rewrite(merged, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    assert verify_merge(base, merged, adapter).overall.code == "LH902"


def grown(folder: Path, rows: int, change: Change | None = None, *, tie: bool = False, **config: object) -> MergeReport:
    """Verify the merge of a model whose vocabulary was resized before training."""
    model = llama(tie=tie)
    model.save_pretrained(folder / "before")
    model.resize_token_embeddings(rows)  # type: ignore[operator]
    _, merged, adapter = write(folder, model, lora(**config), change=change)
    return verify_merge(folder / "before", merged, adapter)


@pytest.mark.parametrize("rows", [152, 168])
@pytest.mark.parametrize(
    "config",
    [{}, {"modules_to_save": HEADS}, {"target_modules": ["q_proj", *HEADS]}, {"trainable_token_indices": [3, 140]}],
)
def test_a_vocabulary_of_another_size_is_right_where_both_have_rows(
    tmp_path: Path, rows: int, config: dict[str, object]
) -> None:
    report = grown(tmp_path, rows, **config)
    assert report.exit_code == 0, report.overall.text()


@pytest.mark.parametrize(
    ("name", "rows", "config"),
    [
        ("model.embed_tokens.weight", slice(20), {}),
        ("lm_head.weight", slice(None), {"modules_to_save": HEADS}),
        ("model.embed_tokens.weight", slice(165, 166), {"target_modules": ["q_proj", *HEADS]}),
        ("model.embed_tokens.weight", slice(165, 166), {"trainable_token_indices": [165]}),
    ],
)
def test_a_grown_vocabulary_is_still_judged(tmp_path: Path, name: str, rows: slice, config: dict[str, object]) -> None:
    report = grown(tmp_path, 168, added(name, rows), **config)
    assert report.exit_code == 1, report.overall.text()


def test_an_alpha_of_0_is_not_judged_until_it_is_given(tmp_path: Path) -> None:
    base, merged, adapter = write(tmp_path, llama(), lora())
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 0}))
    report = verify_merge(base, merged, adapter)
    assert report.exit_code == 3
    assert report.overall.title.startswith("0 of 4 right, 4 NOT JUDGED: ")
    assert "alpha unknown, scale 2 measured" in report.overall.title
    assert verify_merge(base, merged, adapter, lora_alpha=16).exit_code == 0
    assert verify_merge(base, merged, adapter, allow_unjudged=("alpha",)).exit_code == 0


def test_base_and_merged_swapped_is_asked(tmp_path: Path) -> None:
    base, merged, adapter = write(tmp_path, llama(), lora())
    overall = verify_merge(merged, base, adapter).overall
    assert "are base and merged swapped?" in overall.title
    assert "swap --base and --merged" in overall.text()


def two(folder: Path, strengths: tuple[float, float] = (1.0, 1.0)) -> tuple[Path, Path, tuple[Path, Path]]:
    """Write the merge of two LoRAs that share some layers, each at its strength."""
    folder.mkdir(exist_ok=True)
    base, _, first = write(folder, llama(), lora())
    (folder / "second").mkdir()
    _, _, second = write(folder / "second", llama(), lora(r=4, lora_alpha=4, target_modules=["q_proj", "up_proj"]))
    tensors = load_file(base / "model.safetensors")
    for path, scale in ((first, 2 * strengths[0]), (second, strengths[1])):
        parts = load_file(path / "adapter_model.safetensors")
        for key, a in parts.items():
            if key.endswith("lora_A.weight"):
                name = key.removeprefix("base_model.model.").replace("lora_A.", "")
                tensors[name] = tensors[name] + scale * parts[key.replace("lora_A", "lora_B")] @ a
    rewrite(folder / "merged", lambda _: tensors)
    return base, folder / "merged", (first, second)


def test_two_loras_are_told_apart_when_both_are_given(tmp_path: Path) -> None:
    base, merged, adapters = two(tmp_path)
    report = verify_merge(base, merged, adapters)
    assert (report.exit_code, len(report.modules)) == (0, 8), report.overall.text()
    assert {round(v.measured_scale or 0, 3) for v in report.modules} == {1.0, 2.0}
    alone = verify_merge(base, merged, adapters[0])
    assert alone.exit_code == 1
    assert "is of rank 4, as another LoRA (pass it with a second --lora) or formula leaves it" in alone.overall.title


def test_each_of_two_loras_has_its_own_strength(tmp_path: Path) -> None:
    base, merged, adapters = two(tmp_path, (0.5, 1.0))
    assert verify_merge(base, merged, adapters, strength=(0.5, 1.0)).exit_code == 0
    wrong = verify_merge(base, merged, adapters)
    assert wrong.exit_code == 1
    scales = {v.worst_module: v.measured_scale for v in wrong.modules}
    assert scales["lora: model.layers.0.self_attn.q_proj"] == pytest.approx(1.0, rel=0.02)


def test_of_several_bases_the_one_that_fits_is_said(tmp_path: Path) -> None:
    base, merged, adapter = write(tmp_path, llama(), lora())
    (tmp_path / "other").mkdir()
    other, _, _ = write(tmp_path / "other", llama(bias=True), lora())
    rewrite(other, lambda tensors: {name: tensor * 1.01 for name, tensor in tensors.items()})
    report = verify_merge([other, base], merged, adapter)
    assert report.exit_code == 0
    assert f"of the bases given {base} fits best: 0 of 17 tensors" in report.overall.text()
    assert "wrong base: 17 of 17" in verify_merge(other, merged, adapter).overall.title


def test_a_factor_per_block_or_kind_of_layer_is_reported_as_such(tmp_path: Path) -> None:
    def change(merged: Tensors, base: Tensors) -> None:
        scaled("q_proj", 0.5)(merged, base)
        scaled("v_proj", 1.5)(merged, base)

    overall = verify_merge(*write(tmp_path, llama(), lora(), change=change)).overall
    assert overall.title.startswith("one factor per kind of layer (0.5x in self_attn.q_proj, 1.5x in self_attn.v_proj)")


def test_square_layers_merged_transposed_are_named(tmp_path: Path) -> None:
    def change(merged: Tensors, base: Tensors) -> None:
        for key in merged:
            if "q_proj" in key:
                update: Tensor = merged[key] - base[key]
                merged[key].copy_(base[key] + update.t())

    overall = verify_merge(*write(tmp_path, llama(), lora(), change=change)).overall
    assert overall.code == "LH301", overall.text()


def test_a_lora_in_the_place_of_the_merged_checkpoint_is_said(tmp_path: Path) -> None:
    base, _, adapter = write(tmp_path, llama(), lora())
    with pytest.raises(UserError, match="holds a LoRA alone, the checkpoint after the merge is needed"):
        verify_merge(base, adapter / "adapter_model.safetensors", adapter)


def test_a_folder_of_pickles_is_called_so(tmp_path: Path) -> None:
    base, _, adapter = write(tmp_path, llama(), lora())
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle, which can run code when opened"):
        verify_merge(base, tmp_path / "pickled", adapter)


@pytest.mark.parametrize("first", [True, False])
def test_where_the_lora_names_every_layer_its_modules_tell_which_base_fits(tmp_path: Path, first: bool) -> None:
    right = {f"layers.{n}.q.weight": torch.randn(48, 48) for n in range(3)}
    pairs = {name: (torch.randn(4, 48), torch.randn(48, 4) * 0.05) for name in right}
    keys = {f"base_model.model.{name.removesuffix('weight')}": pair for name, pair in pairs.items()}
    lora = {f"{key}lora_{half}.weight": pair[half == "B"] for key, pair in keys.items() for half in "AB"}
    save_file(lora, tmp_path / "lora.safetensors")
    save_file(right, tmp_path / "right.safetensors")
    save_file({name: torch.randn(48, 48) for name in right}, tmp_path / "wrong.safetensors")
    save_file({name: right[name] + 2 * b @ a for name, (a, b) in pairs.items()}, tmp_path / "merged.safetensors")
    bases = [tmp_path / "right.safetensors", tmp_path / "wrong.safetensors"][:: 1 if first else -1]
    report = verify_merge(bases, tmp_path / "merged.safetensors", tmp_path / "lora.safetensors", lora_alpha=8.0)
    assert report.exit_code == 0, report.overall.text()
    assert f"of the bases given {bases[not first]} fits best" in report.overall.text()
