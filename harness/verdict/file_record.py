"""What `inspect` and `audit` say of one file, as data."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from harness.text import count, first_of
from harness.verdict.codes import CODES, SEVERITIES, Severity
from harness.verdict.verdict import Record

NO_LORA = "LH797"
Outlook = Literal["fine", "subtle", "too strong", "broken"]


class Hazard(Record):
    """Something in a file that readers disagree about, or that cannot be right (codes LH7xx)."""

    code: str
    what: str = ""

    @property
    def severity(self) -> Severity:
        """How grave it is; a code of a newer version, not known here, is a warning."""
        return CODES[self.code].severity if self.code in CODES else "warning"


class ModuleEnergy(Record):
    """Strength of one module's update ΔW = trained scale * B @ A, without ever forming it.

    `norm` is its Frobenius norm, `spectral` its largest singular value, `singular` the leading ones, `effective_rank`
    exp of the entropy of the singular values (1 to rank). `relative` is norm / ||W||, None without a base.
    """

    norm: float
    spectral: float = 0.0
    singular: tuple[float, ...] = ()
    effective_rank: float = 0.0
    relative: float | None = None
    finite: bool = True


class Advice(Record):
    """What the energies say: fine, subtle, too strong or broken; the reason; what to do."""

    outlook: Outlook
    reason: str
    advice: tuple[str, ...] = ()


class BaseFit(Record):
    """How much of a LoRA applies to a base.

    `applied` of `modules` modules fit a layer. `foreign` have none (the first ones), `misfits` one of another shape,
    `unplaced` one whose rows cannot be told, both with the reason; `missing` are layers of the base of the same kinds
    that the LoRA leaves out. `replaced` says which prefix had to be replaced for names to fit, `names` whose two names
    for a layer were needed.
    """

    base: str
    applied: int
    modules: int
    foreign: tuple[str, ...] = ()
    foreign_total: int = 0
    misfits: dict[str, str] = Field(default_factory=dict)
    unplaced: dict[str, str] = Field(default_factory=dict)
    missing: tuple[str, ...] = ()
    missing_total: int = 0
    replaced: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """What it comes to in one sentence, what does not apply first."""
        parts = []
        if self.foreign_total:
            have = "has" if self.foreign_total == 1 else "have"
            of = count(self.modules, "module")
            parts.append(f"{self.foreign_total} of {of} {have} no layer in the base, such as {self.foreign[0]}")
        for what, some in (("do not fit their layer", self.misfits), ("cannot be placed", self.unplaced)):
            if some:
                name, why = next(iter(some.items()))
                parts.append(f"{len(some)} of {count(self.modules, 'module')} {what}: {name}: {why}")
        shapes = "; shapes fit" if self.applied and not self.misfits else ""
        parts.append(f"applies to {self.applied} of {count(self.modules, 'module')}{shapes}")
        if self.missing_total:
            parts.append(
                f"leaves out {count(self.missing_total, 'layer')} of the same kinds ({first_of(self.missing)})"
            )
        bridged = (f"matched by the two names that layers of {name} have" for name in self.names)
        return "; ".join([*parts, *self.replaced, *bridged])


_UNSAID = "no single strength, or the file does not say enough"


class FileRecord(Record):
    """One LoRA file.

    `ranks`, `alphas`, `variants`, `dtypes` and `components` count modules by value (alpha `none`: the file has none).
    `scales` gives, for each convention (`alpha / rank`, `alpha / sqrt(rank)`, `alpha`, `1`), the smallest and largest
    factor on B @ A that a loader of that convention applies at strength 1. `trained` is the same for the trained scale.
    `ranks` leaves out what has no rank; `full` are LoKr modules of two full factors. `coverage` is the share of keys
    that are understood. `energy` maps a module to ||ΔW|| / ||W||, or to ||ΔW|| without a base. `prescription` maps a
    tool that reads this format to the strength that reproduces training; null when no single value can, a finding says
    that the tool breaks the file, or the file does not say enough: `unprescribed` then has the reason and what to do.
    `findings` are the pages of docs/findings whose fault the file meets. `weights_read` says that every weight was
    looked at, and not only the header. `fit` is how much of it applies to the base, where one is given.

    An audit adds: `size` and `mtime` (ns), which tell whether the file is the one that was read; `fingerprint`, a hash
    of the tensors' names, shapes and a few kilobytes; `digest` of all of their bytes (only where fingerprints agree,
    metadata left out); `duplicate_of`, the first path with the same digest.
    """

    kind: Literal["file"] = "file"
    path: str
    format: str | None = None
    size: int | None = Field(default=None, description="bytes of the weights file")
    modules: int = 0
    ranks: dict[str, int] = Field(default_factory=dict)
    alphas: dict[str, int] = Field(default_factory=dict)
    alpha_source: str = "none"
    variants: dict[str, int] = Field(default_factory=dict)
    dtypes: dict[str, int] = Field(default_factory=dict)
    components: dict[str, int] = Field(default_factory=dict)
    trained: tuple[float, float] | None = None
    scales: dict[str, tuple[float, float]] = Field(default_factory=dict)
    hazards: tuple[Hazard, ...] = ()
    notes: tuple[str, ...] = ()
    coverage: float | None = None
    unused: tuple[str, ...] = ()
    trainer: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    energy: dict[str, float] | None = None
    energies: dict[str, ModuleEnergy] | None = None
    advice: Advice | None = None
    fit: BaseFit | None = None
    prescription: dict[str, float | None] = Field(default_factory=dict)
    unprescribed: dict[str, str] = Field(default_factory=dict)
    findings: tuple[str, ...] = ()
    dialect: str = ""
    weights_read: bool = False
    mtime: int | None = None
    seconds: float | None = None
    fingerprint: str | None = None
    digest: str | None = None
    duplicate_of: str | None = Field(default=None, description="first file with the same weights")

    @property
    def readable(self) -> bool:
        """Tell whether the file could be read at all."""
        return self.format is not None

    @property
    def is_other(self) -> bool:
        """Tell whether it is intact and has no known LoRA: a full checkpoint, an embedding, an unknown layout."""
        return NO_LORA in self.codes

    @property
    def headline(self) -> str:
        """What the scales mean for a person who loads the file, in one sentence or two."""
        if unknown := [name for name in ("glora", "tlora") if name in self.variants]:
            return f"What scales its {' and '.join(unknown)} modules is not judged."
        if self.modules and self.ranks.keys() <= {"full"}:
            return "Nothing in it is scaled by alpha / rank."
        if self.trained is None and self.modules and self.alpha_source == "config":
            return "Releases of its tool read its alpha in two ways: --lora-alpha says which the training meant."
        if self.trained is None or not self.modules:
            return "No alpha in the file: the standard is lora_alpha / rank of the training, 1 if both were equal."
        low, high = self.trained
        rule = "Rank-stabilised: alpha / sqrt(rank)" if self._is_rooted else "Standard: alpha / rank"
        if not math.isclose(low, high, rel_tol=1e-6):
            span = f"{rule} = {low:.4g} to {high:.4g} by module"
            return f"{span}. No strength makes loaders right that ignore alpha."
        said = f"{rule} = {low:.4g}."
        if low == 1 or low <= 0:
            return said if low != 1 else f"{said} Loaders that ignore alpha are right too."
        times = f"{1 / low:.4g}x too strong" if low < 1 else f"{low:.4g}x too weak"
        return f"{said} Loaders that ignore alpha are {times}."

    @property
    def without_number(self) -> dict[str, list[str]]:
        """The tools for which there is no number, by why."""
        found: dict[str, list[str]] = {}
        for tool, strength in self.prescription.items():
            if strength is None:
                found.setdefault(self.unprescribed.get(tool) or _UNSAID, []).append(tool)
        return found

    @property
    def _is_rooted(self) -> bool:
        """Tell whether the trained scale is alpha / sqrt(rank), and not alpha / rank."""
        root, plain = (self.scales.get(name) for name in ("alpha / sqrt(rank)", "alpha / rank"))
        if not self.trained or not root or not plain:
            return False
        return math.isclose(root[0], self.trained[0]) and not math.isclose(plain[0], self.trained[0])

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the hazards."""
        return tuple(hazard.code for hazard in self.hazards)

    @property
    def severity(self) -> Severity | None:
        """How grave the worst hazard is, None without any."""
        return min((hazard.severity for hazard in self.hazards), key=SEVERITIES.index, default=None)
