"""The scale of updates that are no plain B @ A: DoRA, LoHa, LoKr, Tucker cores, whole differences and biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.doctor import inspect_file
from harness.doctor.verify.verify import MergeReport, verify_merge
from tests import closed_form as closed

DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32]
RANK = 6
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """A variant: the shape of its weight, its tensors, and what one unit of scale adds to the weight."""

    shape: tuple[int, ...]
    draw: Callable[[], Parts]
    product: Callable[[Parts], Tensor]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_GENERATOR)


_GENERATOR = torch.Generator().manual_seed(7)


def _loha() -> Parts:
    shapes = {"hada_w1_a": (144, RANK), "hada_w1_b": (RANK, 96), "hada_w2_a": (144, RANK), "hada_w2_b": (RANK, 96)}
    return {role: randn(*shape) for role, shape in shapes.items()}


def _halves(parts: Parts, core: bool = False) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    first, second = ((parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"]) for n in "12")
    return ((*first, parts["hada_t1"]), (*second, parts["hada_t2"])) if core else (first, second)


def _loha_core() -> Parts:
    shapes = {f"hada_w{n}_{side}": (RANK, size) for n in "12" for side, size in (("a", 48), ("b", 24))}
    return {role: randn(*shape) for role, shape in (shapes | {f"hada_t{n}": (RANK, RANK, 3, 3) for n in "12"}).items()}


def _tucker() -> Parts:
    shapes = {"down": (RANK, 24, 1, 1), "mid": (RANK, RANK, 3, 3), "up": (48, RANK, 1, 1)}
    return {f"lora_{role}.weight": randn(*shape) for role, shape in shapes.items()}


KINDS = {
    "loha": Kind((144, 96), _loha, lambda p: closed.loha_product(*_halves(p))),
    "loha with cores": Kind((48, 24, 3, 3), _loha_core, lambda p: closed.loha_product(*_halves(p, core=True))),
    "lokr": Kind(
        (144, 96),
        lambda: {"lokr_w1": randn(8, 4), "lokr_w2_a": randn(18, RANK), "lokr_w2_b": randn(RANK, 24)},
        lambda p: closed.lokr_product((p["lokr_w1"],), (p["lokr_w2_a"], p["lokr_w2_b"])),
    ),
    "lokr of a convolution": Kind(
        (48, 24, 3, 3),
        lambda: {"lokr_w1_a": randn(4, RANK), "lokr_w1_b": randn(RANK, 4), "lokr_w2": randn(12, 6, 3, 3)},
        lambda p: closed.lokr_product((p["lokr_w1_a"], p["lokr_w1_b"]), (p["lokr_w2"],)),
    ),
    "lokr with a core": Kind(
        (48, 24, 3, 3),
        lambda: {
            "lokr_w1": randn(4, 4), "lokr_w2_a": randn(RANK, 12),
            "lokr_w2_b": randn(RANK, 6), "lokr_t2": randn(RANK, RANK, 3, 3),
        },
        lambda p: closed.lokr_product((p["lokr_w1"],), (p["lokr_w2_a"], p["lokr_w2_b"], p["lokr_t2"])),
    ),
    "tucker": Kind(
        (48, 24, 3, 3),
        _tucker,
        lambda p: closed.tucker_product(*(p[f"lora_{role}.weight"] for role in ("down", "up", "mid"))),
    ),
}  # fmt: skip


@dataclass
class Case:
    """Two layers with the same kind of update and different alphas, on disk."""

    folder: Path
    base: Parts
    lora: Parts
    deltas: Mapping[str, Tensor]
    alphas: Mapping[str, float]

    def verify(self, scale: Callable[[float], float], **options: float | bool) -> MergeReport:
        merged = dict(self.base)
        for name, delta in self.deltas.items():
            weight = self.base[f"{name}.weight"]
            merged[f"{name}.weight"] = (weight.double() + scale(self.alphas[name]) * delta).to(weight.dtype)
        save_file(merged, self.folder / "merged.safetensors")
        paths = (self.folder / f"{name}.safetensors" for name in ("base", "merged", "lora"))
        return verify_merge(*paths, **options)  # type: ignore[arg-type]


def make(folder: Path, kind: Kind, dtype: torch.dtype, size: float = 0.05) -> Case:
    """Write the base and a kohya file in which |alpha / rank * delta| is about `size` * |W|."""
    _GENERATOR.manual_seed(7)
    alphas = {"blocks_0_x": 3.0, "blocks_1_x": 9.0}
    base = {f"{name}.weight": (randn(*kind.shape) * 0.02).to(dtype) for name in alphas}
    lora, deltas = {}, {}
    for name, alpha in alphas.items():
        parts = kind.draw()
        first = next(iter(parts))
        parts[first] *= size * base[f"{name}.weight"].float().norm() / kind.product(parts).norm() / (alpha / RANK)
        deltas[name] = kind.product(parts)
        lora |= {f"lora_unet_{name}.{role}": part.contiguous() for role, part in parts.items()}
        lora[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    save_file(base, folder / "base.safetensors")
    save_file(lora, folder / "lora.safetensors")
    return Case(folder, base, lora, deltas, alphas)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_right_merge_passes_and_a_wrong_law_is_named(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    case = make(tmp_path, KINDS[kind], dtype)
    report = case.verify(lambda alpha: alpha / RANK)
    assert report.ok, report.overall.text()
    assert report.overall.ratio == pytest.approx(1.0, abs=0.03 if dtype.itemsize == 1 else 5e-3)
    for code, power, divisor in (("LH201", 1, 1.0), ("LH202", 0, 1.0), ("LH203", 1, RANK**0.5)):
        overall = case.verify(lambda alpha, power=power, divisor=divisor: alpha**power / divisor).overall  # type: ignore[misc]
        assert (overall.outcome, overall.code) == ("failed", code), overall.text()


@pytest.mark.parametrize("kind", KINDS)
def test_full_sees_the_same_and_rounding_is_read_through(tmp_path: Path, kind: str) -> None:
    case = make(tmp_path, KINDS[kind], torch.bfloat16, size=2e-3)
    for full in (False, True):
        overall = case.verify(lambda alpha: alpha / RANK, full=full).overall
        assert overall.ok, overall.text()
        assert overall.ratio == pytest.approx(1.0, abs=0.02)
        assert overall.survived == pytest.approx(0.83, abs=0.17)


def test_a_module_that_was_left_out_is_named(tmp_path: Path) -> None:
    case = make(tmp_path, KINDS["loha"], torch.bfloat16)
    overall = case.verify(lambda alpha: alpha / RANK if alpha == 3.0 else 0.0).overall
    assert overall.code == "LH102"
    assert "blocks_1_x" in overall.title


def whole(folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Parts, Parts]:
    """Write a base and a file of whole differences of a weight, a bias and a norm, and a pair with a bias."""
    torch.manual_seed(3)
    shapes = {"a.weight": (96, 48), "a.bias": (96,), "n.weight": (128,), "n.bias": (128,)}
    base = {name: (torch.randn(shape) * 0.02).to(dtype) for name, shape in shapes.items()}
    ends = {"a.weight": "a.diff", "a.bias": "a.diff_b", "n.weight": "n.w_norm", "n.bias": "n.b_norm"}
    lora = {f"lora_unet_{ends[name]}": 0.002 * torch.randn(tensor.shape) for name, tensor in base.items()}
    save_file(base, folder / "base.safetensors")
    save_file(lora, folder / "lora.safetensors")
    return base, {name: lora[f"lora_unet_{end}"] for name, end in ends.items()}


def stored(folder: Path, tensors: Parts, **options: float) -> MergeReport:
    save_file(tensors, folder / "merged.safetensors")
    return verify_merge(*(folder / f"{name}.safetensors" for name in ("base", "merged", "lora")), **options)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_whole_differences_are_added_with_the_strength_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    base, diffs = whole(tmp_path, dtype)
    merge = lambda factor: {n: (t.double() + factor * diffs[n].double()).to(dtype) for n, t in base.items()}  # noqa: E731
    right = stored(tmp_path, merge(0.5), strength=0.5)
    assert right.ok, right.overall.text()
    assert {verdict.worst_module for verdict in right.modules} == {"a", "a (bias)", "n", "n (bias)"}
    wrong = stored(tmp_path, merge(1.0), strength=0.5)
    assert wrong.overall.code == "LH207"


def test_a_whole_difference_that_only_reached_the_weight_is_named(tmp_path: Path) -> None:
    base, diffs = whole(tmp_path)
    merged = {**base, "a.weight": (base["a.weight"].double() + diffs["a.weight"].double()).bfloat16()}
    overall = stored(tmp_path, merged).overall
    assert overall.code == "LH102"
    assert "3 of 4" in overall.title


def test_a_bias_has_the_scale_of_its_pair(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {"a.weight": torch.randn(96, 48) * 0.02, "a.bias": torch.randn(96) * 0.02}
    a, b, bias = torch.randn(4, 48) * 0.02, torch.randn(96, 4) * 0.02, torch.randn(96) * 0.002
    names = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
    lora = {f"transformer.a.{name}": part for name, part in zip(names, (a, b, bias), strict=True)}
    save_file(base, tmp_path / "base.safetensors")
    save_file({**lora, "transformer.a.alpha": torch.tensor(8.0)}, tmp_path / "lora.safetensors")
    merge = lambda s, t: {"a.weight": base["a.weight"] + s * b @ a, "a.bias": base["a.bias"] + t * bias}  # noqa: E731
    assert stored(tmp_path, merge(2.0, 2.0)).ok
    unscaled = stored(tmp_path, merge(2.0, 1.0))
    assert [verdict.worst_module for verdict in unscaled.modules if not verdict.ok] == ["a (bias)"]
    assert unscaled.overall.code == "LH202"


# what a merge takes of the pair and of the difference: exit code, the tensor that is wrong
BESIDE = {
    (2, 1): (0, None), (0, 1): (1, "LH102"), (2, 0): (1, "LH102"), (0, 0): (1, "LH102"), (4, 1): (1, "LH203"),
    (2, 2): (1, "LH209"),
}  # fmt: skip


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("taken", BESIDE, ids=str)
def test_a_pair_and_a_whole_difference_of_one_weight_are_told_apart(
    taken: tuple[int, int], dtype: torch.dtype, full: bool, tmp_path: Path
) -> None:
    """A pair has alpha / rank, a difference the strength alone, whether it is the weight's or the bias'."""
    torch.manual_seed(0)
    base = {f"{name}.{end}": (0.02 * torch.randn(96, 48) if end == "weight" else torch.randn(96)).to(dtype)
            for name in ("a", "c") for end in ("weight", "bias")}  # fmt: skip
    a, b = torch.randn(4, 48), 0.01 * torch.randn(96, 4)
    lora = {f"lora_unet_{n}.{key}": t.clone() for n in ("a", "c")
            for key, t in (("lora_down.weight", a), ("lora_up.weight", b), ("alpha", torch.tensor(8.0)))}  # fmt: skip
    lora |= {"lora_unet_a.diff_b": torch.randn(96), "lora_unet_c.diff": 0.01 * torch.randn(96, 48)}
    save_file(base, tmp_path / "base.safetensors")
    save_file(lora, tmp_path / "lora.safetensors")
    add = lambda key, change: {key: (base[key].float() + change).to(dtype)}  # noqa: E731
    merged = {**base, **add("a.weight", 2 * b @ a), **add("a.bias", lora["lora_unet_a.diff_b"])}
    merged |= add("c.weight", taken[0] * b @ a + taken[1] * lora["lora_unet_c.diff"])
    report = stored(tmp_path, merged, full=full)
    assert (report.exit_code, report.overall.code) == BESIDE[taken], report.overall.text()
    wrong = [verdict.worst_module for verdict in report.modules if not verdict.ok]
    assert wrong == [name for name, own, due in zip(("c", "c (difference)"), taken, (2, 1), strict=True) if own != due]


def test_what_is_not_read_is_listed_and_its_layer_not_blamed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {f"blocks.{i}.weight": torch.randn(64, 64) for i in range(3)}
    a, b = torch.randn(4, 64), torch.randn(64, 4)
    lora = {"lora_unet_blocks_0.lora_down.weight": a, "lora_unet_blocks_0.lora_up.weight": b}
    lora["lora_unet_blocks_0.alpha"] = torch.tensor(4.0)
    lora |= {
        "lora_unet_blocks_1.oft_blocks": torch.randn(4, 16, 16),
        "lora_unet_blocks_2.set_weight": torch.ones(64, 64),
    }
    save_file(base, tmp_path / "base.safetensors")
    save_file(lora, tmp_path / "lora.safetensors")
    changed = {"blocks.1.weight": -base["blocks.1.weight"], "blocks.2.weight": torch.ones(64, 64)}
    report = stored(tmp_path, {**base, **changed, "blocks.0.weight": base["blocks.0.weight"] + b @ a})
    assert report.exit_code == 3, report.overall.text()
    assert [verdict.outcome for verdict in report.modules].count("skipped") == 1
    for word in ("OFT / BOFT", "2 of 3 right, 1 NOT JUDGED: blocks_1"):
        assert word in report.overall.text()


def test_why_a_tensor_has_no_measurement_is_a_kind_and_not_a_sentence(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {f"blocks.{i}.weight": torch.randn(64, 64) for i in range(4)}
    pair = {"lora_down.weight": torch.randn(4, 64), "lora_up.weight": torch.randn(64, 4)}
    lora = {f"lora_unet_blocks_{i}.{key}": half.clone() for i in (0, 1, 9) for key, half in pair.items()}
    lora |= {"lora_unet_blocks_2.diff_b": torch.randn(64), "lora_unet_blocks_3.set_weight": torch.ones(64, 64)}
    save_file(base, tmp_path / "base.safetensors")
    save_file(lora, tmp_path / "lora.safetensors")
    right = base["blocks.0.weight"] + pair["lora_up.weight"] @ pair["lora_down.weight"]
    report = stored(tmp_path, {**base, "blocks.0.weight": right, "blocks.1.weight": torch.randn(64, 32)})
    kinds = {module.name: module.problem and module.problem.kind for module in report.measured}
    assert kinds == {
        "blocks_0": None,
        "blocks_1": "misfit",
        "blocks_9": "missing layer",
        "blocks_2 (bias)": "missing tensor",
        "blocks_3": None,
    }
    codes = {verdict.worst_module: (verdict.outcome, verdict.code) for verdict in report.modules}
    assert codes["blocks_3"] == ("failed", "LH102")
    assert [codes[name][1] for name in ("blocks_1", "blocks_9", "blocks_2 (bias)")] == ["LH902", "LH103", "LH103"]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("edited", [False, True])
def test_a_pair_without_effect_hides_no_edit(tmp_path: Path, edited: bool, full: bool) -> None:
    base = {"x.q.weight": torch.randn(64, 64)}
    lora = {"lora_A": torch.randn(4, 64), "lora_B": torch.zeros(64, 4)}
    tensors = {f"diffusion_model.x.q.{half}.weight": tensor for half, tensor in lora.items()}
    save_file({**tensors, "diffusion_model.x.q.alpha": torch.tensor(4.0)}, tmp_path / "lora.safetensors")
    save_file(base, tmp_path / "base.safetensors")
    merged = {"x.q.weight": base["x.q.weight"] + 0.01 * edited * torch.randn(64, 64)}
    save_file(merged, tmp_path / "merged.safetensors")
    report = verify_merge(*(tmp_path / f"{name}.safetensors" for name in ("base", "merged", "lora")), full=full)
    assert report.exit_code == int(edited), report.overall.text()


def test_rows_that_a_stacked_layer_lacks_are_named(tmp_path: Path) -> None:
    diff = {f"diffusion_model.transformer_blocks.0.attn.to_{one}.diff": torch.randn(64, 64) for one in "qk"}
    save_file(diff, tmp_path / "lora.safetensors")
    for name in ("base", "merged"):
        save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(64, 64)}, tmp_path / f"{name}.safetensors")
    report = verify_merge(*(tmp_path / f"{name}.safetensors" for name in ("base", "merged", "lora")))
    assert report.exit_code == 1
    assert "has fewer rows than this changes" in report.overall.text()


@pytest.mark.parametrize(
    ("fault", "code"), [("", None), ("not merged", "LH101"), ("twice", "LH209"), ("zeros filled", "LH401")]
)
@pytest.mark.parametrize("full", [False, True])
def test_a_layer_that_the_merge_has_with_more_inputs_is_held_against_the_base_s_with_zeros(
    fault: str, code: str | None, full: bool, tmp_path: Path
) -> None:
    """FLUX's control LoRAs: diffusers widens `x_embedder` so when it loads one."""
    torch.manual_seed(0)
    base, a, b = 0.1 * torch.randn(64, 32), 0.1 * torch.randn(4, 64), 0.1 * torch.randn(64, 4)
    wide = torch.nn.functional.pad(base, (0, 32))
    times = {"not merged": 0.0, "twice": 2.0}.get(fault, 1.0)
    merged = wide + times * b @ a
    if fault == "zeros filled":
        merged[:, 32:] += 0.1
    save_file({"x_embedder.weight": base}, tmp_path / "base.safetensors")
    save_file({"x_embedder.weight": merged}, tmp_path / "merged.safetensors")
    lora = {"transformer.x_embedder.lora_A.weight": a, "transformer.x_embedder.lora_B.weight": b}
    save_file(lora, tmp_path / "lora.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "merged", "lora")]
    report = verify_merge(*paths, lora_alpha=4.0, full=full)
    assert report.exit_code == int(bool(fault)), report.overall.text()
    assert report.overall.code == code or fault == "twice", report.overall.text()
    assert "LH719" not in inspect_file(paths[2], base=paths[0]).codes
