"""One measured point of a loader: which strength, alpha and rank went in, and which scale came out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.law.scale import trained_scale


@dataclass(frozen=True)
class Probe:
    """The scale measured on one module of one loaded file.

    `alphas` and `ranks` are those of every module of the file in key order, `index` is this module's place in them;
    an alpha of None means that the file carries none. `tolerance` is absolute, on the scale. `root`: the file says
    that training divided alpha by sqrt(rank). `dtype` is the model's; `patterns` says how the file's
    configuration, where it has one, names modules.
    """

    module: str
    strength: float
    index: int
    alphas: tuple[float | None, ...]
    ranks: tuple[int, ...]
    measured: float
    tolerance: float
    dtype: str = "float32"
    file_dtype: str = "float32"
    square: bool = False
    fused: bool = False
    permuted: bool = False
    patterns: str = "names"
    root: bool = False

    @property
    def alpha(self) -> float | None:
        """This module's alpha, None when the file carries none."""
        return self.alphas[self.index]

    @property
    def rank(self) -> int:
        """This module's rank."""
        return self.ranks[self.index]

    @property
    def expected(self) -> float:
        """strength * alpha / rank (or sqrt(rank)); a missing alpha means scale 1."""
        return self.scale_of(self.alpha, self.rank)

    def scale_of(self, alpha: float | None, rank: int) -> float:
        """What `expected` would be with another alpha or rank."""
        return self.strength * trained_scale(alpha, rank, rslora=self.root)

    @property
    def right(self) -> bool:
        """True when the measured scale is PEFT's."""
        return abs(self.measured - self.expected) <= self.tolerance


def fields_of(probe: Probe) -> dict[str, Any]:
    """Return the fields of a probe for JSON; there are thousands, and `dataclasses.asdict` copies each of them."""
    return dict(vars(probe))


def probe_from(fields: Mapping[str, Any]) -> Probe:
    """Return the probe whose fields, as `fields_of` gives them, went through JSON."""
    return Probe(**{**fields, "alphas": tuple(fields["alphas"]), "ranks": tuple(fields["ranks"])})
