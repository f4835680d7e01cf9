"""What is known of released loaders: the committed table of measured laws, and the strengths that it prescribes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from harness.law.grammar import ALPHA, RANK, STRENGTH, word_of
from harness.law.law import Law
from harness.law.probe import Probe
from harness.law.scale import trained_scale
from harness.text import printable

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

    @property
    def variant(self) -> str:
        """What the module is made of: `lora`, `dora`, `lokr`, …"""

    @property
    def unscaled(self) -> bool:
        """Whether its writer trains at scale 1 and never saves an alpha."""


class Adapter(Protocol):
    """A parsed LoRA file as far as its scales go."""

    @property
    def format(self) -> str:
        """How the file names its keys."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The adapter configuration as far as the file has one."""

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
    users call the strength, `profile` what is known of the files that it does not apply in full.
    """

    name: str
    law: Law
    rslora: bool = False
    formats: tuple[str, ...] = ()
    argument: str = "strength"
    profile: str = ""

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
        profile: str = "",
    ) -> ScaleLaw:
        """Return the law constant * strength^s * alpha^a * rank^r."""
        words = word_of(STRENGTH, strength), word_of(ALPHA, alpha), word_of(RANK, rank)
        return cls(name, Law(*words, constant=constant), rslora, tuple(formats), argument, profile)

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


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(_TABLE.read_text(encoding="utf-8"))
    return table


def _section(name: str) -> dict[str, ScaleLaw]:
    rows = _table()[name]
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
        return 1.0 if module.unscaled else None
    if module.rank and module.alpha == 0 and "alpha" in module.keys and lora_alpha is None:
        return None
    alpha = lora_alpha if lora_alpha is not None and not module.alpha else module.alpha
    found = trained_scale(alpha, module.rank, rslora=module.rslora)
    return found if math.isfinite(found) else None


def prescriptions(adapter: Adapter, *, lora_alpha: float | None = None) -> dict[str, float | None]:
    """Return the strength to pass for every known loader that reads the format of `adapter`; None: see `refusals`."""
    refused = refusals(adapter, lora_alpha=lora_alpha)
    return {
        name: None if name in refused else prescribe(law, _scaled(adapter), lora_alpha=lora_alpha)
        for name, law in _readers(adapter).items()
    }


def refusals(adapter: Adapter, *, lora_alpha: float | None = None) -> dict[str, str]:
    """Return why there is no strength to pass, by loader that reads the format of `adapter` and has none."""
    found = {name: _refusal(adapter, law, lora_alpha) for name, law in _readers(adapter).items()}
    return {name: reason for name, reason in found.items() if reason}


def _readers(adapter: Adapter) -> dict[str, ScaleLaw]:
    return {name: law for name, law in known_laws().items() if adapter.format in law.formats}


def _scaled(adapter: Adapter) -> list[Scaled]:
    """Return the modules that a strength scales, one of each kind: what replaces a weight has none."""
    return distinct(module for module in adapter.modules.values() if module.variant not in _REPLACING)


def _refusal(adapter: Adapter, law: ScaleLaw, lora_alpha: float | None) -> str:
    modules = _scaled(adapter)
    if any(problem.fatal for problem in adapter.problems):
        return "a module of the file is broken"
    if not modules:
        return "no module of the file has a strength"
    if law.profile != "peft" and not any(module.rank or module.variant in _WITHOUT_RANK for module in modules):
        return "no strength is defined for this method"
    if reason := not_applied(adapter, law.profile):
        return reason
    if any(module.rank and module.alpha == 0 for module in modules):
        return "alpha is 0 in the file"
    if prescribe(law, modules, lora_alpha=lora_alpha) is not None:
        return ""
    if unknown := {module.rank for module in modules if wanted_scale(module, lora_alpha) is None}:
        ranks = f"{unknown.pop()}" if len(unknown) == 1 else "rank"
        return f"alpha unknown: lora_alpha / {ranks}, with the lora_alpha of the training"
    return "the modules need different strengths"


_REPLACING = frozenset({"set", "tokens", "copy", "textual_inversion"})
_WITHOUT_RANK = frozenset({"lokr", "diff", "norm"})


def not_applied(adapter: Adapter, profile: str) -> str:
    """Return why loaders of a profile do not apply all of `adapter` as far as is known, empty when nothing is known."""
    known = _table()["profiles"].get(profile)
    if known is None:
        return ""
    lacks = known["lacks"]
    if adapter.format == "peft" and "" in lacks and not adapter.config:
        return str(lacks[""])
    for name, module in adapter.modules.items():
        ends = {key.rpartition(".")[2] for key in module.keys.values()}
        if found := next((why for part, why in lacks.items() if part == module.variant or part in ends), ""):
            return str(found)
        if any(map(_WRAPPED.search, module.keys.values())):
            return f"it looks for plain names, not for those of a wrapper ({printable(name, 60)})"
    return _foreign(adapter, known) or _fault(adapter, known)


def _fault(adapter: Adapter, known: Mapping[str, Any]) -> str:
    """Say which measured fault of a loader this file meets."""
    for fault in known.get("faults", ()):
        keys = re.compile(fault["keys"])
        found = [module for module in adapter.modules.values() if any(map(keys.match, module.keys.values()))]
        if _WHEN[fault["when"]](found):
            return str(fault["why"])
    return ""


_WHEN: Mapping[str, Callable[[Sequence[Scaled]], bool]] = {
    "negative": lambda modules: any(module.alpha is not None and module.alpha < 0 for module in modules),
    "alpha": lambda modules: any("alpha" in module.keys and module.alpha != module.rank for module in modules),
    "mixed": lambda modules: len({m.alpha / m.rank for m in modules if m.alpha is not None and m.rank}) > 1,
}


_WRAPPED = re.compile(r"_orig_mod[._]|_wrapped_module\.|_forward_module\.|^(base_model\.model\.)?module\.")


def _foreign(adapter: Adapter, known: Mapping[str, Any]) -> str:
    """Say which names a loader is not known to convert."""
    if adapter.format not in known.get("names", {}):
        return ""
    keys = [next(iter(module.keys.values())) for module in adapter.modules.values()]
    keys = [key for key in keys if not re.match(known["beside"], key)]
    families = [re.compile(pattern) for pattern in known["names"][adapter.format]]
    if not keys or any(all(map(family.match, keys)) for family in families):
        return ""
    odd = [key for key in keys if not any(family.match(key) for family in families)]
    if odd:
        return f"not known to convert such names: {printable(odd[0], 70)}"
    return "names of two kinds, of which it converts one"


def distinct(modules: Iterable[M]) -> list[M]:
    """Return one module for every combination of numbers that a scale can depend on."""
    found = {(module.alpha, module.rank, module.rslora, "alpha" in module.keys): module for module in modules}
    return list(found.values())
