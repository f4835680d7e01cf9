"""What is known of released loaders: the committed table of measured laws, and the strengths that it prescribes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from harness.law.grammar import ALPHA, RANK, STRENGTH, word_of
from harness.law.law import Law
from harness.law.probe import Probe
from harness.law.scale import trained_scale

M = TypeVar("M", bound="Scaled")
_TABLE = Path(__file__).with_name("known.json")


class Scaled(Protocol):
    """What a scale depends on in one module of a file: alpha (None: the file has none), rank, the rsLoRA flag, keys."""

    @property
    def alpha(self) -> float | None:
        """Alpha as the file says it."""

    @property
    def rank(self) -> int:
        """The rank, 0 where alpha scales nothing."""

    @property
    def rslora(self) -> bool:
        """Whether the file says that alpha was divided by sqrt(rank)."""

    @property
    def keys(self) -> Mapping[str, str]:
        """Role -> key in the file."""


class Adapter(Protocol):
    """A parsed LoRA file as far as its scales go."""

    @property
    def format(self) -> str:
        """How the file names its keys."""

    @property
    def modules(self) -> Mapping[str, Scaled]:
        """Its modules by name."""

    @property
    def problems(self) -> Sequence[Any]:
        """What was wrong while reading; a `fatal` one lost a module."""


@dataclass(frozen=True)
class ScaleLaw:
    """The law of one named loader.

    `rslora` says that the loader reads the flag and then divides by sqrt(rank). A module without alpha gets
    `constant * strength`, as every loader measured so far does. `formats` are what it reads, `argument` is what its
    users call the strength.
    """

    name: str
    law: Law
    rslora: bool = False
    formats: tuple[str, ...] = ()
    argument: str = "strength"

    @classmethod
    def of_powers(
        cls,
        name: str,
        strength: float = 1.0,
        alpha: float = 1.0,
        rank: float = -1.0,
        constant: float = 1.0,
        *,
        rslora: bool = False,
        formats: Iterable[str] = (),
        argument: str = "strength",
    ) -> ScaleLaw:
        """Return the law constant * strength^s * alpha^a * rank^r."""
        words = word_of(STRENGTH, strength), word_of(ALPHA, alpha), word_of(RANK, rank)
        return cls(name, Law(*words, constant=constant), rslora, tuple(formats), argument)

    def at_one(self, module: Scaled) -> float:
        """Return the factor this loader puts on B @ A of `module` at strength 1."""
        if module.alpha is None or module.rank == 0:
            return self.law.constant * self.law.strength.apply(1.0)
        law = self.law
        if self.rslora and module.rslora and law.rank.exponent == -1:
            law = replace(law, rank=word_of(RANK, -0.5))
        return law.scale(Probe("", 1.0, 0, (module.alpha,), (module.rank,), 0.0, 0.0))


@cache
def known_laws() -> dict[str, ScaleLaw]:
    """Return the measured laws by loader."""
    return _section("loaders")


@cache
def conventions() -> dict[str, ScaleLaw]:
    """Return the four ways in which readers use alpha and rank."""
    return _section("conventions")


def _section(name: str) -> dict[str, ScaleLaw]:
    rows: dict[str, Any] = json.loads(_TABLE.read_text(encoding="utf-8"))[name]
    return {loader: ScaleLaw.of_powers(loader, **row) for loader, row in rows.items()}


def prescribe(law: ScaleLaw, modules: Iterable[Scaled], *, lora_alpha: float | None = None) -> float | None:
    """Return the strength at which `law` gives every module its trained scale, or None when no single value does.

    `lora_alpha` is the alpha of the training for modules that carry none; without it such a module says nothing about
    its trained scale, and the answer is None. 1.0 when every strength does (nothing to load).
    """
    every = list(modules)
    wanted = [scale for module in every if (scale := wanted_scale(module, lora_alpha)) is not None]
    if len(wanted) < len(every):
        return None
    return law.law.strength_for([law.at_one(module) for module in every], wanted)


def wanted_scale(module: Scaled, lora_alpha: float | None = None) -> float | None:
    """Return the trained scale as far as it is known: a zero alpha tensor is read as 0, as 1 or as the rank."""
    if module.rank and module.alpha is None and lora_alpha is None:
        return None
    if module.rank and module.alpha == 0 and "alpha" in module.keys:
        return None
    alpha = lora_alpha if module.alpha is None else module.alpha
    found = trained_scale(alpha, module.rank, rslora=module.rslora)
    return found if math.isfinite(found) else None


def prescriptions(adapter: Adapter, *, lora_alpha: float | None = None) -> dict[str, float | None]:
    """Return the strength to pass for every known loader that reads the format of `adapter`."""
    laws = {name: law for name, law in known_laws().items() if adapter.format in law.formats}
    different = distinct(adapter.modules.values())
    if not different or any(problem.fatal for problem in adapter.problems):
        return dict.fromkeys(laws)
    return {name: prescribe(law, different, lora_alpha=lora_alpha) for name, law in laws.items()}


def distinct(modules: Iterable[M]) -> list[M]:
    """Return one module for every combination of numbers that a scale can depend on."""
    found = {(module.alpha, module.rank, module.rslora, "alpha" in module.keys): module for module in modules}
    return list(found.values())
