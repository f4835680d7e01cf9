"""A cell of the matrix: one loader, format, bench and variant; and which cells a loader is checked in."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness.benches import Bench, View, bench_names, get_bench
from harness.errors import UserError
from harness.example import DTYPES, Example
from harness.files import FORMATS
from harness.isolation.device import cuda_devices, no_device
from harness.isolation.limits import Limit, no_limit
from harness.isolation.subject import Asked
from harness.loaders.benches import Which, bench_name
from harness.loaders.protocol import CORE_VARIANTS, IMPLIED_BENCHES, Subject
from harness.variants import Variant, get_variant
from harness.verdict.verdict import Outcome, Verdict

_UNIFORM = {"scale": frozenset({"rank", "alpha"}), "kv": frozenset({"alpha"})}  # by where the format keeps alpha
_REASONS = 3  # told of why there is nothing to check


@dataclass(frozen=True)
class Cell:
    """One place of the matrix: a loader, a file format, a bench and a variant of LoRA.

    `asked` is where the loader's code runs, by default this process; `watch` tells the run of a call that may hang.
    `earlier` are examples that it was asked for before, `heard` what became of each kind of thing it cannot apply,
    `kept` what need not be asked again. `formats` and `benches` are those that were asked for, empty for all.
    """

    subject: Subject
    format: str
    bench_name: str
    variant_name: str = "lora"
    asked: Asked | None = field(default=None, compare=False)
    watch: Limit = field(default=no_limit, compare=False)
    seconds: float | None = None
    earlier: list[Example] = field(default_factory=list, compare=False, repr=False)
    heard: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    kept: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    formats: tuple[str, ...] = field(default=(), compare=False, repr=False)
    benches: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @property
    def allowed(self) -> float:
        """The seconds that one call of the loader may take."""
        return self.seconds or self.subject.defaults.seconds

    @property
    def bench(self) -> Bench:
        """The bench itself."""
        return get_bench(self.bench_name)

    @property
    def variant(self) -> Variant:
        """What the modules of the file are."""
        return get_variant(self.variant_name)

    @property
    def view(self) -> View:
        """The bench's layers as the file names them."""
        view = self.variant.view(self.bench)
        assert view is not None, f"{self.bench_name} has no layers for {self.variant_name}"
        return view

    @property
    def targets(self) -> tuple[str, ...]:
        """The layers a file of this cell may change."""
        naming, wanted = FORMATS[self.format].naming, re.compile(self.subject.declaration.modules or "")
        names = (name for name in self.variant.targets(self.view) if wanted.search(name))
        return tuple(name for name in names if naming is None or naming.write(name) is not None)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of a model that the bench runs in and the loader takes, the plainest first."""
        taken = self.subject.declaration.dtypes
        return tuple(dtype for dtype in self.bench.dtypes if not taken or dtype in taken)

    @property
    def file_dtypes(self) -> tuple[str, ...]:
        """The dtypes of a file that the loader takes, the plainest first."""
        taken = self.subject.declaration.file_dtypes
        return tuple(dtype for dtype in DTYPES if not taken or dtype in taken)

    @property
    def strengths(self) -> tuple[float, ...]:
        """The only strengths that can be asked for, empty for any."""
        return self.variant.strengths or ((1.0,) if self.subject.strength_argument is None else ())

    @property
    def uniform(self) -> frozenset[str]:
        """What must be the same in all modules of a file, for the loader's sake or the format's: rank, alpha."""
        return self.subject.declaration.uniform | _UNIFORM.get(FORMATS[self.format].alpha[0], frozenset())

    @property
    def possible(self) -> bool:
        """Whether the format can say the variant and the bench has layers for it."""
        return self.why_impossible is None

    @property
    def why_impossible(self) -> str | None:
        """Why no file is one of this cell, in a clause; None where one can be."""
        formats, view = self.variant.formats, self.variant.view(self.bench)
        if formats is not None and self.format not in formats:
            return (
                f"{self.format} has no place for {self.variant_name} (formats that have: {', '.join(sorted(formats))})"
            )
        if not self.dtypes:
            return f"bench {self.bench_name} does not run in {', '.join(sorted(self.subject.declaration.dtypes))}"
        if view is None or not self.variant.targets(view):
            return f"bench {self.bench_name} has no layer for {self.variant_name}"
        if not self.targets:
            modules = self.subject.declaration.modules
            return f"{self.format} has no names for the layers of bench {self.bench_name}" + (
                f" that modules={modules!r} is found in" if modules else ""
            )
        return None

    @property
    def has_alpha(self) -> bool:
        """Whether a file of this cell can carry an alpha that means something."""
        return self.variant.alpha and FORMATS[self.format].alpha[0] != "none"

    @property
    def has_patterns(self) -> bool:
        """Whether a file of this cell says in a configuration which modules have another rank or alpha."""
        return self.has_alpha and FORMATS[self.format].alpha[0] in ("config", "header")

    @property
    def zero_alpha_is_ambiguous(self) -> bool:
        """Whether readers of the format take alpha = 0 as 0 or as the rank: so where alpha is a tensor of its own.

        In a GGUF header 0 stands for none.
        """
        return FORMATS[self.format].alpha[0] in ("tensor", "kv")

    @property
    def place(self) -> str:
        """Where in the matrix the cell is, in words."""
        variant = f", variant {self.variant_name}" if self.variant_name != "lora" else ""
        return f"format {self.format}, bench {self.bench_name}{variant}"

    def reproduce(self, example: Example) -> str:
        """Return the command that repeats `example` in this cell."""
        everything = {t.name for t in example.targets} == set(self.targets)
        return f"{self.command} {example.as_options(everything=everything)}"

    @property
    def command(self) -> str:
        """The command that checks this cell."""
        where = f"{shlex.quote(self.subject.spec)} --format {self.format} {self.bench.option}"
        where += f" --variant {self.variant_name}" if self.variant_name != "lora" else ""
        return f"lora-harness check {where}"

    def verdict(self, check: str, outcome: Outcome, **fields: Any) -> Verdict:
        """Return a verdict of `check`, which is a family or one of the run's own, in this cell."""
        where: dict[str, Any] = {"format": self.format, "bench": self.bench_name, "variant": self.variant_name}
        where |= {"loader": self.subject.title, "loader_version": self.subject.version}
        return Verdict(check=check, outcome=outcome, **where, **fields)


