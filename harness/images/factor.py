"""How strong is it, judged from what came out: the place of a candidate on a ladder of references at known strengths.

Between two neighbouring rungs R_k, R_{k+1} the nearest point to the candidate X is R_k + t (R_{k+1} - R_k) with
t = <X - R_k, D> / <D, D>, D = R_{k+1} - R_k, kept in 0..1; the estimate is the strength at the nearest point of all.
Pictures and raw denoiser outputs are treated alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.images.metrics import finite

BLOCKS = 16  # each picture is cut in this many parts, so that even one picture yields an interval
DRAWS = 400
LARGEST = 256  # pictures with longer edges are averaged down first: the ladder would not fit into memory
FLOOR = 0.01  # what the straight line between two rungs may be off, as a share of the strength (see image_power.md)


@dataclass(frozen=True)
class Estimate:
    """A strength read off a ladder, with a 95 % interval.

    `residual` is |X - nearest point|^2 / |X - R_0|^2: the share of the candidate's change that no strength explains.
    `at_end` tells that the candidate lies beyond the ladder's last rung, so that the estimate is a bound.
    """

    strength: float
    interval: tuple[float, float]
    residual: float
    at_end: bool = False


@dataclass(frozen=True)
class Sums:
    """Per segment k, unit u: <X-R_k, D_k>, <D_k, D_k>, <X-R_k, X-R_k>, each `[segments, pairs, blocks]`."""

    rungs: Tensor
    along: Tensor
    length: Tensor
    distance: Tensor
    change: Tensor  # |X - R_0|^2, [pairs, blocks]

    def of(self, pairs: Tensor) -> Sums:
        """Return the sums over some of the pictures only, by index."""
        along, length, distance = (part[:, pairs] for part in (self.along, self.length, self.distance))
        return Sums(self.rungs, along, length, distance, self.change[pairs])


def estimate(candidate: Tensor, ladder: Mapping[float, Tensor], *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Place `candidate` `[n, ...]` on `ladder` (strength -> `[n, ...]`, at least 0 and one more).

    The interval comes from resampling pictures and blocks of pictures, widened by the interpolation's own error.
    """
    return read(compare(candidate, ladder), draws=draws, seed=seed)


def read(sums: Sums, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Read the strength and its interval off inner products."""
    weights = torch.cat([torch.ones(1, *sums.change.shape), _resample(sums.change.shape, draws, seed)])
    places, residuals = _place(sums, weights)
    middle = float(places[0])
    low, high = torch.quantile(places[1:].double(), torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    margin = FLOOR * abs(middle)
    ends = (float(sums.rungs[0]), float(sums.rungs[-1]))
    interval = (min(low, middle) - margin, max(high, middle) + margin)
    return Estimate(middle, interval, float(residuals[0]), at_end=middle in ends and float(residuals[0]) > 1e-3)


def compare(candidate: Tensor, ladder: Mapping[float, Tensor]) -> Sums:
    """Reduce pictures to the inner products that every estimate needs."""
    strengths = sorted(ladder)
    x = _blocks(finite(candidate))
    rungs = torch.stack([_blocks(ladder[strength]) for strength in strengths])
    step, gap = rungs[1:] - rungs[:-1], x - rungs[:-1]
    return Sums(
        torch.tensor(strengths, dtype=torch.double),
        (gap * step).sum(-1),
        step.square().sum(-1),
        gap.square().sum(-1),
        (x - _blocks(ladder[0.0])).square().sum(-1),
    )


def _place(sums: Sums, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return strength and residual share, `[draws]` each, for every weighting `[draws, pairs, blocks]` of the units."""
    flat = weights.flatten(1).double()
    along, length, distance = (flat @ part.flatten(1).double().T for part in (sums.along, sums.length, sums.distance))
    t = (along / length.clamp_min(1e-12)).clamp(0, 1)
    left = (distance - 2 * t * along + t.square() * length).clamp_min(0)
    best = left.argmin(1, keepdim=True)
    low, high = sums.rungs[:-1][best[:, 0]], sums.rungs[1:][best[:, 0]]
    place = low + t.gather(1, best)[:, 0] * (high - low)
    change = (flat @ sums.change.flatten().double()).clamp_min(1e-12)
    return place, left.gather(1, best)[:, 0] / change


def _blocks(images: Tensor) -> Tensor:
    """Cut `[n, ...]` into `[n, BLOCKS, size]`: squares of pictures `[n, c, h, w]`, else runs of values."""
    if images.ndim == 4 and max(images.shape[-2:]) > LARGEST:
        images = F.avg_pool2d(images, -(-max(images.shape[-2:]) // LARGEST))
    if images.ndim == 4 and images.shape[-1] % 4 == 0 and images.shape[-2] % 4 == 0:
        n, c, h, w = images.shape
        parts = images.reshape(n, c, 4, h // 4, 4, w // 4).permute(0, 2, 4, 1, 3, 5)
        return parts.reshape(n, 16, -1).float()
    flat = images.reshape(images.shape[0], -1).float()
    usable = flat.shape[1] // BLOCKS * BLOCKS
    return flat[:, :usable].reshape(len(flat), BLOCKS, -1)


def _resample(shape: torch.Size, draws: int, seed: int) -> Tensor:
    """Draw pictures with replacement, and blocks within each with replacement: weights `[draws, pairs, blocks]`."""
    pairs, blocks = shape
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(pairs, (draws, pairs), generator=generator)
    by_pair = torch.zeros(draws, pairs).scatter_add_(1, chosen, torch.ones(draws, pairs))
    inside = torch.randint(blocks, (draws, pairs, blocks), generator=generator)
    by_block = torch.zeros(draws, pairs, blocks).scatter_add_(2, inside, torch.ones(draws, pairs, blocks))
    return by_pair[:, :, None] * by_block
