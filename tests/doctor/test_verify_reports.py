"""Public reports of merges, rebuilt with their key names, ranks and alphas: each gets the true answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.doctor.verify.verify import MergeReport, verify_merge
from tests.doctor.drawn import Drawn, Tensors, plus

D, FP8 = 64, torch.float8_e4m3fn


def codes(report: MergeReport) -> tuple[int, str | None]:
    return report.exit_code, report.overall.code


def test_the_language_tower_that_was_not_merged(tmp_path: Path) -> None:
    """unsloth-zoo#1234: the file says `model.language_model.layers`, the base `model.layers`; the same layers."""
    drawn, base, merged, lora = Drawn(tmp_path), {}, {}, {}
    blocks = [f"layers.{i}.self_attn.{n}_proj" for i in range(4) for n in "qkvo"]
    for inside, outside, names in (
        ("model.", "model.language_model.", blocks),
        ("visual.", "model.visual.", [f"blocks.{i}.attn.proj" for i in range(4)]),
    ):
        for name in names:
            weight, (a, b) = drawn.weight(D, D), drawn.pair(D, D, 8)
            base[f"{inside}{name}.weight"] = weight
            lora |= {
                f"base_model.model.{outside}{name}.lora_{half}.weight": part for half, part in (("A", a), ("B", b))
            }
            merged[f"{inside}{name}.weight"] = plus(weight, a, b, 2) if inside == "visual." else weight.clone()
    stores = drawn.save("base.safetensors", base), drawn.save("merged.safetensors", merged)
    report = verify_merge(*stores, drawn.peft(lora))
    assert codes(report) == (1, "LH102"), report.overall.text()
    assert "not merged: 16 of 20 modules" in report.overall.title


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_without_alpha_no_scale_is_right_or_wrong(tmp_path: Path, alpha: float | None) -> None:
    """sglang#34359: rank 128, trained with alpha 8, no alpha in the file, merged at 1: 16 times too strong."""
    drawn, base, strong, lora = Drawn(tmp_path), {}, {}, {}
    for name in (f"blocks.{i}.attn.{n}" for i in range(3) for n in ("to_q", "to_k", "to_v", "to_out.0")):
        weight, (a, b) = drawn.weight(256, 256), drawn.pair(256, 256, 128)
        base[f"{name}.weight"], strong[f"{name}.weight"] = weight, plus(weight, a, b, 1)
        lora |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    paths = [drawn.save(f"{n}.safetensors", t) for n, t in (("base", base), ("merged", strong), ("lora", lora))]
    report = verify_merge(*paths, lora_alpha=alpha)
    if alpha is None:
        assert codes(report) == (3, None)
        assert "alpha unknown, scale 1 measured" in report.overall.title
    else:
        assert codes(report) == (1, "LH202")
        assert report.overall.ratio == pytest.approx(16, rel=1e-2)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_compiled_adapter_that_peft_ignored(tmp_path: Path, prefix: str) -> None:
    """Soup#335: every key begins with `_orig_mod.`, PEFT loads nothing."""
    drawn, base, lora = Drawn(tmp_path), {}, {}
    for name in (f"model.layers.{i}.self_attn.{n}_proj" for i in range(3) for n in "qv"):
        (a, b), base[f"{name}.weight"] = drawn.pair(D, D, 8), drawn.weight(D, D)
        key = f"{prefix}base_model.model.{name}"
        lora |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    path = drawn.save("base.safetensors", base)
    report = verify_merge(path, path, drawn.peft(lora))
    assert codes(report) == (1, "LH101")
    assert "nothing was merged" in report.overall.title


def test_split_projections_on_a_fused_base(tmp_path: Path) -> None:
    """ComfyUI#11487: Z-Image's to_q, to_k and to_v, and a base with one qkv; only the feed forward was merged."""
    drawn, base, right, lora = Drawn(tmp_path), {}, {}, {}
    for block in (f"layers.{i}" for i in range(2)):
        qkv, parts = drawn.weight(3 * D, D), [drawn.pair(D, D, 16) for _ in range(3)]
        layers = {"attention.qkv": qkv, "attention.out": drawn.weight(D, D), "feed_forward.w1": drawn.weight(128, D)}
        names = {"attention.out": "attention_to_out_0", "feed_forward.w1": "feed_forward_w1"}
        halves = dict(zip((f"attention_to_{n}" for n in "qkv"), parts, strict=True))
        right[f"{block}.attention.qkv.weight"] = torch.cat(
            [plus(qkv[D * i : D * (i + 1)], *pair, 0.5) for i, pair in enumerate(parts)]
        )
        for layer, name in names.items():
            halves[name] = drawn.pair(len(layers[layer]), D, 16)
            right[f"{block}.{layer}.weight"] = plus(layers[layer], *halves[name], 0.5)
        base |= {f"{block}.{layer}.weight": weight for layer, weight in layers.items()}
        for name, (a, b) in halves.items():
            key = f"lora_unet_{block.replace('.', '_')}_{name}"
            lora |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(8.0)}
    paths = drawn.save("base.safetensors", base), drawn.save("lora.safetensors", lora)
    assert codes(verify_merge(paths[0], drawn.save("right.safetensors", right), paths[1])) == (0, None)
    partly = {key: weight if "feed_forward" in key else base[key] for key, weight in right.items()}
    report = verify_merge(paths[0], drawn.save("partly.safetensors", partly), paths[1])
    assert codes(report) == (1, "LH102")
    assert "not merged: 8 of 10 modules" in report.overall.title