def cells_of(
    subject: Subject,
    formats: Iterable[str] | None = None,
    benches: Iterable[Which] | None = None,
    variants: Iterable[str] | None = None,
) -> tuple[list[Cell], list[Verdict]]:
    """Return the cells to check, and a skipped verdict for each wanted one that the loader does not declare.

    None stands for all that it declares. What no file can be, such as a convolution on a model that has none, is no
    cell at all. A bench is named, or is a function under `@bench`.

    Raises:
        UserError: an unknown format, bench or variant, or nothing to check.
    """
    named = None if benches is None else tuple(dict.fromkeys(map(bench_name, benches)))
    wanted = (None if formats is None else tuple(formats), named, None if variants is None else tuple(variants))
    _known_names(*wanted)
    places = _product(subject, *wanted)
    cells, skipped = [], _without_plain(subject) if variants is None else []
    for cell in (each for each in places if each.possible):
        if reason := subject.unsupported(cell.format, cell.bench_name, cell.variant_name):
            skipped.append(cell.verdict("smoke", "skipped", title="not declared", reason=reason))
        elif subject.declaration.gpu and not cuda_devices():
            skipped.append(cell.verdict("smoke", "skipped", title="no GPU", reason=f"it needs one: {no_device()}"))
        else:
            cells.append(cell)
    if not cells and not skipped:
        raise UserError(f"{subject.spec}: nothing to check: {_why_none(places)}")
    return cells, skipped


def _why_none(places: Sequence[Cell]) -> str:
    """Return why no file is one of any of these cells, and where one could be."""
    reasons = dict.fromkeys(reason for cell in places if (reason := cell.why_impossible))
    others = (replace(cell, bench_name=name) for cell in places[:1] for name in bench_names())
    fit = [cell.bench_name for cell in others if cell.possible]
    return "; ".join([*itertools.islice(reasons, _REASONS), *([f"benches that do: {', '.join(fit)}"] if fit else ())])


def _without_plain(subject: Subject) -> list[Verdict]:
    """Return what is said of a loader that leaves plain LoRA out."""
    if CORE_VARIANTS[0] in subject.variants:
        return []
    cell = Cell(subject, subject.formats[0], subject.benches[0])
    reason = f"{subject.spec} declares variants without lora: neither plain LoRA nor what it leaves out is looked at"
    return [cell.verdict("smoke", "skipped", title="not declared", reason=reason)]


def cells_beside(subject: Subject) -> list[Cell]:
    """Return a cell for each bench that the loader takes beside those it is checked on: one format, plain LoRA.

    It is a format that has the model's own names.
    """
    names = sorted(subject.declaration.also - set(subject.benches))
    form = next((name for name in subject.formats if not FORMATS[name].flattened), subject.formats[0])
    cells = (Cell(subject, form, name) for name in names)
    return [cell for cell in cells if cell.possible and subject.unsupported(cell.format, cell.bench_name) is None]


def declared_cells(subject: Subject) -> list[Cell]:
    """Return every cell that the loader declares."""
    places = (cell for cell in _product(subject) if cell.possible)
    return [c for c in places if subject.unsupported(c.format, c.bench_name, c.variant_name) is None]


def _product(
    subject: Subject,
    formats: Sequence[str] | None = None,
    benches: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
) -> list[Cell]:
    names = formats or subject.formats, benches or subject.benches, variants or subject.variants
    formats, asked = tuple(formats or ()), tuple(benches or ())
    cells = [Cell(subject, *place, formats=formats, benches=asked) for place in itertools.product(*names)]
    if benches is None and CORE_VARIANTS[0] in names[2]:
        cells += (Cell(subject, names[0][0], more) for more, bench in IMPLIED_BENCHES.items() if bench in names[1])
    return cells


def checkable_formats() -> tuple[str, ...]:
    """Return the formats that loaders are checked with."""
    return tuple(name for name, row in FORMATS.items() if row.is_written)


def _known_names(formats: Sequence[str] | None, benches: Sequence[str] | None, variants: Sequence[str] | None) -> None:
    """Refuse names that are none; those of benches were looked up before."""
    checkable = checkable_formats()
    for name in formats or ():
        if name not in checkable:
            raise UserError(
                f"format={name!r}: not a format that loaders are checked with; those are {', '.join(checkable)}"
            )
    for name in variants or ():
        get_variant(name)
