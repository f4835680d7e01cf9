"""Direction: the change of each layer is a multiple of its own B @ A."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from harness.checks.family import Sighting, judges
from harness.checks.likeness import (
    ALIGNED,
    aligned,
    by_row,
    components,
    in_one_column,
    laid_out,
    left_out,
    mispaired,
    mixed,
    reordered,
    rows_moved,
    spanned,
)
from harness.checks.observation import ROUNDING_LIKE, Observation, wrong_direction
from harness.measure.compare import Fit, alignment
from harness.text import count

Fault = tuple[str, str]
"""A code, and in a clause what explains the change."""

_LEFT_OUT = "some of its {} are left out"
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
        first = by_code.get(fault[0])
        more = replace(first, modules=(*first.modules, *names)) if first else _finding(fault, observation, names)
        by_code[fault[0]] = more
    found = list(by_code.values())
    found += (finding for finding in _elsewhere(observation) if finding.code not in by_code)
    if observation.bent:
        fact = f"{count(len(observation.bent), 'layer')} answering dense input otherwise than by the weight"
        found.append(Sighting("LH305", observation, observation.bent, fact))
    return found


def _elsewhere(observation: Observation) -> Iterator[Sighting]:
    """Yield what layers outside the file have of it: the B @ A of other rows of the same layer, or of any module."""
    others = misplaced(observation)
    rows = [n for n in others if _moved_within(observation, n) or _along_any(observation, n, observation.beside(n))]
    for code, names, of in (
        ("LH302", rows, "other rows of the same layer"),
        ("LH104", [name for name in others if name not in rows], "the file"),
    ):
        if names:
            fact = f"{count(len(names), 'layer')} outside the file changed along a B @ A of {of}, first {names[0]}"
            yield Sighting(code, observation, fact=fact)


def misplaced(observation: Observation) -> list[str]:
    """Return the layers outside the file that changed along the B @ A of a module of the file, or have rows of one."""
    outside = (name for name in observation.changes if name not in observation.fits)
    return [
        name
        for name in outside
        if _along_any(observation, name, observation.products) or _moved_within(observation, name)
    ]


def _along_any(observation: Observation, name: str, modules: Iterable[str]) -> bool:
    change = observation.changes[name]
    return any(aligned(change, observation.products[module]) for module in modules)


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
    most = ROUNDING_LIKE * whole.residual
    for what, own, wanted in (("rows", change, product), ("columns", change.mT, product.mT)):
        if left_out(own, wanted, most):
            return "LH304", _LEFT_OUT.format(what)
        if by_row(own, wanted, most):
            return "LH304", _EACH.format(what)
    return ("LH304", _WEIGHTED) if _of_own_components(change, product, whole.scale) else None


def _of_own_components(change: Tensor, product: Tensor, scale: float) -> bool:
    """Whether what is not along B @ A is made of this module's own A and B, put together otherwise."""
    rest = change.double() - scale * product.double()
    return spanned(rest, product) and spanned(rest.mT, product.mT)


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
        return max(ALIGNED, abs(alignment(self.change, self.product)))

    @property
    def others(self) -> list[Tensor]:
        """The B @ A of other modules of the file that have this shape."""
        every = self.observation.products.items()
        return [p for other, p in every if other != self.name and p.shape == self.product.shape]

    @property
    def beside(self) -> list[Tensor]:
        """The B @ A of the modules that are other rows of the same layer of the model."""
        return [self.observation.products[other] for other in self.observation.beside(self.name)]

    def along(self, candidates: Iterable[Tensor]) -> bool:
        return any(aligned(self.change, other, self.least) for other in candidates)

    @property
    def fallback(self) -> Fault:
        """What to say of a change that nothing explains: that most of it is right, or nothing."""
        if self.whole.relative_residual > ALIGNED and not in_one_column(self.change, self.product):
            return UNEXPLAINED
        return "LH304", "a part of it is along B @ A, the rest is unexplained"


def _slice_by_slice(case: _Case) -> bool:
    return bool(case.slices) and not any(map(wrong_direction, case.slices)) and _apart(case.whole, case.slices)


