"""torch's own attention, whose inputs are one parameter without a layer: OpenCLIP's, and what PEFT adapts of it."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.doctor import inspect_file, repair_file
from harness.doctor.repair.naming import layers_from
from harness.doctor.verify.verify import verify_merge

D = 32
Tensors = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(D, 4, batch_first=True)
        self.ln_1 = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x)[0]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block() for _ in range(2))
        self.config = {"model_type": "clip"}

    def forward(self, x: Tensor) -> Tensor:
        for block in self.transformer.resblocks:
            x = block(x)
        return x


def save(path: Path, tensors: Tensors) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def test_what_peft_merges_into_torch_s_attention_is_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Encoder()
    base = save(tmp_path / "base.safetensors", copy.deepcopy(model.state_dict()))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["attn"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(tmp_path / "lora")
    merged = adapted.merge_and_unload().state_dict()
    report = verify_merge(base, save(tmp_path / "merged.safetensors", merged), tmp_path / "lora")
    assert (report.exit_code, len(report.modules)) == (3, 4), report.overall.text()
    assert {verdict.outcome for verdict in report.modules if "out_proj" not in str(verdict.worst_module)} == {"passed"}
    before, lora = load_file(base), load_file(tmp_path / "lora/adapter_model.safetensors")
    layer = "transformer.resblocks.0.attn"
    delta = merged[f"{layer}.out_proj.weight"] - before[f"{layer}.out_proj.weight"]
    a, b = (lora[f"base_model.model.{layer}.base_layer.out_proj.lora_{half}.weight"] for half in "AB")
    assert torch.allclose(delta, 4 * b @ a, atol=1e-5)  # twice alpha / rank: why out_proj is not judged
    layer = "transformer.resblocks.1.attn.in_proj_weight"
    merged[layer][D : 2 * D] = before[layer][D : 2 * D]
    report = verify_merge(base, save(tmp_path / "wrong.safetensors", merged), tmp_path / "lora")
    assert (report.exit_code, report.overall.code) == (1, "LH102"), report.overall.text()
    record = inspect_file(tmp_path / "lora", base=base)
    assert record.fit is not None
    assert (record.fit.applied, record.fit.modules) == (4, 4)


@pytest.mark.parametrize("prefix", ["conditioner.embedders.1.model.", ""])
def test_three_projections_of_a_text_encoder_are_rows_of_one_parameter(prefix: str, tmp_path: Path) -> None:
    """SDXL's second text encoder: kohya trains transformers' names, the checkpoint has OpenCLIP's."""
    generator = torch.Generator().manual_seed(1)
    base: Tensors = {}
    merged: Tensors = {}
    lora: Tensors = {}
    for block in range(2):
        name = f"{prefix}transformer.resblocks.{block}.attn"
        base[f"{name}.in_proj_weight"] = torch.randn(3 * D, D, generator=generator)
        base[f"{name}.in_proj_bias"] = torch.zeros(3 * D)
        base[f"{name}.out_proj.weight"] = torch.randn(D, D, generator=generator)
        parts = []
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            a, b = torch.randn(4, D, generator=generator), 0.1 * torch.randn(D, 4, generator=generator)
            key = f"lora_te2_text_model_encoder_layers_{block}_self_attn_{part}"
            lora |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(2.0)}
            parts.append(0.5 * b @ a)
        merged |= {**base, **merged}
        merged[f"{name}.in_proj_weight"] = base[f"{name}.in_proj_weight"] + torch.cat(parts[:3])
        merged[f"{name}.out_proj.weight"] = base[f"{name}.out_proj.weight"] + parts[3]
    if prefix:
        unet = {"model.diffusion_model.input_blocks.1.1.proj_in.weight": torch.ones(4, 4)}
        base, merged = {**base, **unet}, {**merged, **unet}
    paths = [save(tmp_path / f"{n}.safetensors", t) for n, t in (("base", base), ("merged", merged), ("lora", lora))]
    report = verify_merge(*paths)
    assert (report.exit_code, len(report.modules)) == (0, 8), report.overall.text()
    record = inspect_file(paths[2], base=paths[0])
    assert record.fit is not None
    assert (record.fit.applied, record.codes) == (8, ())
    repair_file(paths[2], "kohya", tmp_path / "fixed.safetensors", model_names=layers_from(paths[0]))
    assert load_file(tmp_path / "fixed.safetensors").keys() == lora.keys()
