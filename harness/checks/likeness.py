"""How a change may be made of B @ A, or of the factors of others, without being a multiple of it: [out, in] each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, permutations
from itertools import product as product_of

import torch
from torch import Tensor

from harness.checks.observation import ROUNDING_LIKE
from harness.measure.compare import alignment, norm

ALIGNED = 0.9
_ROW_BY_ROW = 0.05  # of the change, that factors of rows leave unexplained
_ROWS = 8  # of a layer with fewer, chance may be that each has a factor
_FEW = 3  # neighbours that may be mixed into a change
_EXACT = 0.005  # of B @ A: that rows of rank 1, of which one or another is always near, are moved
_FAINT = 0.01  # of a matrix: components that are smaller together do not count
_NULL = 1e-6  # of the largest singular value: smaller ones are rounding


def aligned(change: Tensor, candidate: Tensor, least: float = ALIGNED) -> bool:
    """Whether the change is a multiple of `candidate`, or nearly: the cosine between them is above `least`."""
    return change.shape == candidate.shape and abs(alignment(change, candidate)) > least


def by_row(change: Tensor, product: Tensor, most: float | None = None) -> bool:
    """Whether each row of the change is its row of B @ A times a factor; `most` may be left over, by default 5 %."""
    factors = _row_factors(change, product)
    return factors is not None and _rest(change, factors[:, None] * product) <= _most(change, most)


def left_out(change: Tensor, product: Tensor, most: float | None = None) -> bool:
    """Whether some rows of B @ A are missing and all others have one factor; `most` as for `by_row`."""
    factors = _row_factors(change, product)
    if factors is None:
        return False
    there = factors.abs() > ROUNDING_LIKE * factors.abs().max()
    kept = there[:, None] * product.double()
    scale = (kept * change).sum() / kept.square().sum()
    return not bool(there.all()) and _rest(change, scale * kept) <= _most(change, most)


def _rest(change: Tensor, explained: Tensor) -> float:
    return norm(change.double() - explained)


def _most(change: Tensor, most: float | None) -> float:
    return _ROW_BY_ROW * norm(change) if most is None else most


def _row_factors(change: Tensor, product: Tensor) -> Tensor | None:
    """Return what each row of B @ A is multiplied by; None where chance or rank 1 would have such factors anyway."""
    own, wanted = product.double(), change.double()
    size = own.square().sum(1)
    factors: Tensor = (own * wanted).sum(1) / size.where(size > 0, torch.ones_like(size))
    return None if len(product) < _ROWS or _alike(own) else factors


def _alike(rows: Tensor) -> bool:
    """Whether each row is about a multiple of any other, as in rank 1."""
    return norm(rows.mT @ rows) > ALIGNED * norm(rows) ** 2


def rows_moved(change: Tensor, product: Tensor, most: float) -> bool:
    """Whether each row of the change is some row of B @ A, times one factor; `most` of the change may be left over.

    Few rows may be there twice and none may be empty: zeros, and rows of rank 1, are near one row or another anyway.
    """
    if _empty_rows(change) > _empty_rows(product):
        return False
    there = (change != 0).any(1)
    scaled = change[there].double() * (norm(product) / norm(change))
    near = (torch.cdist(sign * scaled, product.double()).min(1) for sign in (1, -1))
    distances, rows = min(near, key=lambda each: norm(each[0]))
    least = _EXACT if _alike(product.double()) else ROUNDING_LIKE
    return norm(distances) <= min(most, least) * norm(product) and 2 * len(set(rows.tolist())) >= len(rows)


def _empty_rows(matrix: Tensor) -> int:
    return int((matrix == 0).all(1).sum())


def mispaired(change: Tensor, product: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether the change is made of this module's B and the A of another, or the reverse."""
    sides = ((change, product, others), (change.mT, product.mT, [other.mT for other in others]))
    return any(
        spanned(mine, own) and not spanned(mine.mT, own.mT) and any(spanned(mine.mT, p.mT) for p in theirs)
        for mine, own, theirs in sides
    )


def spanned(change: Tensor, product: Tensor) -> bool:
    """Whether the columns of `change` are sums of those of `product`, which span at most three quarters of all."""
    if len(change) != len(product):
        return False
    columns, sizes, _ = torch.linalg.svd(product.double(), full_matrices=False)
    basis = columns[:, sizes > _NULL * sizes[0]]
    rest = norm(change - basis @ (basis.mT @ change.double()))
    return 4 * basis.shape[1] <= 3 * len(product) and rest <= ROUNDING_LIKE * norm(change)


def components(matrix: Tensor) -> int:
    """Return how many of the largest singular values leave a hundredth of a matrix over, or less."""
    sizes = torch.linalg.svdvals(matrix.double())
    rest = sizes.square().flip(0).cumsum(0).flip(0).sqrt()
    return int((rest > _FAINT * norm(matrix)).sum())


def mixed(change: Tensor, product: Tensor, others: Sequence[Tensor], most: float) -> bool:
    """Whether the change is made of the module's own B @ A and those of a few others, which leave `most` of it over."""
    parts, rest = [product], change
    for _ in range(min(_FEW, len(others))):
        parts.append(max(others, key=lambda other: abs(alignment(rest, other))))
        columns = torch.stack([part.flatten() for part in parts], 1).double()
        wanted = change.double().flatten()
        rest = (wanted - columns @ torch.linalg.lstsq(columns, wanted[:, None]).solution[:, 0]).reshape(change.shape)
        if norm(rest) <= min(most, ROUNDING_LIKE * norm(change)):
            return True
    return False


def in_one_column(change: Tensor, product: Tensor) -> bool:
    """Whether everything but one column, as a bias beside its weight is, lies along B @ A."""
    rest = torch.arange(change.shape[1]) != int(change.square().sum(0).argmax())
    return aligned(change[:, rest], product[:, rest])


def reordered(product: Tensor, count: int) -> Iterator[Tensor]:
    """Yield the product with its row blocks in every other order, and interleaved row by row."""
    blocks = product.chunk(count)
    for order in permutations(range(count)):
        if order != tuple(range(count)):
            yield torch.cat([blocks[i] for i in order])
    yield torch.stack(blocks, dim=1).flatten(0, 1)


def laid_out(product: Tensor, kernel: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield a convolution's product with its kernel turned, before the channels, or one place of it everywhere."""
    if math.prod(kernel) == 1:
        return
    own = product.reshape(len(product), -1, *kernel)
    axes = range(2, own.dim())
    turned = [axis for number in range(1, len(kernel) + 1) for axis in combinations(axes, number)]
    layouts = [*(own.flip(*axis) for axis in turned), own.movedim(1, -1).reshape(own.shape)]
    layouts.append(own.reshape(len(product), *kernel, -1).movedim(-1, 1))
    layouts += [own.mT] if len(kernel) > 1 and kernel[-2] == kernel[-1] else []
    for place in product_of(*map(range, kernel)):
        one = own[(slice(None), slice(None), *(slice(n, n + 1) for n in place))]
        layouts.append(one.expand_as(own))
    yield from (layout.flatten(1) for layout in layouts)
