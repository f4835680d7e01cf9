"""Which strength to pass so that a loader reproduces the training of a file, from the law of that loader."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from harness.files import LoraAdapter, LoraModule

_LAWS = Path(__file__).with_name("known.json")
_ANY = "any"  # a module that is right at every strength
_SAME = 1e-4  # alphas in float32 and ratios such as 10 / 3 agree far better, other laws far worse


@dataclass(frozen=True)
class ScaleLaw:
    """A loader's factor on B @ A: `constant * strength**strength_power * alpha**alpha_power * rank**rank_power`.

    `rslora` says that the loader reads the flag and then divides by sqrt(rank). A module without alpha gets
    `constant * strength`, as every loader measured so far does.
    """

    name: str
    strength_power: float = 1.0
    alpha_power: float = 1.0
    rank_power: float = -1.0
    constant: float = 1.0
    rslora: bool = False
    formats: tuple[str, ...] = ()
    argument: str = "strength"

    @classmethod
    def parse(cls, name: str, row: Mapping[str, Any]) -> ScaleLaw:
        """Read one row of known.json."""
        return cls(
            name=name,
            strength_power=float(row["strength"]),
            alpha_power=float(row["alpha"]),
            rank_power=float(row["rank"]),
            constant=float(row["constant"]),
            rslora=bool(row.get("rslora", False)),
            formats=tuple(row.get("formats", ())),
            argument=str(row.get("argument", "strength")),
        )

    def at_one(self, module: LoraModule) -> float:
        """Return the factor this loader puts on B @ A of `module` at strength 1."""
        if module.alpha is None or module.rank == 0:
            return self.constant
        power = -0.5 if self.rslora and module.rslora and self.rank_power == -1 else self.rank_power
        alpha = 1.0 if self.alpha_power == 0 else _power(module.alpha, self.alpha_power)
        return self.constant * alpha * _power(module.rank, power)


@cache
def known_laws() -> dict[str, ScaleLaw]:
    """Return the measured laws by loader."""
    return _section("loaders")


@cache
def conventions() -> dict[str, ScaleLaw]:
    """Return the four ways in which readers use alpha and rank."""
    return _section("conventions")


def _section(name: str) -> dict[str, ScaleLaw]:
    rows: dict[str, Any] = json.loads(_LAWS.read_text(encoding="utf-8"))[name]
    return {loader: ScaleLaw.parse(loader, row) for loader, row in rows.items()}


def prescribe(law: ScaleLaw, modules: Iterable[LoraModule], *, lora_alpha: float | None = None) -> float | None:
    """Return the strength at which `law` gives every module its trained scale, or None when no single value does.

    `lora_alpha` is the alpha of the training for modules that carry none; without it such a module says nothing about
    its trained scale, and the answer is None. 1.0 when every strength does (nothing to load).
    """
    needed = [_needed(law, module, lora_alpha) for module in modules]
    values = [value for value in needed if value != _ANY]
    if any(value is None for value in values):
        return None
    numbers = [float(value) for value in values if value is not None]
    first = numbers[0] if numbers else 1.0
    agree = all(math.isclose(first, number, rel_tol=_SAME, abs_tol=1e-12) for number in numbers)
    return float(f"{first:.6g}") if agree else None


def prescriptions(adapter: LoraAdapter, *, lora_alpha: float | None = None) -> dict[str, float | None]:
    """Return the strength to pass for every known loader that reads the format of `adapter`."""
    laws = {name: law for name, law in known_laws().items() if adapter.format in law.formats}
    modules = distinct(adapter.modules.values())
    if not adapter.modules or any(problem.fatal for problem in adapter.problems):
        return dict.fromkeys(laws)
    return {name: prescribe(law, modules, lora_alpha=lora_alpha) for name, law in laws.items()}


def distinct(modules: Iterable[LoraModule]) -> list[LoraModule]:
    """Return one module for every combination of numbers that a scale can depend on."""
    found = {(module.alpha, module.rank, module.rslora, "alpha" in module.keys): module for module in modules}
    return list(found.values())


def _needed(law: ScaleLaw, module: LoraModule, lora_alpha: float | None) -> float | str | None:
    """Return the strength that gives `module` its trained scale, None when there is none, `_ANY` when all do."""
    wanted = _trained(module, lora_alpha)
    gain = law.at_one(module)
    if wanted is None or not math.isfinite(gain):
        return None
    if gain == 0 or law.strength_power == 0:
        return _ANY if gain == wanted else None
    return _root(wanted / gain, law.strength_power)


def _trained(module: LoraModule, lora_alpha: float | None) -> float | None:
    """Return the trained scale as far as it is known: a zero alpha tensor is read as 0, as 1 or as the rank."""
    if module.rank == 0:
        return 1.0
    if module.alpha is None:
        return None if lora_alpha is None else replace(module, alpha=lora_alpha).trained_scale
    return None if module.alpha == 0 and "alpha" in module.keys else module.trained_scale


def _root(value: float, power: float) -> float | None:
    """Return x with x**power = value, None when no real number is."""
    if power == 1:
        return value
    if value > 0:
        return float(value ** (1 / power))
    if value == 0:
        return 0.0 if power > 0 else None
    return -float((-value) ** (1 / power)) if power % 2 == 1 else None


def _power(base: float, power: float) -> float:
    if base < 0 and power != int(power):
        return math.nan
    if base == 0 and power < 0:
        return math.inf
    return float(base**power)
