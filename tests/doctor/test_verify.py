"""The scale baked into a merged checkpoint is found through the rounding of every dtype and every real merger."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from harness.benches import get_bench
from harness.commands.verify import command
from harness.doctor.baked_law import ScaleFound, name_law
from harness.doctor.verify import MergeReport, verify_merge
from harness.doctor.vote import bounds, half_step, vote, vote_within
from harness.errors import LoraFileError, UserError
from harness.files import LoraWeights, write_lora
from harness.loaders.registry import installed, resolve

DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32]
QKV = "blocks.0.attn.to_qkv"
Merge = Callable[[Tensor, Tensor, float], Tensor]  # base, B @ A, scale -> merged


@dataclass
class Case:
    """A small model on disk and a LoRA for two of its layers."""

    folder: Path
    base: dict[str, Tensor]
    lora: dict[str, LoraWeights]

    def merged(self, merge: Merge, scale: Callable[[LoraWeights], float], **changes: Tensor) -> Path:
        tensors = dict(self.base)
        for name, weights in self.lora.items():
            tensors[f"{name}.weight"] = merge(tensors[f"{name}.weight"], weights.b @ weights.a, scale(weights))
        save_file({**tensors, **changes}, self.folder / "merged.safetensors")
        return self.folder / "merged.safetensors"

    def verify(self, merged: Path, lora: str = "lora.safetensors", **options: float | bool) -> MergeReport:
        return verify_merge(self.folder / "base.safetensors", merged, self.folder / lora, **options)  # type: ignore[arg-type]


def weights(out: int, inputs: int, rank: int, alpha: float | None, seed: int, size: float) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, inputs, generator=generator), torch.randn(out, rank, generator=generator)
    scale = 1.0 if alpha is None else alpha / rank
    return LoraWeights(a, b * (size * 0.02 * (out * inputs) ** 0.5 / float((b @ a).norm()) / scale), alpha)


def make(
    folder: Path, dtype: torch.dtype = torch.bfloat16, size: float = 0.02, alphas: tuple[float, float] = (16, 4)
) -> Case:
    """`size` is ||scale * B @ A|| / ||W||; ranks 8 and 16."""
    torch.manual_seed(0)
    shapes = {QKV: (288, 96), "blocks.0.mlp.up": (192, 96), "blocks.1.norm_proj": (96, 96)}
    base = {f"{name}.weight": (torch.randn(*shape) * 0.02).to(dtype) for name, shape in shapes.items()}
    base["blocks.0.attn.to_qkv.bias"] = torch.randn(288).to(dtype)
    lora = {QKV: weights(288, 96, 8, alphas[0], 1, size), "blocks.0.mlp.up": weights(192, 96, 16, alphas[1], 2, size)}
    save_file(base, folder / "base.safetensors")
    write_lora(folder / "lora.safetensors", "diffsynth", lora)
    return Case(folder, base, lora)


def trained(weights: LoraWeights) -> float:
    return weights.alpha / weights.rank if weights.alpha is not None else 1.0


def rounded_once(base: Tensor, product: Tensor, scale: float) -> Tensor:
    return (base.float() + scale * product).to(base.dtype)


def delta_rounded_too(base: Tensor, product: Tensor, scale: float) -> Tensor:
    delta = (scale * product).to(torch.bfloat16 if base.dtype.itemsize == 1 else base.dtype)
    return (base.float() + delta.float()).to(base.dtype)


def twice(base: Tensor, product: Tensor, scale: float) -> Tensor:
    return rounded_once(rounded_once(base, product, scale), product, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("merge", [rounded_once, delta_rounded_too])
@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_a_right_merge_passes_in_every_dtype(tmp_path: Path, dtype: torch.dtype, merge: Merge, scale: float) -> None:
    case = make(tmp_path, dtype, size=0.1, alphas=(8 * scale, 16 * scale))
    report = case.verify(case.merged(merge, trained))
    assert report.ok, report.overall.text()
    assert report.overall.measured_scale == pytest.approx(scale, rel=0.02 if dtype.itemsize == 1 else 0.005)
    assert report.overall.worst_module is None
    assert len(report.modules) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("code", "formula", "scale"),
    [
        ("LH201", "strength * alpha", lambda w: w.alpha),
        ("LH202", "strength", lambda w: 1.0),
        ("LH203", "strength * alpha / sqrt(rank)", lambda w: w.alpha / w.rank**0.5),
        ("LH206", "2 * strength * alpha / rank", lambda w: 2 * w.alpha / w.rank),
        ("LH204", "strength * alpha 16 / rank", lambda w: 16 / w.rank),
        ("LH209", "0.7 * strength * alpha / rank", lambda w: 0.7 * w.alpha / w.rank),
    ],
)
def test_the_law_of_a_wrong_merge_is_named(
    tmp_path: Path, dtype: torch.dtype, code: str, formula: str, scale: Callable[[LoraWeights], float]
) -> None:
    case = make(tmp_path, dtype, size=0.1)
    overall = case.verify(case.merged(rounded_once, scale)).overall
    assert (overall.outcome, overall.code) == ("failed", code)
    assert overall.law is not None
    assert overall.law.formula.startswith(formula[:3] if code == "LH209" else formula)


def test_a_scale_one_percent_off_fails_and_an_exact_one_is_exact(tmp_path: Path) -> None:
    case = make(tmp_path, size=0.02)
    assert case.verify(case.merged(rounded_once, lambda w: 1.012 * trained(w))).overall.outcome == "failed"
    exact = case.verify(case.merged(rounded_once, trained)).overall
    assert exact.ratio == pytest.approx(1.0, abs=2e-3)


def test_an_update_that_rounding_mostly_loses_is_still_the_right_scale(tmp_path: Path) -> None:
    """The plain projection says 0.55 of the scale here; the vote says 1.00, and 0.55 is what survived."""
    case = make(tmp_path, size=1e-3)
    overall = case.verify(case.merged(rounded_once, trained)).overall
    assert overall.ok
    assert overall.ratio == pytest.approx(1.0, abs=0.01)
    assert overall.survived is not None
    assert 0.4 < overall.survived < 0.7
    assert "merge in float32" in overall.text()


def test_nothing_merged_is_said(tmp_path: Path) -> None:
    case = make(tmp_path)
    overall = case.verify(case.merged(lambda base, product, scale: base, trained)).overall
    assert (overall.code, overall.outcome) == ("LH101", "failed")
    assert "byte-identical" in overall.title


def test_an_update_below_every_rounding_step_is_told_from_nothing_merged(tmp_path: Path) -> None:
    case = make(tmp_path, torch.float8_e4m3fn, size=1e-4)
    report = case.verify(case.merged(rounded_once, trained))
    assert report.overall.code == "LH501"
    assert {verdict.outcome for verdict in report.modules} == {"skipped"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0.1, 3e-3])
def test_a_double_merge_is_named(tmp_path: Path, dtype: torch.dtype, size: float) -> None:
    case = make(tmp_path, dtype, size=size)
    overall = case.verify(case.merged(twice, trained)).overall
    assert overall.code == "LH206"
    assert overall.ratio == pytest.approx(2.0, abs=0.01)
    assert "merged twice" in overall.title


@pytest.mark.parametrize("full", [False, True])
def test_a_merge_of_q_and_k_but_not_v_is_named(tmp_path: Path, full: bool) -> None:
    def only_q_and_k(base: Tensor, product: Tensor, scale: float) -> Tensor:
        merged = rounded_once(base, product, scale)
        return torch.cat([merged[:192], base[192:]]) if len(base) == 288 else merged

    case = make(tmp_path)
    report = case.verify(case.merged(only_q_and_k, trained), full=full)
    assert report.overall.code == "LH102"
    wrong = [verdict for verdict in report.modules if not verdict.ok]
    assert [verdict.worst_module for verdict in wrong] == [QKV]
    assert "not merged in v;" in wrong[0].title


def test_full_finds_a_few_rows_that_sampling_passes_over(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {"layer.weight": (torch.randn(4096, 512) * 0.02).bfloat16()}
    lora = {"layer": weights(4096, 512, 4, 2.0, 3, 0.05)}
    save_file(base, tmp_path / "base.safetensors")
    write_lora(tmp_path / "lora.safetensors", "diffsynth", lora)
    case = Case(tmp_path, base, lora)

    def leave_the_end(base: Tensor, product: Tensor, scale: float) -> Tensor:
        return torch.cat([rounded_once(base, product, scale)[:3072], base[3072:]])

    found = case.verify(case.merged(leave_the_end, trained), full=True).modules[0]
    assert found.data["unmerged_rows"] == [[3072, 4096]]
    assert found.survived == pytest.approx(1.0, abs=0.05)


def test_a_lora_of_another_file_is_named(tmp_path: Path) -> None:
    case = make(tmp_path)
    other = {name: weights(*w.b.shape[:1], w.a.shape[1], w.rank, w.alpha, 77, 0.02) for name, w in case.lora.items()}
    merged = Case(tmp_path, case.base, other).merged(rounded_once, trained)
    overall = case.verify(merged).overall
    assert overall.code == "LH101"
    assert "another LoRA" in overall.title


def test_another_lora_on_top_is_named_and_the_scale_still_found(tmp_path: Path) -> None:
    case = make(tmp_path)
    other = {name: weights(*w.b.shape[:1], w.a.shape[1], w.rank, w.alpha, 77, 0.02) for name, w in case.lora.items()}
    both = {name: (case.lora[name].b @ case.lora[name].a, other[name].b @ other[name].a) for name in case.lora}
    changes = {}
    for name, (own, added) in both.items():
        changes[f"{name}.weight"] = rounded_once(case.base[f"{name}.weight"], own + added, trained(case.lora[name]))
    report = case.verify(case.merged(rounded_once, trained, **changes))
    assert report.overall.code == "LH401"
    assert "other changes besides this LoRA" in report.overall.title
    assert all(v.ratio == pytest.approx(1.0, abs=0.1) for v in report.modules)


def test_another_base_is_named(tmp_path: Path) -> None:
    case = make(tmp_path)
    merged = case.merged(rounded_once, trained)
    save_file(
        {name: torch.randn(t.shape).to(t.dtype) * 0.02 for name, t in case.base.items()}, tmp_path / "base.safetensors"
    )
    overall = case.verify(merged).overall
    assert overall.code == "LH401"
    assert "wrong base" in overall.title


def test_a_base_rounded_from_what_was_merged_passes_with_a_word(tmp_path: Path) -> None:
    torch.manual_seed(5)
    master = {"layer.weight": torch.randn(256, 256) * 0.02}
    lora = {"layer": weights(256, 256, 4, 2.0, 3, 0.05)}
    save_file({"layer.weight": master["layer.weight"].bfloat16()}, tmp_path / "base.safetensors")
    write_lora(tmp_path / "lora.safetensors", "diffsynth", lora)
    to_half = lambda base, product, scale: (base + scale * product).bfloat16()  # noqa: E731
    case = Case(tmp_path, master, lora)
    report = case.verify(case.merged(to_half, trained))
    assert report.ok
    assert report.modules[0].data["state"] == "two roundings"


def test_other_edits_and_missing_tensors_are_named(tmp_path: Path) -> None:
    case = make(tmp_path)
    edited = case.base["blocks.1.norm_proj.weight"] * 2
    merged = case.merged(rounded_once, trained, **{"blocks.1.norm_proj.weight": edited, "new.weight": torch.ones(2, 2)})
    overall = case.verify(merged).overall
    assert overall.code == "LH401"
    assert overall.data["other_changed"] == ["blocks.1.norm_proj.weight"]
    assert overall.data["other_extra"] == ["new.weight"]


def test_nan_in_the_merged_file_is_named(tmp_path: Path) -> None:
    case = make(tmp_path)
    broken = torch.full((288, 96), float("nan")).bfloat16()
    assert case.verify(case.merged(rounded_once, trained, **{f"{QKV}.weight": broken})).overall.code == "LH502"


def test_strength_is_part_of_the_expectation(tmp_path: Path) -> None:
    case = make(tmp_path)
    merged = case.merged(rounded_once, lambda w: 0.5 * trained(w))
    assert case.verify(merged, strength=0.5).ok
    ignored = case.verify(case.merged(rounded_once, trained), strength=0.5).overall
    assert (ignored.code, ignored.law and ignored.law.formula) == ("LH207", "alpha / rank")


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft", "comfyui"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_names_of_every_format_find_their_layers(tmp_path: Path, format: str, prefix: str) -> None:
    case = make(tmp_path)
    merged = case.merged(rounded_once, trained)
    for name in ("base", "merged"):
        path = tmp_path / f"{name}.safetensors"
        from safetensors.torch import load_file

        save_file({prefix + key: value for key, value in load_file(path).items()}, path)
    lora = write_lora(tmp_path / format, format, case.lora)
    assert case.verify(merged, lora.name).ok


def test_language_model_names_that_begin_with_model_match(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = "model.layers.0.self_attn.q_proj"
    case = Case(tmp_path, {f"{name}.weight": torch.randn(64, 64)}, {name: weights(64, 64, 4, 8.0, 1, 1.0)})
    save_file(case.base, tmp_path / "base.safetensors")
    write_lora(tmp_path / "lora", "peft", case.lora)
    assert case.verify(case.merged(rounded_once, trained), "lora").ok


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    case = make(tmp_path)
    merged = case.merged(rounded_once, trained)
    keys = sorted(case.base)
    shards = {"model-1.safetensors": keys[:2], "model-2.safetensors": keys[2:]}
    folder = tmp_path / "sharded"
    folder.mkdir()
    for shard, names in shards.items():
        save_file({name: case.base[name] for name in names}, folder / shard)
    index = {"weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert verify_merge(folder, merged, tmp_path / "lora.safetensors").ok
    assert verify_merge(folder / "model.safetensors.index.json", merged, tmp_path / "lora.safetensors").ok


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    case = make(tmp_path)
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../base.safetensors"}}))
    with pytest.raises(LoraFileError, match="outside its folder"):
        verify_merge(index, case.folder / "base.safetensors", case.folder / "lora.safetensors")


def test_a_lora_for_another_model_is_refused_with_both_names(tmp_path: Path) -> None:
    case = make(tmp_path)
    write_lora(tmp_path / "far.safetensors", "diffsynth", {"encoder.q": case.lora[QKV]})
    with pytest.raises(UserError, match=r"encoder\.q.*is the model that the LoRA was trained on|encoder\.q"):
        case.verify(case.merged(rounded_once, trained), "far.safetensors")


def test_embeddings_and_transposed_layers_are_turned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lora = {"h.c_attn": weights(192, 64, 4, 8.0, 1, 0.1)}
    base = {"h.c_attn.weight": (torch.randn(64, 192) * 0.02).bfloat16()}
    save_file(base, tmp_path / "base.safetensors")
    write_lora(tmp_path / "lora.safetensors", "diffsynth", lora)
    turned = lambda base, product, scale: rounded_once(base, product.t(), scale)  # noqa: E731
    case = Case(tmp_path, base, lora)
    for full in (False, True):
        assert case.verify(case.merged(turned, trained), full=full).ok


REAL = [("peft", "peft"), ("diffusers-fused", "diffusers"), ("diffusers-fused", "kohya"), ("diffsynth", "diffsynth")]


@pytest.mark.parametrize(("loader", "format"), REAL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_merges_of_real_mergers_pass(tmp_path: Path, loader: str, format: str, dtype: torch.dtype) -> None:
    if not {entry.name: entry.available for entry in installed()}.get(loader):
        pytest.skip(f"{loader} is not here")
    bench = get_bench("qwen-image")
    model = bench.build(dtype)
    names = [name for name in bench.lora_layers if "attn" in name][:6]
    lora = {n: weights(*bench.layers[n], 4 << i % 2, 2.0 * (i + 1), i, 0.3) for i, n in enumerate(names)}
    path = write_lora(tmp_path / "lora", format, lora)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "base.safetensors")
    merged = resolve(loader).load(model, path, strength=0.75) or model
    state = {k.replace("base_layer.", ""): v.clone() for k, v in merged.state_dict().items() if "lora_" not in k}
    save_file(state, tmp_path / "merged.safetensors")
    for full in (False, True):
        report = verify_merge(
            tmp_path / "base.safetensors", tmp_path / "merged.safetensors", path, strength=0.75, full=full
        )
        assert report.ok, report.overall.text()
        assert report.overall.ratio == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize(
    ("loader", "format", "code"),
    [("diffsynth-2.0.4", "diffsynth", "LH202"), ("examples/raw_alpha.py:load", "peft", "LH201")],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_merges_of_real_and_example_mergers_that_are_wrong_are_named(
    tmp_path: Path, loader: str, format: str, code: str, dtype: torch.dtype
) -> None:
    if loader.startswith("diffsynth") and loader not in {entry.name for entry in installed() if entry.available}:
        pytest.skip(f"{loader} is not here")
    bench = get_bench("qwen-image")
    model = bench.build(dtype)
    lora = {
        n: weights(*bench.layers[n], 4 << i % 2, 3.0 * (i + 1), i, 0.05) for i, n in enumerate(bench.lora_layers[:4])
    }
    path = write_lora(tmp_path / "lora", format, lora)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "base.safetensors")
    merged = resolve(loader).load(model, path, strength=1.0) or model
    save_file({k: v.clone() for k, v in merged.state_dict().items()}, tmp_path / "merged.safetensors")
    overall = verify_merge(tmp_path / "base.safetensors", tmp_path / "merged.safetensors", path).overall
    assert overall.code == code, overall.text()
    assert overall.modules_failed == 4


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_both_merge_modes_of_peft_pass(tmp_path: Path, safe_merge: bool, rslora: bool) -> None:
    from peft import PeftModel

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(96, 96), torch.nn.Linear(96, 96)).bfloat16()
    lora = {str(i): weights(96, 96, 4 << i, 8.0, i, 0.05) for i in range(2)}
    path = write_lora(tmp_path / "lora", "peft", lora, rslora=rslora)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    merged = PeftModel.from_pretrained(model, str(path)).merge_and_unload(safe_merge=safe_merge)
    save_file(merged.state_dict(), tmp_path / "merged.safetensors")
    report = verify_merge(tmp_path / "base.safetensors", tmp_path / "merged.safetensors", path)
    assert report.ok, report.overall.text()


def test_the_command_exits_with_its_verdict_and_prints_json_lines(tmp_path: Path) -> None:
    case = make(tmp_path)
    merged = case.merged(rounded_once, lambda w: w.alpha or 0.0)
    arguments = [
        "--base",
        str(tmp_path / "base.safetensors"),
        "--merged",
        str(merged),
        "--lora",
        str(tmp_path / "lora.safetensors"),
    ]
    plain = CliRunner().invoke(command, arguments)
    assert plain.exit_code == 1
    assert plain.output.startswith("LH201 alpha not divided by rank")
    lines = [json.loads(line) for line in CliRunner().invoke(command, [*arguments, "--json"]).output.splitlines()]
    assert [line["kind"] for line in lines] == ["header", "verdict", "verdict", "verdict", "footer"]
    assert lines[-1]["exit_code"] == 1
    assert lines[-2]["worst_module"] is None


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]),
    exponent=st.floats(-3, 2),
    scale=st.floats(0.05, 4),
    seed=st.integers(0, 10**6),
)
def test_the_true_scale_is_always_inside_every_interval(dtype: str, exponent: float, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    kind = getattr(torch, dtype)
    base = (torch.randn(2000) * 0.05).to(kind).float()
    product = torch.randn(2000) * 0.05 * 10**exponent
    merged = (base.double() + scale * product.double()).float().clamp(-400, 400).to(kind).float()
    inside = (base + scale * product).abs() < 400
    arrays = [x[inside].numpy() for x in (base, product, merged)]
    low, high = bounds(arrays[2] - arrays[0], arrays[1], half_step(arrays[2], dtype))
    slack = 1e-5 * (1 + np.abs(low) + np.abs(high))
    assert np.all((low - slack <= scale) & (scale <= high + slack))
    window = (scale - 1.0, scale + 1.0)
    narrow = vote_within(low.copy(), high.copy(), window)
    assert vote(low, high).coverage > 0.999
    assert narrow.low - 1e-4 <= scale <= narrow.high + 1e-4


def test_laws_that_the_file_cannot_tell_apart_are_ambiguous() -> None:
    found = [ScaleFound("a", 1.0, 1e-3, 1.0, 8.0, 8)]
    law, code = name_law(found)
    assert code is None
    assert law.ambiguous
    assert "strength" in law.alternatives


DTYPE = st.sampled_from(DTYPES)


@settings(max_examples=40, deadline=None)
@given(
    dtype=DTYPE,
    lora_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shape=st.tuples(*[st.sampled_from([16, 48, 144, 320])] * 2),
    rank=st.integers(1, 16),
    alpha=st.sampled_from([0.5, 3.7, 7.0, 16.0]),
    size=st.floats(-1.5, 0.5),
    strength=st.sampled_from([1.0, 0.7, -0.5]),
    error=st.sampled_from([1.0, 1.03, 0.5, 3.0]),
    merge=st.sampled_from([rounded_once, delta_rounded_too]),
    full=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_right_merge_passes_and_any_wrong_scale_fails(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    shape: tuple[int, int],
    rank: int,
    alpha: float,
    size: float,
    strength: float,
    error: float,
    merge: Merge,
    full: bool,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    torch.manual_seed(seed)
    base = {"layer.weight": (torch.randn(*shape) * 0.02).to(dtype)}
    drawn = weights(*shape, rank, alpha, seed, 10**size)
    lora = {"layer": LoraWeights(drawn.a.to(lora_dtype), drawn.b.to(lora_dtype), alpha)}
    save_file(base, folder / "base.safetensors")
    write_lora(folder / "lora.safetensors", "diffsynth", lora)
    wide = {"layer": LoraWeights(lora["layer"].a.float(), lora["layer"].b.float(), alpha)}
    merged = Case(folder, base, wide).merged(merge, lambda w: error * strength * trained(w))
    report = Case(folder, base, lora).verify(merged, strength=strength, full=full)
    assert report.ok == (error == 1.0), report.overall.text()


def test_a_merge_of_which_nothing_can_be_measured_is_no_pass(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.ones(8, 8)}, tmp_path / "base.safetensors")
    dora = {
        "layer.lora_A.weight": torch.ones(2, 8),
        "layer.lora_B.weight": torch.ones(8, 2),
        "layer.dora_scale": torch.ones(8, 1),
    }
    save_file(dora, tmp_path / "lora.safetensors")
    paths = [tmp_path / name for name in ("base.safetensors", "base.safetensors", "lora.safetensors")]
    report = verify_merge(*paths)
    assert (report.ok, report.exit_code, report.overall.outcome) == (False, 2, "skipped")
