"""Direction: the change of each layer is a multiple of its own B @ A."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import permutations

import torch
from torch import Tensor

from harness.checks.family import Finding, judges
from harness.checks.observation import ROUNDING_LIKE, Observation, wrong_direction
from harness.measure.compare import Fit, alignment, norm

_ALIGNED = 0.9
_NULL = 1e-6  # of the largest singular value: smaller ones are rounding


@judges(
    "direction",
    finds="transposed, q/k/v in the wrong rows, the wrong module, right for unit vectors only",
    codes=("LH301", "LH302", "LH303", "LH304", "LH305", "LH104"),
)
def check_direction(observation: Observation) -> list[Finding]:
    """LH104, LH301 to LH304 for layers whose change is another than their own B @ A, LH305 where it is no matrix."""
    by_code: dict[str, list[str]] = {}
    for name, fits in observation.fits.items():
        code = _fault(observation, name, fits)
        if code:
            by_code.setdefault(code, []).append(name)
    found = [_finding(code, observation, names) for code, names in by_code.items()]
    if "LH104" not in by_code and (others := misplaced(observation)):
        fact = f"{len(others)} layers outside the file changed along a B @ A of the file, first {others[0]}"
        found.append(Finding("LH104", observation, fact=fact))
    if observation.bent:
        fact = f"{len(observation.bent)} layers answer dense input otherwise than by their weight"
        found.append(Finding("LH305", observation, observation.bent, fact))
    return found


def misplaced(observation: Observation) -> list[str]:
    """Return the layers outside the file that changed along the B @ A of a module of the file."""
    outside = [name for name in observation.changes if name not in observation.fits]
    changes, products = observation.changes, observation.products.values()
    return [name for name in outside if any(_aligned(changes[name], product) for product in products)]


def _finding(code: str, observation: Observation, names: list[str]) -> Finding:
    names.sort(key=lambda name: -observation.fits[name][0].relative_residual)
    worst = observation.fits[names[0]][0]
    fact = f"{worst.relative_residual:.0%} of the change is not along B @ A"
    if worst.along_base:
        fact = f"the base weight itself is multiplied by {1 + worst.along_base:.5g}"
    return Finding(code, observation, tuple(names), fact)


def _fault(observation: Observation, name: str, fits: tuple[Fit, ...]) -> str | None:
    whole, slices = fits[0], fits[1:]
    if whole.finite and whole.along_base:
        return "LH304"
    if not whole.finite or not wrong_direction(whole):
        return None
    change, product = observation.changes[name], observation.products[name]
    least = max(_ALIGNED, abs(alignment(change, product)))  # what explains the change less well than B @ A is no cause
    if slices and not any(map(wrong_direction, slices)) and _apart(whole, slices):
        return "LH302"
    if slices and any(_aligned(change, other, least) for other in _reordered(product, len(slices))):
        return "LH302"
    if any(_aligned(change, other, least) for other in _laid_out(product, observation.kernels.get(name, ()))):
        return "LH303"
    if _aligned(change, product.T, least):
        return "LH301"
    others = [other for module, other in observation.products.items() if module != name]
    if any(_aligned(change, other, least) for other in others) or _mispaired(change, product, others):
        return "LH104"
    if _rows_moved(change, product, whole.relative_residual / 2):
        return "LH302" if slices else "LH301"
    return "LH301" if whole.relative_residual > _ALIGNED and not _in_one_column(change, product) else "LH304"


def _apart(whole: Fit, slices: tuple[Fit, ...]) -> bool:
    """Whether scales of their own explain most of what one scale for all slices leaves over."""
    return math.hypot(*(fit.residual for fit in slices)) < whole.residual / 2


def _aligned(change: Tensor, candidate: Tensor, least: float = _ALIGNED) -> bool:
    return change.shape == candidate.shape and abs(alignment(change, candidate)) > least


def _rows_moved(change: Tensor, product: Tensor, most: float) -> bool:
    """Whether each row of the change is some row of B @ A, times one factor; `most` of the change may be left over."""
    scaled = change.double() * (norm(product) / norm(change))
    nearest = min(norm(torch.cdist(sign * scaled, product.double()).amin(1)) for sign in (1, -1))
    return nearest <= min(most, ROUNDING_LIKE) * norm(product)


def _mispaired(change: Tensor, product: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether the change is made of this module's B and the A of another, or the reverse."""
    sides = ((change, product, others), (change.mT, product.mT, [other.mT for other in others]))
    return any(
        _spanned(mine, own) and not _spanned(mine.mT, own.mT) and any(_spanned(mine.mT, p.mT) for p in theirs)
        for mine, own, theirs in sides
    )


def _spanned(change: Tensor, product: Tensor) -> bool:
    """Whether the columns of `change` are sums of those of `product`, which span at most half of all there are."""
    if len(change) != len(product):
        return False
    columns, sizes, _ = torch.linalg.svd(product.double(), full_matrices=False)
    basis = columns[:, sizes > _NULL * sizes[0]]
    rest = norm(change - basis @ (basis.mT @ change.double()))
    return 2 * basis.shape[1] <= len(product) and rest <= ROUNDING_LIKE * norm(change)


def _in_one_column(change: Tensor, product: Tensor) -> bool:
    """Whether everything but one column, as a bias beside its weight is, lies along B @ A."""
    rest = torch.arange(change.shape[1]) != int(change.square().sum(0).argmax())
    return _aligned(change[:, rest], product[:, rest])


def _reordered(product: Tensor, count: int) -> Iterator[Tensor]:
    """Yield the product with its row blocks in every other order, and interleaved row by row."""
    blocks = product.chunk(count)
    for order in permutations(range(count)):
        if order != tuple(range(count)):
            yield torch.cat([blocks[i] for i in order])
    yield torch.stack(blocks, dim=1).flatten(0, 1)


def _laid_out(product: Tensor, kernel: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield a convolution's product with its kernel turned, before the channels, or one place of it everywhere."""
    if math.prod(kernel) == 1:
        return
    own = product.reshape(len(product), -1, *kernel)
    layouts = [own.flip(2), own.flip(3), own.flip(2, 3), own.movedim(1, -1).reshape(own.shape)]
    layouts += [own.mT] if kernel[0] == kernel[-1] else []
    places = torch.cartesian_prod(*(torch.arange(n) for n in kernel)).tolist()
    layouts += [own[:, :, y : y + 1, x : x + 1].expand_as(own) for y, x in places]
    yield from (layout.flatten(1) for layout in layouts)
