"""Energies are those of the dense ΔW, which the code under test never forms."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from harness.doctor import inspect_file
from harness.doctor.checkpoint import Checkpoint
from harness.doctor.inspect.energy import pair_energy, untargeted
from harness.doctor.inspect.spectrum import singular_values
from harness.errors import LoraFileError
from harness.files import LoraWeights, read_lora, write_lora
from harness.verdict.blocks import family_of

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@settings(max_examples=120, deadline=None)
@given(
    rank=st.integers(1, 12),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    dtype=DTYPES,
    scale=st.floats(-4, 4),
    condition=st.sampled_from([0, 2, 5]),
    seed=st.integers(0, 10**6),
)
def test_energy_equals_that_of_the_dense_product(
    rank: int, inputs: int, outputs: int, dtype: torch.dtype, scale: float, condition: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    decay = torch.logspace(0, -condition, rank, dtype=torch.float64)[:, None]
    a = (torch.randn(rank, inputs, generator=generator, dtype=torch.float64) * decay).to(dtype)
    b = torch.randn(outputs, rank, generator=generator, dtype=torch.float64).to(dtype)
    dense = scale * (b.double() @ a.double())
    values = torch.linalg.svdvals(dense)
    energy = pair_energy(a, b, scale)
    assert energy.finite
    assert energy.norm == pytest.approx(float(dense.square().sum().sqrt()), rel=2e-6, abs=1e-12)
    assert energy.spectral == pytest.approx(float(values[0]), rel=2e-6, abs=1e-12)
    leading = torch.tensor(energy.singular)[: len(values)].double()
    assert torch.allclose(leading, values[: len(leading)], rtol=1e-5, atol=1e-6 * float(values[0]) + 1e-12)
    assert energy.effective_rank <= min(rank, inputs, outputs) * (1 + 1e-3) + 1e-9


def test_small_singular_values_keep_their_digits() -> None:
    wanted = torch.logspace(0, -8, 6, dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(50, 6, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64)).Q
    found = singular_values((wanted.sqrt() * right).t(), left * wanted.sqrt())
    assert torch.allclose(found, wanted, rtol=1e-6)


def test_the_norm_of_a_large_layer_is_right_where_torchs_own_is_not() -> None:
    """torch's float32 norm of 38 million elements is off by 2e-3; ||BA|| needs none of them."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 3072), torch.randn(12288, 4)
    exact = float((b.double() @ a.double()).square().sum().sqrt())
    assert pair_energy(a, b, 1.0).norm == pytest.approx(exact, rel=1e-6)


def test_values_whose_squares_overflow_float32_are_finite_still() -> None:
    energy = pair_energy(torch.full((2, 3), 1e30).bfloat16(), torch.full((4, 2), 1e-30).bfloat16(), 1.0)
    assert energy.finite
    assert energy.norm == pytest.approx(math.sqrt(12) * 2, rel=1e-2)


def test_convolutions_count_their_whole_kernel() -> None:
    a, b = torch.randn(3, 4, 3, 3), torch.randn(5, 3, 1, 1)
    dense = torch.einsum("or,rikl->oikl", b[:, :, 0, 0], a)
    assert pair_energy(a, b, 0.5).norm == pytest.approx(float(dense.norm()) / 2, rel=1e-5)


def lora(scale: float, names: tuple[str, ...] = ("blocks.0.to_q", "blocks.1.to_q")) -> dict[str, LoraWeights]:
    torch.manual_seed(1)
    return {name: LoraWeights(torch.randn(4, 16), scale * torch.randn(24, 4), 8.0) for name in names}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    weights = {
        f"blocks.{i}.{part}.weight": torch.randn(24, 16) for i in range(2) for part in ("to_q", "to_k", "mlp.net.2")
    }
    weights |= {"blocks.0.norm.weight": torch.ones(24), "proj_out.weight": torch.randn(40, 24)}
    (tmp_path / "base").mkdir()
    for shard, keys in enumerate((sorted(weights)[:3], sorted(weights)[3:])):
        save_file({key: weights[key] for key in keys}, tmp_path / "base" / f"model-{shard}.safetensors")
    return tmp_path / "base"


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_relative_energy_is_against_the_base_of_the_same_name(tmp_path: Path, base: Path, format: str) -> None:
    modules = lora(0.05)
    path = write_lora(tmp_path / "x", format, modules)
    record = inspect_file(path, base=base)
    assert record.energy is not None
    weights = Checkpoint.open(base)
    for name, model_name in zip(record.energy, sorted(modules), strict=True):
        dense = 2.0 * modules[model_name].b @ modules[model_name].a
        norm = weights.norm(f"{model_name}.weight")
        assert record.energy[name] == pytest.approx(float(dense.norm()) / norm, rel=1e-5)
    assert record.advice is not None
    assert record.advice.outlook == "fine"


