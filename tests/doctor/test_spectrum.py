"""Many pairs at once: what batches, threads and conversions must not change."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from harness.doctor.inspect.spectrum import Pair, Pairs, spectra, spectrum


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pair(draw: random.Random, dtype: torch.dtype, rank: int | None = None) -> Pair:
    rank = rank or draw.choice((1, 3, 8, 40))
    generator = torch.Generator().manual_seed(draw.randrange(10**6))
    a = torch.randn(rank, draw.randrange(rank, 150), generator=generator, dtype=torch.float64)
    b = torch.randn(draw.randrange(rank, 150), rank, generator=generator, dtype=torch.float64)
    stored = b.t().contiguous().mT if draw.random() < 0.3 else b  # as mlx-lm does
    return a.to(dtype), stored.to(dtype)


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(b.double().flatten(1) @ a.double().flatten(1))


def close(found: tuple[float, ...], values: torch.Tensor) -> bool:
    """Compare as `test_energy.py` does."""
    return found == pytest.approx(values[: len(found)].tolist(), rel=1e-5, abs=1e-6 * float(values[0]))


def reading(pairs: list[Pair]) -> Pairs:
    return lambda: pairs


def test_every_module_of_many_gets_its_own_spectrum(threads: int) -> None:
    draw = random.Random(5)
    kinds = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    modules = [[pair(draw, draw.choice(kinds)) for _ in range(draw.choice((1, 1, 3)))] for _ in range(80)]
    found = spectra([reading(pairs) for pairs in modules])
    assert [len(some) for some in found] == [len(pairs) for pairs in modules]
    for pairs, some in zip(modules, found, strict=True):
        for halves, one in zip(pairs, some, strict=True):
            values = exact(*halves)
            assert one.norm == pytest.approx(float(values.square().sum().sqrt()), rel=1e-6)
            assert close(one.leading, values)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [16, 64, 128])
def test_long_halves_keep_six_digits_in_every_dtype(dtype: torch.dtype, rank: int) -> None:
    """Products of bfloat16 that are rounded to bfloat16 would keep two."""
    generator = torch.Generator().manual_seed(rank)
    a, b = (torch.rand(*shape, generator=generator).to(dtype) for shape in ((rank, 9000), (5000, rank)))
    small = b.double().t() @ b.double() @ (a.double() @ a.double().t())
    found = spectrum(a, b)
    assert found.norm == pytest.approx(float(small.trace().sqrt()), rel=1e-6)
    assert found.leading[0] == pytest.approx(float(torch.linalg.eigvals(small).abs().max().sqrt()), rel=1e-6)


def test_one_bad_module_leaves_its_neighbours_alone(threads: int) -> None:
    draw = random.Random(1)
    modules = [[pair(draw, torch.float32, 8)] for _ in range(70)]
    modules[3][0][0][2, 1] = float("nan")
    modules[40][0][1][0, 0] = float("inf")
    steep = torch.logspace(0, -6, 8, dtype=torch.float64)[:, None]
    modules[41] = [(modules[41][0][0].double() * steep, modules[41][0][1].double())]
    modules[42][0][1].zero_()
    found = [some[0] for some in spectra([reading(pairs) for pairs in modules])]
    for number, ([halves], one) in enumerate(zip(modules, found, strict=True)):
        if number in (3, 40):
            assert one.norm != one.norm
        else:
            values = exact(*halves)
            assert close(one.leading, values)
    assert (found[42].norm, found[42].effective_rank) == (0, 0)


def test_what_reading_raises_is_raised(threads: int) -> None:
    def fails() -> list[Pair]:
        raise LookupError("module 50")

    draw = random.Random(1)
    modules = [reading([pair(draw, torch.float32, 4)]) for _ in range(90)]
    modules[50] = fails
    with pytest.raises(LookupError, match="module 50"):
        spectra(modules)
    assert torch.get_num_threads() == threads
