"""Both ways of making <ΔW A^T, B> agree with float64, whatever the number of rows and the dtypes."""

from __future__ import annotations

import pytest
import torch

from harness.doctor.verify import row_products as module
from harness.doctor.verify.row_products import bfloat16_is_quicker, row_products


def weights(rows: int, columns: int, dtype: torch.dtype, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    before = (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)
    return before, (before.float() + 1e-3 * torch.randn(rows, columns, generator=generator)).to(dtype)


def factors(rows: int, columns: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.rand(rows, rank, generator=generator) + 0.5, torch.randn(rank, columns, generator=generator)


def exact(before: torch.Tensor, after: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot((after.double() - before.double()) @ right.double().t(), left.double())


def worst(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("rows", [1, 700, 1537])
def test_float32_products_are_exact_to_float32(rows: int, dtype: torch.dtype) -> None:
    (before, after), (left, right) = weights(rows, 1024, dtype), factors(rows, 1024, 8)
    spans = [(start, min(start + 512, rows)) for start in range(0, rows, 512)]
    rounded = dtype == torch.bfloat16
    found = module._in_float32(
        lambda *s: before[slice(*s)], lambda *s: after[slice(*s)], left, right, spans, rounded=rounded
    )
    assert worst(found.overlaps, exact(before, after, left, right)) < 1e-5


def test_bfloat16_products_agree_within_their_rounding() -> None:
    (before, after), (left, right) = weights(700, 1024, torch.bfloat16), factors(700, 1024, 8)
    found = module._in_one_dtype(
        lambda *s: before[slice(*s)],
        lambda *s: after[slice(*s)],
        left,
        right,
        [(0, 512), (512, 700)],
        torch.bfloat16,
        "cpu",
    )
    assert found.overlaps.dtype == torch.float32
    assert worst(found.overlaps, exact(before, after, left, right)) < 1e-2


def test_a_base_in_float32_is_rounded_as_the_merge_was() -> None:
    base = torch.randn(300, 64) * 0.02
    found = row_products(
        lambda *s: base[slice(*s)], lambda *s: base.bfloat16()[slice(*s)], *factors(300, 64, 4), bfloat16=True
    )
    assert not found.overlaps.any()
    assert not found.energies.any()


def test_rows_of_any_width_are_read_once_and_in_order() -> None:
    columns = 1 << 18
    (before, after), (left, right) = weights(5, columns, torch.float16), factors(5, columns, 2)
    read: list[tuple[int, int]] = []

    def rows(start: int, stop: int) -> torch.Tensor:
        read.append((start, stop))
        return before[start:stop]

    found = row_products(rows, lambda *s: after[slice(*s)], left, right, bfloat16=False)
    assert read == [(0, 2), (2, 4), (4, 5)]
    assert worst(found.overlaps, exact(before, after, left, right)) < 1e-4


def test_the_choice_is_made_once() -> None:
    assert bfloat16_is_quicker() is bfloat16_is_quicker()
    assert bfloat16_is_quicker.cache_info().misses <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chunk", [1 << 12, 1 << 26])
def test_another_device_makes_the_same_products(dtype: torch.dtype, chunk: int) -> None:
    (before, after), (left, right) = weights(700, 1024, dtype), factors(700, 1024, 8)
    in_bfloat16 = dtype == torch.bfloat16
    work = torch.bfloat16 if in_bfloat16 else torch.float32
    spans = module._spans(left, right, chunk)
    found = module._in_one_dtype(
        lambda *s: before[slice(*s)], lambda *s: after[slice(*s)], left, right, spans, work, "cpu"
    )
    assert found.overlaps.dtype == torch.float32
    assert worst(found.overlaps, exact(before, after, left, right)) < (0.01 if in_bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_energy_of_each_row_is_that_of_its_change(dtype: torch.dtype) -> None:
    (before, after), (left, right) = weights(700, 1024, dtype), factors(700, 1024, 2)
    after[5, 3], after[6] = torch.nan, before[6]
    spans = [(0, 512), (512, 700)]
    stored = (lambda *s: before[slice(*s)]), (lambda *s: after[slice(*s)])
    wanted = (after.double() - before.double()).square().sum(1)
    for found in (
        module._in_float32(*stored, left, right, spans, rounded=False),
        module._in_one_dtype(*stored, left, right, spans, dtype, "cpu"),
    ):
        assert torch.isnan(found.energies).nonzero().tolist() == [[5]]
        assert found.energies[6] == 0
        kept = ~torch.isnan(wanted)
        assert torch.allclose(found.energies.double()[kept], wanted[kept], rtol=1e-2)
