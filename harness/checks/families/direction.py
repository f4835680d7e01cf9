"""Direction: the change of each layer is a multiple of its own B @ A."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, permutations
from itertools import product as product_of

import torch
from torch import Tensor

from harness.checks.family import Sighting, judges
from harness.checks.observation import ROUNDING_LIKE, Observation, wrong_direction
from harness.measure.compare import Fit, alignment, norm
from harness.text import count

_ALIGNED = 0.9
_ROWS = 8  # of a layer with fewer, chance may be that each has a factor
_ROW_BY_ROW = 0.05  # of the change, that factors of rows leave unexplained
_FEW = 3  # neighbours that may be mixed into a change
_EXACT = 0.005  # of B @ A: that rows of rank 1, of which one or another is always near, are moved
_NULL = 1e-6  # of the largest singular value: smaller ones are rounding


Fault = tuple[str, str]
"""A code, and in a clause what explains the change."""

_EACH = "each of its {} has a factor of its own"
_WEIGHTED = "the columns of B, or rows of A, have factors of their own"
UNEXPLAINED: Fault = ("LH306", "nothing that is known explains it")


@judges(
    "direction",
    finds="transposed, q/k/v in the wrong rows, the wrong module, right for unit vectors only, unexplained",
    codes=("LH301", "LH302", "LH303", "LH304", "LH305", "LH306", "LH104"),
)
def check_direction(observation: Observation) -> list[Sighting]:
    """LH104, LH301 to LH304, LH306 for layers whose change is another than their own B @ A, LH305 for no matrix."""
    faults: dict[Fault, list[str]] = {}
    for name, fits in observation.fits.items():
        fault = _fault(observation, name, fits)
        if fault:
            faults.setdefault(fault, []).append(name)
    by_code: dict[str, Sighting] = {}
    for fault, names in sorted(faults.items(), key=lambda each: -len(each[1])):
        by_code.setdefault(fault[0], _finding(fault, observation, names))
    found = list(by_code.values())
    if "LH104" not in by_code and (others := misplaced(observation)):
        fact = f"{count(len(others), 'layer')} outside the file changed along a B @ A of the file, first {others[0]}"
        found.append(Sighting("LH104", observation, fact=fact))
    if observation.bent:
        fact = f"{count(len(observation.bent), 'layer')} answering dense input otherwise than by the weight"
        found.append(Sighting("LH305", observation, observation.bent, fact))
    return found


def misplaced(observation: Observation) -> list[str]:
    """Return the layers outside the file that changed along the B @ A of a module of the file."""
    outside = [name for name in observation.changes if name not in observation.fits]
    changes, products = observation.changes, observation.products.values()
    return [name for name in outside if any(_aligned(changes[name], product) for product in products)]


def _finding(fault: Fault, observation: Observation, names: list[str]) -> Sighting:
    names.sort(key=lambda name: -observation.fits[name][0].relative_residual)
    worst = observation.fits[names[0]][0]
    fact = f"{worst.relative_residual:.0%} of the change is not along B @ A: {fault[1]}"
    if worst.along_base:
        fact = f"the base weight itself is multiplied by {1 + worst.along_base:.5g}"
    return Sighting(fault[0], observation, tuple(names), fact)


def _fault(observation: Observation, name: str, fits: tuple[Fit, ...]) -> Fault | None:
    whole = fits[0]
    if whole.finite and whole.along_base:
        return "LH304", "W is scaled too"
    if mistake := observation.mistakes.get(name):
        return "LH304", mistake
    if not whole.finite or not wrong_direction(whole):
        return small_fault(observation, name, whole)
    if not observation.additive:
        return "LH304", UNEXPLAINED[1]  # what W itself is divided by changes every direction
    case = _Case(observation, name, whole, fits[1:])
    return next(((code, what) for code, what, explains in _EXPLANATIONS if explains(case)), None) or case.fallback


def by_slices(slices: Sequence[Fit]) -> bool:
    """Whether a merged layer is right slice by slice, each with a scale of its own: then the scale is at fault."""
    return len(slices) > 0 and all(fit.direction_right for fit in slices)


def small_fault(observation: Observation, name: str, whole: Fit) -> Fault | None:
    """Return that rows or columns are left out or weighted, or components: rounding does not explain the small rest."""
    if whole.unchanged or whole.direction_right or not observation.additive or by_slices(observation.fits[name][1:]):
        return None
    change, product = observation.changes[name], observation.products[name]
    for what, own, wanted in (("rows", change, product), ("columns", change.mT, product.mT)):
        if fault := _of_rows(what, own, wanted, whole.residual):
            return "LH304", fault
    rest = change.double() - whole.scale * product.double()
    return ("LH304", _WEIGHTED) if _spanned(rest, product) and _spanned(rest.mT, product.mT) else None


def _of_rows(what: str, change: Tensor, product: Tensor, residual: float) -> str:
    """Return what factors of its rows say of a change, where they leave next to nothing of the residual."""
    factors = _row_factors(change, product)
    if factors is None:
        return ""
    own, wanted = product.double(), change.double()
    kept = (factors.abs() > ROUNDING_LIKE * factors.abs().max())[:, None] * own
    scale = (kept * wanted).sum() / kept.square().sum()
    if norm(wanted - scale * kept) <= ROUNDING_LIKE * residual:
        return f"some of its {what} are left out"
    weighted = norm(wanted - factors[:, None] * own) <= ROUNDING_LIKE * residual
    return _EACH.format(what) if weighted else ""


@dataclass(frozen=True)
class _Case:
    """A layer whose change is not along its B @ A; what explains it less well than B @ A does is no cause."""

    observation: Observation
    name: str
    whole: Fit
    slices: tuple[Fit, ...]

    @property
    def change(self) -> Tensor:
        return self.observation.changes[self.name]

    @property
    def product(self) -> Tensor:
        return self.observation.products[self.name]

    @cached_property
    def least(self) -> float:
        return max(_ALIGNED, abs(alignment(self.change, self.product)))

    @property
    def others(self) -> list[Tensor]:
        """The B @ A of other modules of the file that have this shape."""
        every = self.observation.products.items()
        return [p for other, p in every if other != self.name and p.shape == self.product.shape]

    def along(self, candidates: Iterable[Tensor]) -> bool:
        return any(_aligned(self.change, other, self.least) for other in candidates)

    @property
    def fallback(self) -> Fault:
        """What to say of a change that nothing explains: that most of it is right, or nothing."""
        if self.whole.relative_residual > _ALIGNED and not _in_one_column(self.change, self.product):
            return UNEXPLAINED
        return "LH304", "a part of it is along B @ A, the rest is unexplained"


def _slice_by_slice(case: _Case) -> bool:
    return bool(case.slices) and not any(map(wrong_direction, case.slices)) and _apart(case.whole, case.slices)


def _rows_left_out(case: _Case) -> bool:
    """Whether some rows are missing, or some slices, and all others have one factor."""
    there = [fit for fit in case.slices if not fit.unchanged]
    scales = {round(fit.scale, 3) for fit in there}
    some = 0 < len(there) < len(case.slices) and not any(map(wrong_direction, there)) and len(scales) == 1
    return some or _left_out(case.change, case.product)


def _in_other_blocks(case: _Case) -> bool:
    counts = {len(case.slices)} if case.slices else {n for n in (2, 3) if len(case.product) % n == 0}
    return any(case.along(_reordered(case.product, count)) for count in counts)


def _turned(case: _Case) -> Iterator[Tensor]:
    """Yield B @ A transposed, and the bytes of its transpose, or of it, in the layer's shape."""
    product = case.product
    if product.shape[0] == product.shape[1]:
        yield product.T
    else:
        yield product.T.reshape(product.shape)
        yield product.reshape(product.T.shape).T