def _rows_left_out(case: _Case) -> bool:
    """Whether some rows are missing, or some slices, and all others have one factor."""
    there = [fit for fit in case.slices if not fit.unchanged]
    scales = {round(fit.scale, 3) for fit in there}
    some = 0 < len(there) < len(case.slices) and not any(map(wrong_direction, there)) and len(scales) == 1
    return some or left_out(case.change, case.product)


def _in_other_blocks(case: _Case) -> bool:
    counts = {len(case.slices)} if case.slices else {n for n in (2, 3) if len(case.product) % n == 0}
    return any(case.along(reordered(case.product, count)) for count in counts)


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
    if columns.max() > ALIGNED * columns.sum():
        return False  # one column, as a bias is, is a sum of anybody's
    every = [p for other, p in case.observation.products.items() if other != case.name]
    return mispaired(case.change, case.product, every)


def _with_others(case: _Case) -> bool:
    return mixed(case.change, case.product, case.others, case.whole.residual / 2)


def _by_component(case: _Case) -> bool:
    return _of_own_components(case.change, case.product, case.whole.scale)


def _of_lower_rank(case: _Case) -> bool:
    """Whether the change is made of this module's A and B, and of fewer components than their product has."""
    return components(case.change) < components(case.product) and _by_component(case)


def _in_other_rows(case: _Case) -> bool:
    return rows_moved(case.change, case.product, case.whole.relative_residual / 2)


def _across_the_layer(case: _Case) -> bool:
    return _moved_within(case.observation, case.name, case.whole.relative_residual / 2)


def _moved_within(seen: Observation, name: str, most: float = 1.0) -> bool:
    """Whether the layer of the model that `name` is some rows of holds the file's rows for it in another order."""
    names = [other for other in seen.changes if seen.hosts.get(other) == seen.hosts.get(name, other)]
    if len(names) < 2 or name not in seen.hosts or seen.fits.keys().isdisjoint(names):
        return False
    wanted = [
        seen.fits[n][0].expected * seen.products[n] if n in seen.fits else torch.zeros_like(seen.changes[n])
        for n in names
    ]
    return rows_moved(torch.cat([seen.changes[other] for other in names]), torch.cat(wanted), most)


_EXPLANATIONS: tuple[tuple[str, str, Callable[[_Case], bool]], ...] = (
    ("LH302", "it is the B @ A of other rows of the same layer", lambda case: case.along(case.beside)),
    ("LH302", "rows of the modules of one layer stand in another order", _across_the_layer),
    ("LH304", _LEFT_OUT.format("rows"), _rows_left_out),
    ("LH302", "each slice has a scale of its own", _slice_by_slice),
    ("LH302", "its blocks of rows stand in another order", _in_other_blocks),
    (
        "LH303",
        "its kernel is laid out otherwise",
        lambda case: case.along(laid_out(case.product, case.observation.kernels.get(case.name, ()))),
    ),
    ("LH301", "it is B @ A transposed", lambda case: case.along(_turned(case))),
    ("LH408", "it is what a file loaded before holds for this module", _was_earlier),
    ("LH104", "it is the B @ A of another module", lambda case: case.along(case.others)),
    ("LH104", "the B @ A of other modules is in it", _with_others),
    ("LH304", _LEFT_OUT.format("columns"), lambda case: left_out(case.change.mT, case.product.mT)),
    ("LH304", _EACH.format("rows"), lambda case: by_row(case.change, case.product)),
    ("LH304", _EACH.format("columns"), lambda case: by_row(case.change.mT, case.product.mT)),
    ("LH304", "some of its components are left out", _of_lower_rank),
    ("LH304", _WEIGHTED, _by_component),
    ("LH104", "it is made of one module's B and another's A", _of_others),
    ("LH302", "its rows stand in another order", _in_other_rows),
)


def _apart(whole: Fit, slices: tuple[Fit, ...]) -> bool:
    """Whether scales of their own explain most of what one scale for all slices leaves over."""
    return math.hypot(*(fit.residual for fit in slices)) < whole.residual / 2
