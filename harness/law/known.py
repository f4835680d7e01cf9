"""What is known of the tools people load LoRA files with: a row each, its law, and the strength that it prescribes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from harness.law.findings import Finding, finding_of
from harness.law.grammar import ALPHA, RANK, STRENGTH, word_of
from harness.law.law import Law
from harness.law.probe import Probe
from harness.law.scale import trained_scale
from harness.text import read_toml

M = TypeVar("M", bound="Scaled")
_TABLE = Path(__file__).with_name("tools.toml")


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
    def stacked(self) -> int:
        """How many projections were trained apart, each with its share of the rank."""

    @property
    def keys(self) -> Mapping[str, str]:
        """Role -> key in the file."""

    @property
    def variant(self) -> str:
        """What the module is made of: `lora`, `dora`, `lokr`, …"""

    @property
    def unscaled(self) -> bool:
        """Whether its writer trains at scale 1 and never saves an alpha."""


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
        return self._factor(module.alpha, module.rank, module.rslora)

    @cached_property
    def _factor(self) -> Callable[[float | None, int, bool], float]:
        return lru_cache(maxsize=1 << 12)(self._computed)  # the files of a library have few alphas and ranks

    def _computed(self, alpha: float | None, rank: int, rslora: bool) -> float:
        if alpha is None or rank == 0:
            return self.law.constant * self.law.strength.apply(1.0)
        law = self.law
        if self.rslora and rslora and law.rank.exponent == -1:
            law = replace(law, rank=word_of(RANK, -0.5))
        return law.scale(Probe("", 1.0, 0, (alpha,), (rank,), 0.0, 0.0))


@dataclass(frozen=True)
class Tool:
    """A tool that people load LoRA files with, as `tools.toml` has it; see there for what the fields mean."""

    name: str
    title: str
    field: str
    known: str
    law: ScaleLaw
    formats: tuple[str, ...]
    without_alpha: str
    alpha_zero: str
    release: str = ""
    versions: str = ""
    loader: str = ""
    source: str = ""
    by_name: tuple[str, ...] = ()
    in_config: bool = False
    each_part: bool = False
    original_names: bool = False
    own_names: tuple[str, ...] = ()
    beside: str = ""
    models: str = ""
    also: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
    convert: str = ""
    imports: str = ""
    drops: tuple[str, ...] = ()
    converts: tuple[str, ...] = ("*",)
    families: tuple[str, ...] | None = None
    has: tuple[str, ...] = ()
    renames: tuple[str, ...] = ()
    most_left: int | None = None
    field_text: str = ""
    layers: tuple[str, ...] = ()
    log: str = ""
    variants: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    limits: tuple[Mapping[str, Any], ...] = dataclasses.field(default=(), hash=False)

    @cached_property
    def faults(self) -> tuple[Finding, ...]:
        """What was read, not measured, of its faults."""
        return tuple(map(finding_of, self.limits))

    @property
    def takes_none(self) -> bool:
        """Tell whether its users cannot pass a strength."""
        return self.field.startswith("(")

    def cannot_read(self, format: str) -> bool:
        """Tell whether its code has no way to read files of `format`."""
        return format not in self.formats and any(fnmatchcase(format, glob) for glob in self.refuses)

    def not_reading(self, format: str) -> str:
        """Say that it does not read files of `format`, and what it reads."""
        if format == "peft" and self.imports:
            return self.imports
        return f"does not read {format} files, it reads {', '.join(self.formats)}"

    @property
    def passes(self) -> bool:
        """Tell whether its users pass a number of their own, rather than none or one that lies beside the file."""
        return not (self.takes_none or self.in_config)

    def passing(self, strength: float, components: Iterable[str] = ()) -> str:
        """Return what to write into its field, or to do with it, for this strength and a file of these components."""
        if self.takes_none:
            why = self.field.strip("()").removeprefix("none: ")
            return f"nothing to pass: {why if strength == 1 else f'multiply the alpha of the file by {strength:.6g}'}"
        if self.in_config:
            return (
                f"leave the {self.field} as it is" if strength == 1 else f"multiply the {self.field} by {strength:.6g}"
            )
        if ":weight>" in self.field:
            return self.field.replace("weight", f"{strength:.6g}")
        parts = [is_text_encoder(component) for component in components] or [False]
        fields = [self.field] * (not all(parts) or not self.field_text) + [self.field_text] * any(parts)
        return ", ".join(f"{field} = {strength:.6g}" for field in fields if field)

    @property
    def provenance(self) -> str:
        """How the row is known: `measured on 0.42.1`, or `read in the code of 2026-06`."""
        return f"measured on {self.release}" if self.known == "measured" else f"read in the code of {self.release}"

    def without(self, variant: str, magnitude: str = "") -> str:
        """Say what becomes of a variant that the tool does not apply in full; empty when nothing is known.

        `magnitude` is how the file spells its magnitudes: `dora_scale`, or `magnitude` otherwise.
        """
        if (says := self.variants.get(variant, "ok")) != "ok":
            return says
        drops = [each for each in self.limits if each["effect"] == "drops"]
        asked = {"variant": variant, "magnitude": magnitude}
        hit = (
            each for each in drops if all(value in each["file"].get(trait, [value]) for trait, value in asked.items())
        )
        return next((str(each["says"]) for each in hit if "variant" in each["file"]), "")


_TEXT_ENCODER = re.compile(r"te\d?|text_encoders?(_\d)?|clip_\w|t5\w*|text_model")
_LISTS = (
    "formats", "by_name", "families", "has", "own_names", "renames", "limits", "also", "drops", "layers", "refuses",
    "converts",
)  # fmt: skip
_POWERS = ("strength", "alpha", "rank", "constant", "rslora")


def is_text_encoder(component: str) -> bool:
    """Tell whether a component of a pipeline is a text encoder, by what files call it."""
    return bool(_TEXT_ENCODER.fullmatch(component))


@cache
def tools() -> dict[str, Tool]:
    """Return the tools by name."""
    rows = {row["name"]: row for row in read_toml(_TABLE)["tool"]}
    return {name: _tool({**rows.get(row.get("like"), {}), **row}) for name, row in rows.items()}


def _tool(row: Mapping[str, Any]) -> Tool:
    powers = {name: row[name] for name in _POWERS if name in row}
    law = ScaleLaw.of_powers(row["name"], **powers, formats=row["formats"], argument=row["field"])
    own = [name for name in row if name not in (*_POWERS, "like")]
    given: dict[str, Any] = {name: tuple(row[name]) if name in _LISTS else row[name] for name in own}
    return Tool(**given, law=law)


@cache
def known_laws() -> dict[str, ScaleLaw]:
    """Return the law of every tool by its name."""
    return {name: tool.law for name, tool in tools().items()}


@cache
def conventions() -> dict[str, ScaleLaw]:
    """Return the four ways in which readers use alpha and rank."""
    return {name: ScaleLaw.of_powers(name, **row) for name, row in read_toml(_TABLE)["convention"].items()}


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
    found = trained_scale(alpha, module.rank // module.stacked, rslora=module.rslora)
    return found if math.isfinite(found) else None


def file_probes(modules: Sequence[Scaled]) -> list[Probe]:
    """Return a probe at strength 1, without a measurement, for every module of one file, in its order."""
    alphas, ranks = tuple(module.alpha for module in modules), tuple(module.rank for module in modules)
    return [Probe("", 1.0, i, alphas, ranks, 0.0, 0.0, root=module.rslora) for i, module in enumerate(modules)]


def distinct(modules: Iterable[M]) -> list[M]:
    """Return one module for every combination of numbers that a scale can depend on."""
    found = {
        (module.alpha, module.rank, module.rslora, module.stacked, "alpha" in module.keys): module for module in modules
    }
    return list(found.values())