def _was_earlier(case: _Case) -> bool:
    return case.along(p for p in case.observation.earlier.get(case.name, ()) if p.shape == case.change.shape)


def _of_others(case: _Case) -> bool:
    columns = case.change.square().sum(0)
    if columns.max() > _ALIGNED * columns.sum():
        return False  # one column, as a bias is, is a sum of anybody's
    every = [p for other, p in case.observation.products.items() if other != case.name]
    return _mispaired(case.change, case.product, every)


def _with_others(case: _Case) -> bool:
    return _mixed(case.change, case.product, case.others, case.whole.residual / 2)


def _by_component(case: _Case) -> bool:
    """Whether the change is made of this module's own A and B, put together otherwise: what is not along B @ A is."""
    rest = case.change.double() - case.whole.scale * case.product.double()
    return _spanned(rest, case.product) and _spanned(rest.mT, case.product.mT)


def _in_other_rows(case: _Case) -> bool:
    return _rows_moved(case.change, case.product, case.whole.relative_residual / 2)


_EXPLANATIONS: tuple[tuple[str, str, Callable[[_Case], bool]], ...] = (
    ("LH304", "some of its rows are left out", _rows_left_out),
    ("LH302", "each slice has a scale of its own", _slice_by_slice),
    ("LH302", "its blocks of rows stand in another order", _in_other_blocks),
    (
        "LH303",
        "its kernel is laid out otherwise",
        lambda case: case.along(_laid_out(case.product, case.observation.kernels.get(case.name, ()))),
    ),
    ("LH301", "it is B @ A transposed", lambda case: case.along(_turned(case))),
    ("LH408", "it is what a file loaded before holds for this module", _was_earlier),
    ("LH104", "it is the B @ A of another module", lambda case: case.along(case.others)),
    ("LH104", "the B @ A of other modules is in it", _with_others),
    ("LH304", "some of its columns are left out", lambda case: _left_out(case.change.mT, case.product.mT)),
    ("LH304", _EACH.format("rows"), lambda case: _by_row(case.change, case.product)),
    ("LH304", _EACH.format("columns"), lambda case: _by_row(case.change.mT, case.product.mT)),
    ("LH304", _WEIGHTED, _by_component),
    ("LH104", "it is made of one module's B and another's A", _of_others),
    ("LH302", "its rows stand in another order", _in_other_rows),
)


