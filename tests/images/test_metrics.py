from __future__ import annotations

import pytest
import torch

from harness.images import metrics


def smooth(n: int = 3) -> torch.Tensor:
    ramp = torch.linspace(0.2, 0.8, 32)
    return torch.stack([torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), 0.5 * torch.ones(32, 32)])] * n)


def noisy(deviation: float, n: int = 3) -> torch.Tensor:
    return smooth(n) + deviation * torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise():
    assert metrics.ssim(smooth(), smooth()).tolist() == pytest.approx([1.0] * 3)
    assert metrics.ssim(smooth(), noisy(0.2)).max() < metrics.ssim(smooth(), noisy(0.02)).min() < 1


@pytest.mark.parametrize("deviation", [0.02, 0.1, 0.3])
def test_noise_sigma_finds_the_deviation_of_white_noise(deviation: float):
    assert metrics.noise_sigma(noisy(deviation)).tolist() == pytest.approx([deviation] * 3, rel=0.1)


def test_noise_sigma_does_not_answer_to_shading():
    assert metrics.noise_sigma(smooth()).max() < 1e-6


def test_total_variation_of_a_ramp_is_its_slope():
    assert metrics.total_variation(smooth()).tolist() == pytest.approx([2 / 3 * 0.6 / 31] * 3, rel=1e-4)


def test_white_noise_is_flat_and_shading_is_steep():
    grey = 0.5 + 0.1 * torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(1)).expand(4, 3, 64, 64)
    assert metrics.spectral_slope(grey).abs().max() < 0.4
    assert metrics.spectral_slope(smooth()).max() < -2
    assert metrics.high_frequency_share(grey).min() > 0.5 > 0.01 > metrics.high_frequency_share(smooth()).max()


def test_gain_reads_the_share_of_the_reference_change():
    base, reference = smooth(), noisy(0.1)
    assert metrics.gain(base + 0.7 * (reference - base), base, reference).tolist() == pytest.approx([0.7] * 3, rel=1e-4)
    assert metrics.gain(base, base, reference).tolist() == pytest.approx([0.0] * 3, abs=1e-6)


def test_broken_black_and_one_coloured_pictures_are_told_apart():
    pictures = noisy(0.05, 4)
    pictures[1, 0, 3, 3] = float("nan")
    pictures[2] = 0.0
    pictures[3] = 0.6
    assert metrics.broken(pictures).tolist() == [False, True, False, False]
    assert metrics.black(pictures.nan_to_num(0.5)).tolist() == [False, False, True, False]
    assert metrics.collapsed(pictures.nan_to_num(0.5)).tolist() == [False, False, True, True]


def test_clipped_share_counts_the_ends_of_the_range():
    pictures = torch.full((1, 3, 10, 10), 0.5)
    pictures[0, 0, 0] = 1.0
    assert metrics.clipped_share(pictures).item() == pytest.approx(10 / 300)


def test_measure_answers_one_value_per_picture_and_survives_nan():
    candidate = noisy(0.1)
    candidate[0, 0, 0, 0] = float("inf")
    measured = metrics.measure(candidate, smooth(), noisy(0.01))
    assert {len(value) for value in measured.values()} == {3}
    assert all(value.double().isfinite().all() for value in measured.values())
    assert measured["broken"].tolist() == [True, False, False]
    assert measured["noise_sigma_ratio"][1] > 5
