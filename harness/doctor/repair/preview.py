"""The file that a repair would write, as its header will stand there: planned from names, shapes and alphas alone.

Its keys are spelled by the code that writes them and read back by the code that reads any file. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from harness.doctor.repair.naming import Home, Layers, homes, refuse_what_would_change
from harness.errors import UserError
from harness.files import FORMATS, LoraAdapter, LoraModule
from harness.files.configuration import configuration
from harness.files.detect import detect
from harness.files.format import Format, Source
from harness.files.keys import cut
from harness.files.read import interpret
from harness.files.tensor_file import TensorFile, TensorInfo
from harness.files.write import header_of, key_of, stem_of
from harness.text import printable

_PLAIN = frozenset({"A", "B", "alpha"})
_ALPHA = TensorInfo("F32", (), 0, 4)


@dataclass(frozen=True)
class _Planned:
    """A pair of the new file: where it goes, and the modules that it is made of."""

    home: Home
    pieces: tuple[LoraModule, ...]
    parts: Mapping[str, Any] = field(default_factory=lambda: {"A": None, "B": None})

    @cached_property
    def rank(self) -> int:
        return sum(module.rank for module in self.pieces)

    @property
    def alpha(self) -> float:
        return float(self.rank)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        first = self.pieces[0]
        height = self.home.height or first.out_features
        if self.home.part and not self.home.rows:
            height = self.home.part[1] - self.home.part[0]
        ones = tuple(1 for _ in first.kernel)
        return {"A": (self.rank, first.in_features, *first.kernel), "B": (height, self.rank, *ones)}


class _Header(TensorFile):
    """A header without a file behind it: every number in it is an alpha, which is known."""

    def numbers(self, keys: Iterable[str]) -> dict[str, float]:
        return {key: float(self.metadata[f"alpha of {key}"]) for key in keys}


def is_plain(adapter: LoraAdapter) -> bool:
    """Tell whether the file holds pairs with their alphas and nothing else, which every format can spell."""
    modules = adapter.modules.values()
    used = {key for module in modules for key in module.keys.values()}
    others = (cut(key) for key in adapter.file.keys if key not in used)
    return all(parts is not None and parts[1] == "alpha" for parts in others) and all(
        module.variant in ("lora", "conv") and module.rank and module.keys.keys() <= _PLAIN for module in modules
    )


def preview(adapter: LoraAdapter, to: str, layers: Layers | None = None) -> LoraAdapter:
    """Return what `repair_file` would write of plain pairs (`is_plain`), as it will be read.

    `layers` are the model's. Alphas must be known: give those of the training before (`with_alpha`).

    Raises:
        UserError: what the repair would refuse.
    """
    refuse_what_would_change(adapter, to)
    row, planned = FORMATS[to], _planned(adapter, to, layers)
    try:
        tensors, alphas = _keys(row, planned)
        config = _configuration(row, planned)
    except ValueError as error:
        raise UserError(f"cannot be written as {to}: {error}") from None
    said = {f"alpha of {key}": repr(value) for key, value in alphas.items()}
    file = _Header(adapter.path, tensors, {**row.metadata, **header_of(row, config), **said}, size=0)
    source = Source(adapter.path, file, config if row.folder else None)
    found = interpret(source, detect(source))
    _refuse_other_names(found, to, planned)
    return found


def is_written(adapter: LoraAdapter) -> bool:
    """Tell whether the file has the names and shapes that a repair to its own format would write."""
    row, modules = FORMATS[adapter.format], adapter.modules.values()
    is_alike = adapter.alpha_source == row.alpha[0] and not adapter.problems and not adapter.unused_keys
    if not is_alike or any(module.rslora for module in modules):
        return False
    try:
        tensors = _keys(row, _planned(adapter, adapter.format, None))[0]
    except (UserError, ValueError):
        return False
    own = adapter.file.tensors
    return tensors.keys() == own.keys() and all(info.shape == own[key].shape for key, info in tensors.items())


def _planned(adapter: LoraAdapter, to: str, layers: Layers | None) -> list[_Planned]:
    """Return the modules of the new file, those that go to rows of one layer as one."""
    stacks: dict[tuple[str, str], list[tuple[LoraModule, Home]]] = {}
    for name, places in homes(adapter, to, layers).items():
        for home in places:
            stacks.setdefault((home.prefix, home.name), []).append((adapter.modules[name], home))
    return [_Planned(some[0][1], tuple(module for module, _ in some)) for some in stacks.values()]


def _keys(row: Format, planned: Iterable[_Planned]) -> tuple[dict[str, TensorInfo], dict[str, float]]:
    """Return the tensors as the header names them, and the alphas that lie in tensors."""
    tensors: dict[str, TensorInfo] = {}
    alphas: dict[str, float] = {}
    called = {role: key_of(row, role) for role in ("A", "B")}
    for each in planned:
        stem, flips = each.home.prefix + stem_of(row, each.home.name), row.flips(each.home.name)
        for role, shape in each.shapes.items():
            stored = tuple(reversed(shape)) if role in flips else shape
            tensors[f"{stem}.{called[role]}"] = TensorInfo(each.pieces[0].dtype, stored, 0, 0)
        if row.alpha[0] == "tensor":
            tensors[f"{stem}.alpha"] = _ALPHA
            alphas[f"{stem}.alpha"] = each.alpha
    return dict(sorted(tensors.items())), alphas  # in the order in which they are written


def _configuration(row: Format, planned: Iterable[_Planned]) -> dict[str, Any]:
    by_prefix: dict[str, dict[str, _Planned]] = {}
    for each in planned:
        by_prefix.setdefault(each.home.prefix, {})[each.home.name] = each
    config: dict[str, Any] = {}
    for prefix, modules in by_prefix.items():
        start = prefix if row.alpha[0] == "header" else ""
        config |= {f"{start}{name}": value for name, value in configuration(row, modules).items()}
    return config


def _refuse_other_names(found: LoraAdapter, to: str, planned: Iterable[_Planned]) -> None:
    """Refuse names that are not read back as they were meant.

    Raises:
        UserError: naming one.
    """
    fatal = next((problem.what for problem in found.problems if problem.fatal), None)
    flat = FORMATS[to].flattened
    wanted = {each.home.name.replace(".", "_") if flat else each.home.name for each in planned}
    read = {module.name.replace(".", "_") if flat else module.name for module in found.modules.values()}
    if fatal or found.format != to or read != wanted:
        what = fatal or f"the format has no way to write {printable(next(iter(wanted - read), 'these names'))}"
        raise UserError(f"cannot be written as {to}: {what}")


def with_scale(adapter: LoraAdapter) -> LoraAdapter:
    """Return the adapter with alpha = rank where it has none, as `repair --scale 1` takes it."""
    modules = {
        name: module.changed(alpha=float(module.rank)) if module.rank and module.alpha is None else module
        for name, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules)