def _apart(whole: Fit, slices: tuple[Fit, ...]) -> bool:
    """Whether scales of their own explain most of what one scale for all slices leaves over."""
    return math.hypot(*(fit.residual for fit in slices)) < whole.residual / 2


def _aligned(change: Tensor, candidate: Tensor, least: float = _ALIGNED) -> bool:
    return change.shape == candidate.shape and abs(alignment(change, candidate)) > least


def _row_factors(change: Tensor, product: Tensor) -> Tensor | None:
    """Return what each row of B @ A is multiplied by, where that explains the change; None else."""
    own, wanted = product.double(), change.double()
    size = own.square().sum(1)
    factors: Tensor = (own * wanted).sum(1) / size.where(size > 0, torch.ones_like(size))
    return (
        None
        if len(product) < _ROWS or _alike(own) or norm(wanted - factors[:, None] * own) > _ROW_BY_ROW * norm(change)
        else factors
    )


def _alike(rows: Tensor) -> bool:
    """Whether each row is about a multiple of any other, as in rank 1."""
    return norm(rows.mT @ rows) > _ALIGNED * norm(rows) ** 2


def _by_row(change: Tensor, product: Tensor) -> bool:
    return _row_factors(change, product) is not None


def _left_out(change: Tensor, product: Tensor) -> bool:
    """Whether some rows of B @ A are missing and all others have one factor."""
    factors = _row_factors(change, product)
    if factors is None:
        return False
    there = factors.abs() > ROUNDING_LIKE * factors.abs().max()
    same = (factors[there] - factors[there].median()).abs() <= _ROW_BY_ROW * factors.abs().max()
    return bool(same.all()) and not bool(there.all())


def _rows_moved(change: Tensor, product: Tensor, most: float) -> bool:
    """Whether each row of the change is some row of B @ A, times one factor; `most` of the change may be left over.

    Few rows may be there twice and none may be empty: zeros, and rows of rank 1, are near one row or another anyway.
    """
    if _empty_rows(change) > _empty_rows(product):
        return False
    scaled = change.double() * (norm(product) / norm(change))
    near = (torch.cdist(sign * scaled, product.double()).min(1) for sign in (1, -1))
    distances, rows = min(near, key=lambda each: norm(each[0]))
    least = _EXACT if _alike(product.double()) else ROUNDING_LIKE
    return norm(distances) <= min(most, least) * norm(product) and 2 * len(set(rows.tolist())) >= len(rows)


def _empty_rows(matrix: Tensor) -> int:
    return int((matrix == 0).all(1).sum())


def _mispaired(change: Tensor, product: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether the change is made of this module's B and the A of another, or the reverse."""
    sides = ((change, product, others), (change.mT, product.mT, [other.mT for other in others]))
    return any(
        _spanned(mine, own) and not _spanned(mine.mT, own.mT) and any(_spanned(mine.mT, p.mT) for p in theirs)
        for mine, own, theirs in sides
    )


def _spanned(change: Tensor, product: Tensor) -> bool:
    """Whether the columns of `change` are sums of those of `product`, which span at most three quarters of all."""
    if len(change) != len(product):
        return False
    columns, sizes, _ = torch.linalg.svd(product.double(), full_matrices=False)
    basis = columns[:, sizes > _NULL * sizes[0]]
    rest = norm(change - basis @ (basis.mT @ change.double()))
    return 4 * basis.shape[1] <= 3 * len(product) and rest <= ROUNDING_LIKE * norm(change)


def _mixed(change: Tensor, product: Tensor, others: Sequence[Tensor], most: float) -> bool:
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
    axes = range(2, own.dim())
    turned = [axis for number in range(1, len(kernel) + 1) for axis in combinations(axes, number)]
    layouts = [*(own.flip(*axis) for axis in turned), own.movedim(1, -1).reshape(own.shape)]
    layouts += [own.mT] if len(kernel) > 1 and kernel[-2] == kernel[-1] else []
    for place in product_of(*map(range, kernel)):
        one = own[(slice(None), slice(None), *(slice(n, n + 1) for n in place))]
        layouts.append(one.expand_as(own))
    yield from (layout.flatten(1) for layout in layouts)