def test_a_subtle_lora_is_told_to_train_more_and_never_to_raise_alpha(tmp_path: Path, base: Path) -> None:
    record = inspect_file(write_lora(tmp_path / "x", "kohya", lora(1e-4)), base=base)
    assert record.advice is not None
    assert record.advice.outlook == "subtle"
    text = " ".join(record.advice.advice)
    assert "train longer" in text
    assert "learning rate" in text
    assert "rank" in text
    assert "not targeted in this base: proj_out, blocks.N.mlp.net.2, blocks.N.to_k" in text
    assert "alpha" not in text


def test_a_lora_as_large_as_its_base_is_too_strong(tmp_path: Path, base: Path) -> None:
    record = inspect_file(write_lora(tmp_path / "x", "kohya", lora(1.0)), base=base)
    assert record.advice is not None
    assert record.advice.outlook == "too strong"


def test_non_finite_weights_are_lh707_and_broken(tmp_path: Path) -> None:
    modules = lora(1.0)
    modules["blocks.1.to_q"].b[3, 2] = math.nan
    record = inspect_file(write_lora(tmp_path / "x", "kohya", modules), energy=True)
    assert [hazard.code for hazard in record.hazards] == ["LH707"]
    assert "blocks_1_to_q" in record.hazards[0].what
    assert record.advice is not None
    assert record.advice.outlook == "broken"
    assert record.energy is not None
    assert list(record.energy) == ["blocks_0_to_q"]


def test_an_untrained_lora_is_broken_not_subtle(tmp_path: Path, base: Path) -> None:
    record = inspect_file(write_lora(tmp_path / "x", "kohya", lora(0.0)), base=base)
    assert record.advice is not None
    assert (record.advice.outlook, "changes nothing" in record.advice.reason) == ("broken", True)


def test_without_a_base_nothing_is_claimed_about_strength(tmp_path: Path) -> None:
    record = inspect_file(write_lora(tmp_path / "x", "kohya", lora(1.0)), energy=True)
    assert record.advice is None
    assert record.energy is not None
    assert set(record.energy) == {"blocks_0_to_q", "blocks_1_to_q"}


def test_names_behind_a_checkpoint_prefix_are_found(tmp_path: Path) -> None:
    save_file(
        {f"model.diffusion_model.blocks.{i}.to_q.weight": torch.ones(24, 16) for i in range(2)},
        tmp_path / "b.safetensors",
    )
    adapter = read_lora(write_lora(tmp_path / "x", "kohya", lora(1.0)))
    weights = Checkpoint.open(tmp_path / "b.safetensors")
    assert weights.match(adapter) == {f"blocks_{i}_to_q": f"blocks.{i}.to_q.weight" for i in range(2)}
    assert untargeted(weights, weights.place(adapter)) == []


def test_the_norm_of_a_large_base_weight_is_accumulated_in_float64(tmp_path: Path) -> None:
    weight = torch.full((4096, 4096), 0.1)
    save_file({"x.weight": weight}, tmp_path / "b.safetensors")
    exact = 4096 * float(weight[0, 0].double())
    assert Checkpoint.open(tmp_path / "b.safetensors").norm("x.weight") == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("content", [{}, {"x.bias": torch.ones(3)}])
def test_a_base_without_weights_is_refused(tmp_path: Path, content: dict[str, torch.Tensor]) -> None:
    (tmp_path / "base").mkdir()
    if content:
        save_file(content, tmp_path / "base" / "model.safetensors")
    with pytest.raises(LoraFileError, match="weight"):
        inspect_file(write_lora(tmp_path / "x", "kohya", lora(1.0)), base=tmp_path / "base")


def test_only_the_block_number_is_folded() -> None:
    assert family_of("transformer_blocks.12.attn.to_out.0") == "transformer_blocks.N.attn.to_out.0"
    assert family_of("proj_out") == "proj_out"