@pytest.mark.parametrize("full", [False, True])
def test_unequal_slices_of_a_fused_layer(tmp_path: Path, full: bool) -> None:
    """sdnext#4825: Chroma's linear1 stacks [D, D, D, 4 D]; the fault gave proj_mlp the first rows."""
    drawn, bfl, own, lora = Drawn(tmp_path), {}, {}, {}
    fused: Tensors = {}
    right, wrong = {}, {}
    heights = {"attn.to_q": D, "attn.to_k": D, "attn.to_v": D, "proj_mlp": 4 * D}
    for i in range(2):
        weight, (a, b) = drawn.weight(7 * D, D), drawn.pair(7 * D, D, 16)
        bfl[f"single_blocks.{i}.linear1.weight"] = weight
        fused[f"single_blocks.{i}.linear1.weight"] = plus(weight, a, b, 0.5)
        key, at = f"lora_unet_single_blocks_{i}_linear1", 0
        lora |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(8.0)}
        for name, height in heights.items():
            layer, rows = f"single_transformer_blocks.{i}.{name}.weight", slice(at, at + height)
            own[layer], right[layer] = weight[rows], plus(weight[rows], a, b[rows], 0.5)
            wrong[layer] = plus(weight[rows], a, b[:height] if name == "proj_mlp" else b[rows], 0.5)
            at += height
    adapter = drawn.save("lora.safetensors", lora)
    stores = {
        name: drawn.save(f"{name}.safetensors", tensors)
        for name, tensors in (("bfl", bfl), ("fused", fused), ("own", own), ("right", right), ("wrong", wrong))
    }
    assert codes(verify_merge(stores["bfl"], stores["fused"], adapter, full=full)) == (0, None)
    assert codes(verify_merge(stores["own"], stores["right"], adapter, full=full)) == (0, None)
    assert codes(verify_merge(stores["bfl"], stores["right"], adapter, full=full)) == (0, None)
    assert codes(verify_merge(stores["own"], stores["wrong"], adapter, full=full)) == (1, "LH101")


def test_scaled_fp8_is_merged_with_its_scale(tmp_path: Path) -> None:
    """ComfyUI#10267: the LoRA was added to the stored numbers without their scale."""
    drawn, base, wrong, right, lora = Drawn(tmp_path), {}, {}, {}, {}
    for name in (f"blocks.{i}.self_attn.{n}" for i in range(2) for n in "qkvo"):
        weight, (a, b) = drawn.weight(128, 128, dtype=torch.float32), drawn.pair(128, 128, 16, 0.05)
        scale, update = weight.abs().max() / 448, b.float() @ a.float()
        code = (weight / scale).to(FP8)
        total = code.float() * scale + update
        other = total.abs().max() / 448
        base |= {f"{name}.weight": code, f"{name}.scale_weight": scale}
        wrong |= {f"{name}.weight": (code.float() + update).to(FP8), f"{name}.scale_weight": scale}
        right |= {f"{name}.weight": (total / other).to(FP8), f"{name}.scale_weight": other}
        key = f"diffusion_model.{name}"
        lora |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, f"{key}.alpha": torch.tensor(16.0)}
    marked = {name: {**tensors, "scaled_fp8": torch.zeros(2).to(FP8)} for name, tensors in
              (("base", base), ("wrong", wrong), ("right", right))}  # fmt: skip
    paths = {name: drawn.save(f"{name}.safetensors", tensors) for name, tensors in marked.items()}
    adapter = drawn.save("lora.safetensors", lora)
    for full in (False, True):
        assert codes(verify_merge(paths["base"], paths["right"], adapter, full=full)) == (0, None)
        assert verify_merge(paths["base"], paths["wrong"], adapter, full=full).exit_code == 1
