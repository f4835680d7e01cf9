from __future__ import annotations

import pytest
import torch

from harness.images.factor import estimate

STRENGTHS = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0)


def curve(strength: float, n: int = 8) -> torch.Tensor:
    """Pictures that change with the strength along a bent path."""
    generator = torch.Generator().manual_seed(3)
    one, two, three = (torch.randn(n, 3, 16, 16, generator=generator) for _ in range(3))
    return one + strength * two + 0.1 * strength**2 * three


LADDER = {strength: curve(strength) for strength in STRENGTHS}


@pytest.mark.parametrize("strength", [-0.5, 0.25, 0.9, 1.0, 1.1, 1.75, 3.0])
def test_the_estimate_finds_the_strength_between_the_rungs(strength: float):
    found = estimate(curve(strength), LADDER)
    assert found.strength == pytest.approx(strength, rel=0.04, abs=0.02)
    assert found.residual < 0.02


@pytest.mark.parametrize("strength", STRENGTHS[1:-1])
def test_a_rung_is_found_exactly(strength: float):
    found = estimate(curve(strength), LADDER)
    assert found.strength == pytest.approx(strength, abs=1e-3)
    assert found.interval[0] <= strength <= found.interval[1]


def test_the_interval_covers_the_truth_under_noise_and_narrows_with_pictures():
    noise = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    widths = []
    for n in (1, 32):
        ladder = {strength: curve(strength, n) for strength in STRENGTHS}
        found = estimate(curve(1.0, n) + 0.7 * noise[:n], ladder)
        assert found.interval[0] < 1.0 < found.interval[1]
        widths.append(found.interval[1] - found.interval[0])
    assert widths[1] < widths[0] / 2


def test_a_change_in_another_direction_is_unexplained():
    other = curve(0.0) + torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    assert estimate(other, LADDER).residual > 0.5


def test_beyond_the_last_rung_the_estimate_is_a_bound():
    found = estimate(curve(20.0), LADDER)
    assert found.at_end
    assert found.strength == 8.0


def test_the_same_pictures_give_the_same_interval():
    assert estimate(curve(1.2), LADDER) == estimate(curve(1.2), LADDER)


def test_raw_outputs_of_any_shape_are_placed():
    ladder = {strength: pictures.flatten(2).mean(1) for strength, pictures in LADDER.items()}
    assert estimate(curve(0.75).flatten(2).mean(1), ladder).strength == pytest.approx(0.75, rel=0.05)
