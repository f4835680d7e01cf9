"""What can be measured on pictures: pure functions over float tensors `[n, 3, height, width]` in 0..1, one value each.

No absolute value of these tells noise from a picture (a decoder smooths the noise it decodes): compare with the base's
and the reference's pictures of the same prompts and seeds.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)


def ssim(one: Tensor, other: Tensor) -> Tensor:
    """Return the structural similarity of each pair of pictures, `[n]`; 1 means equal (scikit-image, 7x7 windows)."""
    from skimage.metrics import structural_similarity

    pairs = zip(one.double().numpy(), other.double().numpy(), strict=True)
    return torch.tensor([float(structural_similarity(a, b, channel_axis=0, data_range=1.0)) for a, b in pairs])


def variance(images: Tensor) -> Tensor:
    """Return the variance over all pixels and channels, `[n]`."""
    return images.flatten(1).var(1)


def total_variation(images: Tensor) -> Tensor:
    """Return the mean absolute step between neighbouring pixels, `[n]`."""
    return images.diff(dim=-1).abs().mean((1, 2, 3)) + images.diff(dim=-2).abs().mean((1, 2, 3))


def noise_sigma(images: Tensor) -> Tensor:
    """Return the estimated deviation of the noise, `[n]`.

    A Laplacian-difference mask answers nothing to smooth shading; the median of its absolute answer over 0.6745 * 6 is
    the deviation of white noise (Immerkaer 1996, with the median in place of the mean, so that edges do not count).
    """
    mask = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]).to(images)
    answer = F.conv2d(images.flatten(0, 1)[:, None], mask[None, None]).abs()
    deviations: Tensor = answer.reshape(len(images), -1).median(1).values / (0.6745 * 6)
    return deviations


def high_frequency_share(images: Tensor) -> Tensor:
    """Return the share of the spectral energy (without the mean) above half the Nyquist frequency, `[n]`."""
    power, radius = _spectrum(images)
    return power[:, radius > 0.25].sum(1) / power[:, radius > 0].sum(1).clamp_min(1e-12)


def spectral_slope(images: Tensor) -> Tensor:
    """Return the slope of log energy over log frequency, `[n]`: about -2 for photographs, 0 for white noise."""
    power, radius = _spectrum(images)
    edges = torch.linspace(1 / min(images.shape[-2:]), 0.5, 13)
    rings = [power[:, (radius >= low) & (radius < high)].mean(1) for low, high in pairwise(edges)]
    y = torch.stack(rings, 1).clamp_min(1e-12).log()
    x = (0.5 * (edges[1:] + edges[:-1])).log()
    x = x - x.mean()
    return (y * x).sum(1) / x.square().sum()


def clipped_share(images: Tensor) -> Tensor:
    """Return the share of values at the ends of the range, `[n]`."""
    return ((images <= 1 / 512) | (images >= 1 - 1 / 512)).flatten(1).double().mean(1)


def broken(images: Tensor) -> Tensor:
    """Tell which pictures hold a value that is not finite, `[n]`."""
    return ~images.flatten(1).isfinite().all(1)


def black(images: Tensor) -> Tensor:
    """Tell which pictures are black all over, `[n]`: the usual look of a decoder that got NaN."""
    return (images.flatten(1) < 2 / 255).all(1)


def collapsed(images: Tensor) -> Tensor:
    """Tell which pictures are one colour all over, `[n]`: deviation below half an 8-bit step in every channel."""
    return (images.flatten(2).std(2) < 0.5 / 255).all(1)


def gain(candidate: Tensor, base: Tensor, reference: Tensor) -> Tensor:
    """Return <X - B, R - B> / |R - B|^2, `[n]`: the share of the reference's change that the candidate shows."""
    wanted = (reference - base).flatten(1)
    return ((candidate - base).flatten(1) * wanted).sum(1) / wanted.square().sum(1).clamp_min(1e-12)


def content(candidate: Tensor, reference: Tensor) -> Tensor:
    """Return how much of what sets each picture apart from the others is still there, `[n]`: 1 all, 0 nothing.

    The cosine between candidate and reference, both without the mean over the pictures and at an eighth of the size:
    noise that looks the same (or at random) for every prompt scores 0, whatever its amplitude and spectrum.
    """
    edge = (max(1, candidate.shape[-2] // 8), max(1, candidate.shape[-1] // 8))
    small = [F.adaptive_avg_pool2d(images, edge).flatten(1) for images in (candidate, reference)]
    x, y = (images - images.mean(0) for images in small)
    cosines: Tensor = (x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt().clamp_min(1e-9)
    return cosines


def finite(images: Tensor) -> Tensor:
    """Return the pictures with black in place of values that are not finite."""
    return images.nan_to_num(0.0, posinf=0.0, neginf=0.0)


def measure(candidate: Tensor, base: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """Return every metric of the candidate, one value per picture; `*_ratio` is against max(reference, base)."""
    shown = finite(candidate)
    values = {
        "ssim_reference": ssim(shown, reference),
        "ssim_base": ssim(shown, base),
        "content": content(shown, reference),
        "gain": gain(shown, base, reference),
        "variance": variance(shown),
        "total_variation": total_variation(shown),
        "noise_sigma": noise_sigma(shown),
        "high_frequency": high_frequency_share(shown),
        "spectral_slope": spectral_slope(shown),
        "clipped": clipped_share(shown),
        "broken": broken(candidate),
        "black": black(shown),
        "collapsed": collapsed(shown),
    }
    for name, function in (("total_variation", total_variation), ("noise_sigma", noise_sigma)):
        clean = torch.maximum(function(reference), function(base)).clamp_min(1e-4)
        values[f"{name}_ratio"] = values[name] / clean
    return values


def _spectrum(images: Tensor) -> tuple[Tensor, Tensor]:
    luma = torch.einsum("nchw,c->nhw", images.float(), torch.tensor(_LUMA))
    luma = luma - luma.mean((1, 2), keepdim=True)
    window = torch.outer(*[torch.hann_window(edge, periodic=False) for edge in luma.shape[1:]])
    power = torch.fft.fft2(luma * window).abs().square()
    rows, columns = (torch.fft.fftfreq(edge) for edge in luma.shape[1:])
    radius = (rows[:, None].square() + columns.square()).sqrt()
    return power, radius
