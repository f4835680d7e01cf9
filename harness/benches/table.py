"""The table of benches, `zoo.json`: a tiny model of every architecture that diffusers and transformers load LoRA into.

A row has the class, a configuration that builds in a moment, the inputs of one forward and what a pipeline calls the
model; `mixin` loads LoRA into it. `original` says which families of `files/architectures.toml` have the names that the
authors' own code has for the layers (`names`), which of the names are meant (`only`;
`measured` where the tables of what tools read have others), and which layers files call as diffusers does (`kept`).
`wide` is what a model must have of the real one's widths where diffusers' converter has these numbers in its code.
`experts` and `dtypes` are the bench's.
"""

from __future__ import annotations

import inspect
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.benches.answer import first_tensor
from harness.benches.bench import Bench, Noise
from harness.benches.layer import Layer, Rows, layer_of
from harness.example import DTYPES
from harness.files.architectures import Alias, authors_names, turns

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Parts = dict[str, list[str]]
"""Name in a file -> the layers whose rows it stacks."""


@dataclass(frozen=True)
class ArchitectureRow:
    """One architecture: `kind` is the class behind the library's name."""

    family: str
    title: str
    kind: str
    mixin: str | None
    component: str
    config: Mapping[str, Any] = field(hash=False)
    inputs: Mapping[str, Any] = field(hash=False)
    original: Mapping[str, Any] | None = field(default=None, hash=False)
    wide: Mapping[str, Any] | None = field(default=None, hash=False)
    seed: int | None = None
    targets: Sequence[str] | None = field(default=None, hash=False)
    fused: Sequence[Sequence[Any]] = field(default=(), hash=False)
    experts: Sequence[str] = field(default=(), hash=False)
    dtypes: Sequence[str] = DTYPES

    @property
    def library(self) -> str:
        """diffusers or transformers."""
        return self.kind.partition(".")[0]

    @property
    def class_name(self) -> str:
        """The name of the class in its library."""
        return self.kind.partition(".")[2]

    def make(self) -> torch.nn.Module:
        """Build the model."""
        kind: Any = getattr(import_module(self.library), self.class_name)
        made: torch.nn.Module = (
            kind(**self.config) if self.library == "diffusers" else kind(kind.config_class(**self.config))
        )
        return made

    def run(self, model: Any, noise: Noise) -> Tensor:
        """Call the model once."""
        given = {name: _value(spec, noise) for name, spec in self.inputs.items()}
        told = {"return_dict": False} if "return_dict" in inspect.signature(model.forward).parameters else {}
        return first_tensor(model(**given, **told))

    def bench(self) -> Bench:
        """Return the bench of this row."""
        return Bench(
            self.family,
            zlib.crc32(self.family.encode()) % 10_000 if self.seed is None else self.seed,
            self.make,
            None if self.targets is None else tuple(self.targets),
            self.run,
            tuple((end, rows) for end, rows in self.fused),
            self.component,
            merged=partial(_merged, self) if self.original else None,
            dtypes=tuple(self.dtypes),
            experts=tuple(self.experts),
        )


@cache
def rows() -> Mapping[str, ArchitectureRow]:
    """Return every row by the name of its family."""
    table = json.loads(Path(__file__).with_name("zoo.json").read_text(encoding="utf-8"))
    return {
        fields["family"]: ArchitectureRow(**{"kind" if k == "class" else k: v for k, v in fields.items()})
        for fields in table
    }


def _merged(row: ArchitectureRow) -> Mapping[str, Rows]:
    """Return where the rows of the authors' own layers are."""
    layers = _layers(row)
    known = _authors(layers, row.original or {})
    parts = original_names(list(layers), row.original or {})
    return {name: _rows(stacked, layers, known.get(name)) for name, stacked in parts.items()}


def _rows(stacked: Sequence[str], layers: Mapping[str, Layer], alias: Alias | None) -> Rows:
    first = layers[stacked[0]]
    if alias is None or len(stacked) > 1 or not turns(alias.row.swap, *first.shape):
        return tuple((part, slice(0, layers[part].rows)) for part in stacked)
    half = first.rows // 2
    return (stacked[0], slice(half, first.rows)), (stacked[0], slice(0, half))


@cache
def _layers(row: ArchitectureRow) -> dict[str, Layer]:
    named = row.make().named_modules()
    return {name: found for name, module in named if (found := layer_of(module)) and found.kind == "linear"}


def _authors(layers: Iterable[str], rules: Mapping[str, Any]) -> dict[str, Alias]:
    kept = rules.get("kept")
    return authors_names([name for name in layers if not (kept and re.search(kept, name))], rules.get("names", ()))


def original_names(layers: Sequence[str], rules: Mapping[str, Any]) -> Parts:
    """Return the names that the authors' own code has for `layers`, by the rules of a row."""
    known = _authors(layers, rules)
    first = {alias.others[0]: name for name, alias in known.items()}
    later = {part for alias in known.values() for part in alias.others[1:]}
    found: Parts = {}
    for layer in layers:
        if layer not in later:
            name = first.get(layer, layer)
            found[name] = list(known[name].others) if layer in first else [layer]
    return {name: parts for name, parts in found.items() if re.search(rules.get("only", ""), name)}


def _value(spec: Any, noise: Noise) -> Any:
    """Return an input: a list is the shape of noise, an object says what it is."""
    import torch

    if isinstance(spec, list):
        return noise(*spec)
    if "full" in spec:
        return torch.full(spec["full"], float(spec["value"])).to(noise(1))
    if "mask" in spec:
        return torch.ones(*spec["mask"], dtype=torch.bool)
    if "maskl" in spec:
        return torch.ones(*spec["maskl"], dtype=torch.long)
    if "bits" in spec:
        return torch.tensor(spec["bits"], dtype=torch.bool)
    if "long" in spec:
        return torch.tensor(spec["long"])
    if "list" in spec:
        return [_value(each, noise) for each in spec["list"]]
    if "dict" in spec:
        return {name: _value(each, noise) for name, each in spec["dict"].items()}
    return spec["value"]


def row_of(model: Any) -> ArchitectureRow | None:
    """Return the row of the architecture that a model of any size is, None where no mixin loads LoRA into it.

    Of rows of one class it is the one whose configuration is the most like the model's.
    """
    classes = {kind.__name__ for kind in type(model).__mro__}
    found = [row for row in rows().values() if row.mixin and row.component in _FIRST and row.class_name in classes]
    config = dict(getattr(model, "config", {}))
    return max(found, key=lambda row: sum(_like(config, *pair) for pair in row.config.items()), default=None)


_FIRST = (
    "transformer",
    "unet",
)  # a second transformer is of the class of the first: nothing tells which one a model is


def _like(config: Mapping[str, Any], name: str, value: Any) -> int:
    """Return 1 where a model has a value too, -1 where it has another word in its place; widths tell nothing."""
    own = config.get(name)
    own = list(own) if isinstance(own, tuple) else own
    return 1 if own == value else -1 if value is None or isinstance(value, str | bool) else 0
