"""Modules that are no plain pair: the scale goes into them within their format, and nothing else changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.benches import get_bench
from harness.commands.repair import command
from harness.doctor import repair_file
from harness.errors import UserError
from harness.files import LoraWeights, read_lora
from harness.files.write import compose, save

Parts = dict[str, Tensor]
LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_k")
FACTORS = {  # the parts that the scale may go into
    "lora_up.weight", "lora_B.weight", "hada_w2_a", "lokr_w1", "lokr_w1_a", "alpha",
}  # fmt: skip


def draw(*shapes: tuple[str, tuple[int, ...]]) -> Parts:
    return {tail: 0.3 * torch.randn(shape) for tail, shape in shapes}


def pair() -> Parts:
    return draw(("lora_down.weight", (4, 48)), ("lora_up.weight", (48, 4)))


def loha() -> Parts:
    return draw(("hada_w1_a", (48, 4)), ("hada_w1_b", (4, 48)), ("hada_w2_a", (48, 4)), ("hada_w2_b", (4, 48)))


def lokr() -> Parts:
    return draw(("lokr_w1", (6, 6)), ("lokr_w2_a", (8, 2)), ("lokr_w2_b", (2, 8)))


VARIANTS: dict[str, Callable[[], Parts]] = {
    "dora": lambda: pair() | {"dora_scale": 0.5 + torch.rand(48, 1)},
    "loha": loha,
    "lokr": lokr,
    "lokr of two pairs": lambda: draw(
        ("lokr_w1_a", (6, 2)), ("lokr_w1_b", (2, 6)), ("lokr_w2_a", (8, 2)), ("lokr_w2_b", (2, 8))
    ),
    "lokr of full factors": lambda: draw(("lokr_w1", (6, 6)), ("lokr_w2", (8, 8))),
    "difference": lambda: draw(("diff", (48, 48)), ("diff_b", (48,))),
}


def lora_file(path: Path, variant: str, *, prefix: str = "lora_unet_", alpha: float | None = 1.0) -> Path:
    torch.manual_seed(5)
    tensors: Parts = {}
    for layer in LAYERS:
        stem = prefix + (layer.replace(".", "_") if prefix == "lora_unet_" else layer)
        tensors |= {f"{stem}.{tail}": tensor for tail, tensor in VARIANTS[variant]().items()}
        tensors |= {f"{stem}.alpha": torch.tensor(alpha)} if alpha is not None and variant != "difference" else {}
    save_file(tensors, path)
    return path


@torch.no_grad()
def changes(path: Path | str) -> Parts:
    """Return the weights that LyCORIS merges."""
    from lycoris import LycorisNetwork, create_lycoris_from_weights  # type: ignore[import-untyped]

    model: nn.Module = get_bench("qwen-image").build()
    LycorisNetwork.apply_preset({"lora_prefix": "lora_unet"})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            create_lycoris_from_weights(1.0, str(path), model)[0].merge_to(1.0)
    finally:
        LycorisNetwork.apply_preset({"lora_prefix": "lycoris"})
    base = get_bench("qwen-image").base()
    return {layer: model.get_submodule(layer).weight - base.get_submodule(layer).weight for layer in LAYERS}


def product(parts: Parts) -> Tensor:
    """Return what one unit of scale adds, as the papers of LoHa and LoKr say."""
    if "hada_w1_a" in parts:
        return (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    first, second = (
        parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"] for name in ("lokr_w1", "lokr_w2")
    )
    return torch.kron(first, second)


@pytest.mark.parametrize(("variant", "scale"), [("loha", 0.25), ("lokr", 0.5), ("lokr of two pairs", 0.5)])
def test_lycoris_merges_what_was_trained(tmp_path: Path, variant: str, scale: float) -> None:
    """It multiplies with the scale of LoHa and LoKr twice when it merges: 1 is the one that no reader gets wrong."""
    source = lora_file(tmp_path / "old.safetensors", variant)
    tensors = load_file(source)
    report = repair_file(source, "kohya", tmp_path / "new")
    assert report.scales == (scale, scale)
    for layer, change in changes(report.path).items():
        stem = f"lora_unet_{layer.replace('.', '_')}."
        wanted = scale * product({key.removeprefix(stem): one for key, one in tensors.items() if key.startswith(stem)})
        assert wanted.abs().max() > 1e-2
        assert torch.allclose(change, wanted, atol=1e-5)


@pytest.mark.parametrize("variant", ["dora", "lokr of full factors"])
def test_lycoris_merges_the_same_as_before(tmp_path: Path, variant: str) -> None:
    source = lora_file(tmp_path / "old.safetensors", variant)
    wanted, found = changes(source), changes(repair_file(source, "kohya", tmp_path / "new").path)
    for layer, change in wanted.items():
        assert change.abs().max() > 1e-3
        assert torch.allclose(found[layer], change, atol=1e-5 * float(change.abs().max()) + 1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("formats", [("kohya", "kohya"), ("comfyui", "comfyui"), ("comfyui", "kohya")])
def test_all_but_the_scale_is_the_same_bit_for_bit(tmp_path: Path, variant: str, formats: tuple[str, str]) -> None:
    prefix = {"kohya": "lora_unet_", "comfyui": "diffusion_model."}
    source = lora_file(tmp_path / "old.safetensors", variant, prefix=prefix[formats[0]])
    old, new = load_file(source), load_file(repair_file(source, formats[1], tmp_path / "new").path)

    def there(key: str) -> str:
        stem, tail = next(
            (key[: -len(tail) - 1], tail) for tail in (*FACTORS, *VARIANTS[variant]()) if key.endswith(f".{tail}")
        )
        if formats[0] == formats[1]:
            return key
        return f"lora_unet_{stem.removeprefix('diffusion_model.').replace('.', '_')}.{tail}"

    assert {there(key) for key in old} == set(new)
    for key, tensor in old.items():
        if not key.endswith(tuple(FACTORS)) or variant == "lokr of full factors":
            assert torch.equal(new[there(key)], tensor), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_formats_without_a_place_refuse_and_name_the_keys(tmp_path: Path, variant: str) -> None:
    source = lora_file(tmp_path / "old.safetensors", variant, prefix="diffusion_model.")
    for to in ("peft", "diffusers", "mlx"):
        with pytest.raises(UserError, match="no place in a") as refused:
            repair_file(source, to, tmp_path / "new")
        assert any(key in str(refused.value) for key in load_file(source))
    assert [entry.name for entry in tmp_path.iterdir()] == ["old.safetensors"]


def test_alpha_is_written_where_there_was_none(tmp_path: Path) -> None:
    source = lora_file(tmp_path / "old.safetensors", "loha", alpha=None)
    with pytest.raises(UserError, match="carries no alpha"):
        repair_file(source, "kohya", tmp_path / "new")
    new = read_lora(repair_file(source, "kohya", tmp_path / "new", lora_alpha=2.0).path)
    assert {module.alpha for module in new.modules.values()} == {4.0}
    part = new.part("transformer_blocks_0_attn_to_q", "hada_w2_a")
    assert torch.equal(part, 0.5 * load_file(source)["lora_unet_transformer_blocks_0_attn_to_q.hada_w2_a"])


def test_a_key_that_nobody_knows_is_kept_within_the_format_and_refused_elsewhere(tmp_path: Path) -> None:
    stem = "diffusion_model.blocks.0.to_q"
    pair = {f"{stem}.lora_A.weight": torch.randn(2, 4), f"{stem}.lora_B.weight": torch.randn(4, 2)}
    odd = {"trained_thing": torch.randn(3), "diffusion_model.blocks.0.to_q.odd": torch.tensor([float("nan")])}
    save_file({**pair, **odd, f"{stem}.alpha": torch.tensor(4.0)}, tmp_path / "old.safetensors")
    report = repair_file(tmp_path / "old.safetensors", "comfyui", tmp_path / "new")
    new = load_file(report.path)
    assert report.carried == 2
    assert all(new[key].numpy().tobytes() == tensor.numpy().tobytes() for key, tensor in odd.items())
    result = CliRunner().invoke(command, [str(tmp_path / "old.safetensors"), "--to", "diffusers", "--out", "x"])
    assert result.exit_code == 2 or isinstance(result.exception, UserError)
    with pytest.raises(UserError, match=r"2 trained tensors have no place in a diffusers file .*trained_thing"):
        repair_file(tmp_path / "old.safetensors", "diffusers", tmp_path / "other")


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_nan_is_refused_with_its_key(tmp_path: Path, half: str) -> None:
    stem = "diffusion_model.blocks.0.to_q"
    tensors = {f"{stem}.lora_A.weight": torch.ones(2, 4), f"{stem}.lora_B.weight": torch.ones(4, 2)}
    tensors[f"{stem}.{half}.weight"][0, 0] = float("nan")
    save_file({**tensors, f"{stem}.alpha": torch.tensor(4.0)}, tmp_path / "old.safetensors")
    with pytest.raises(UserError, match=rf"{half}.weight: holds NaN"):
        repair_file(tmp_path / "old.safetensors", "comfyui", tmp_path / "new")


def test_dtype_converts_the_factors_and_leaves_replaced_weights(tmp_path: Path) -> None:
    source = lora_file(tmp_path / "old.safetensors", "dora")
    new = load_file(repair_file(source, "kohya", tmp_path / "new", dtype="bfloat16").path)
    assert {tensor.dtype for key, tensor in new.items() if key.endswith("weight")} == {torch.bfloat16}
    assert {tensor.dtype for key, tensor in new.items() if key.endswith("dora_scale")} == {torch.float32}


def test_the_architecture_of_a_gguf_adapter_stays(tmp_path: Path) -> None:
    weights = LoraWeights(torch.randn(2, 4), torch.randn(6, 2), 4.0)
    content = compose("gguf", {"blk.0.attn_q": weights})
    source = save(tmp_path / "old.gguf", "gguf", replace(content, metadata={"general.architecture": "qwen2"}))
    new = read_lora(repair_file(source, "gguf", tmp_path / "new").path)
    assert new.metadata["general.architecture"] == "qwen2"
    assert {module.alpha for module in new.modules.values()} == {2.0}
