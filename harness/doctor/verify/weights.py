"""A checkpoint whose tensors have the names of another: its own, rows of one, several stacked, or in codes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from harness.doctor.checkpoint import Checkpoint
from harness.doctor.match import Placement, place
from harness.doctor.quantised import Rows
from harness.doctor.spelling import layer_of
from harness.doctor.verify.vote import DTYPES, stored_as
from harness.errors import LoraFileError
from harness.files import LoraAdapter, LoraModule, TensorInfo
from harness.files.architectures import Shape
from harness.files.tensor_file import is_float

_WEIGHT = ".weight"
TIED = re.compile(
    r"(?:lm_head|embed_out|output|head|embed_tokens|wte|shared|word_embeddings|tok_embeddings|decoder)\.weight$"
)


class Grid(NamedTuple):
    """The steps of a quantised weight, and from where they count (None: 0)."""

    step: Rows
    offset: Rows | None = None

    def steps(self, start: int, stop: int) -> Tensor:
        """Return the steps of rows; infinite where a weight has no choice."""
        step = self.step(start, stop)
        return torch.where(step == 0, torch.inf, step)

    def codes(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of a weight in steps."""
        away = weight.float() - self.offset(start, stop) if self.offset else weight.float()
        return away / self.steps(start, stop)


def code_dtype(store: Checkpoint, name: str) -> str:
    """Return the dtype of the codes of a quantised weight; of packed ones the table, or whole numbers."""
    scheme = store.schemes[name]
    return store.dtype(scheme.codes.removeprefix(store.prefix)) if scheme.codes else scheme.table or "int8"


class Piece(NamedTuple):
    """Rows [start, stop) of a tensor of a checkpoint; all of them where `stop` is None."""

    name: str
    start: int = 0
    stop: int | None = None


@dataclass
class Weights:
    """A checkpoint whose tensors have the names of another: each is one of its own, rows of one, or several stacked."""

    store: Checkpoint
    pieces: dict[str, tuple[Piece, ...]]
    names: Mapping[str, str] = field(default_factory=dict)
    folds: dict[str, str] = field(default_factory=dict)
    groups: Mapping[str, int] = field(default_factory=dict)
    held: dict[str, Tensor] = field(default_factory=dict)
    coded: dict[str, tuple[str, Grid | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Checkpoint) -> Weights:
        """Return a checkpoint under its own names."""
        return cls(store, {}, _listed(store))

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.store.path

    @property
    def layers(self) -> dict[str, str]:
        """Its layers by their names with the prefix of the file: weights, and parameters that have no other name."""
        found = {}
        for name in self.names:
            dimensions = 0 if name.endswith(_WEIGHT) else len(self.info(name).shape)
            if (layer := layer_of(name, dimensions)) is not None:
                found[self.store.prefix_of(name) + layer] = name
        if not found:
            raise LoraFileError(self.path, "holds no weight of a layer")
        return found

    def place(self, adapter: LoraAdapter) -> Placement:
        """Return where the modules of an adapter go; those that replace what they name need not have its shape."""
        layers = self.layers
        infos = {layer: self.info(name) for layer, name in layers.items()}
        shapes: dict[str, Shape | None] = {name: i.shape if is_float(i.dtype) else None for name, i in infos.items()}
        whole = {name: module for name, module in adapter.modules.items() if _is_whole(module)}
        low = {name: module for name, module in adapter.modules.items() if name not in whole}
        first = place(_with(adapter, low), shapes, self.store.config)
        second = place(_with(adapter, whole), dict.fromkeys(shapes), self.store.config) if whole else first
        return Placement(
            {**first.slots, **second.slots},
            tuple(dict.fromkeys((*first.missing, *second.missing))),
            {**first.ambiguous, **second.ambiguous},
            {**first.misfits, **second.misfits},
            first.replaced or second.replaced,
            first.families or second.families,
            (*first.suspects, *second.suspects),
            first.converted | second.converted,
        )

    def slice(self, name: str, runs: Sequence[tuple[int, int]]) -> str:
        """Return a name for some rows of a tensor: runs of them, one below the other."""
        first, more = f"{runs[0][0]}:{runs[0][1]}", f" and {len(runs) - 1} more" if len(runs) > 1 else ""
        found = f"{name}[{first}{more}]"
        self.pieces[found] = tuple(Piece(*cut) for run in runs for cut in _cut(self._pieces(name), *run, self._stop))
        return found

    def info(self, name: str) -> TensorInfo:
        """Return what the header says, of stacked rows with the size that they have together."""
        if name in self.coded:
            return self.info(self.coded[name][0])
        if name in self.held:
            tensor = self.held[name]
            return TensorInfo(str(tensor.dtype), tuple(tensor.shape), 0, tensor.nbytes)
        if name in self.folds:
            whole = self.info(self.folds[name])
            return whole._replace(shape=(whole.shape[0] * whole.shape[1], *whole.shape[2:]))
        pieces = self._pieces(name)
        first = self._whole_info(pieces[0])
        if len(pieces) == 1 and pieces[0].stop is None:
            return first
        rows, width = sum(self._stop(piece) - piece.start for piece in pieces), first.shape[1:]
        size = rows * ((first.end - first.start) // max(first.shape[0], 1))
        height = self.groups.get(name, 0)
        return TensorInfo(first.dtype, (rows // height, height, *width) if height else (rows, *width), 0, size)

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor as torch names it; a real weight behind codes is float32."""
        if name in self.held:
            return str(self.held[name].dtype).removeprefix("torch.")
        own, step = self.coded.get(name, (name, None))
        plain = name not in self.coded and self.quantised(own) is None
        first = self._pieces(self.folds.get(own, own))[0].name
        return self.store.dtype(self.folds.get(first, first)) if plain else self._code_dtype(own, step)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows [start, stop), flattened to two dimensions."""
        if name in self.held:
            rows = self.held[name][start:stop]
            return rows.flatten(1) if rows.dim() > 1 else rows.reshape(-1, 1)
        if name in self.coded:
            return self._codes(*self.coded[name], start, stop)
        if name in self.folds:
            return self._unfolded(self.folds[name], start, stop)
        height = self.groups.get(name, 1)
        parts = [self._read(*piece) for piece in _cut(self._pieces(name), start * height, stop * height, self._stop)]
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        return found if height == 1 else found.reshape(stop - start, -1)

    def chunks(self, name: str) -> Rows:
        """Return what reads rows into one memory, where they are those of one tensor; they hold until the next call."""
        piece, *others = self._pieces(name)
        plain = (
            not others and piece.stop is None and not any(name in own for own in (self.held, self.coded, self.folds))
        )
        return self.store.chunks(piece.name) if plain else partial(self.rows, name)

    def whole(self, name: str) -> Tensor:
        """Return a tensor in its own shape."""
        info = self.info(name)
        return self.rows(name, 0, (*info.shape, 1)[0]).reshape(info.shape)

    def tie(self, head: str, embedding: str) -> None:
        """Let a head be the embedding."""
        self.pieces[head] = self._pieces(embedding)
        self.names = {**self.names, head: head}

    def hold(self, name: str, tensor: Tensor | None) -> str:
        """Return a name for a tensor that is not the checkpoint's own; None: for the one of that name."""
        if tensor is None:
            self.pieces[f"{name}[copy]"] = self._pieces(name)
        else:
            self.held[f"{name}[copy]"] = tensor
        return f"{name}[copy]"

    def grid(self, name: str) -> Grid | None:
        """Return the steps in which a tensor is stored; None where it is stored as it is, or nothing tells."""
        pieces, schemes = self._pieces(name), self.store.schemes
        if name in self.held or name in self.folds or not all(self._has_steps(piece.name) for piece in pieces):
            return None

        def read(part: str, start: int, stop: int) -> Tensor:
            found = []
            for own, first, last in _cut(pieces, start, stop, self._stop):
                values = getattr(schemes[own], part)
                rows = values(first, last) if values else torch.zeros(1, 1)
                found.append(rows.expand(last - first, rows.shape[1]) if len(pieces) > 1 else rows)
            return found[0] if len(found) == 1 else torch.cat(found)

        shifted = any(schemes[piece.name].offset for piece in pieces)
        return Grid(partial(read, "step"), partial(read, "offset") if shifted else None)

    def _has_steps(self, name: str) -> bool:
        scheme = self.store.schemes.get(name)
        return scheme is not None and scheme.step is not None and code_dtype(self.store, name) in DTYPES

    def in_codes(self, name: str, grid: Grid | None) -> str:
        """Return a name for a weight in steps of the `grid` of another; None: for the codes stored for it."""
        self.coded[f"{name}[codes]"] = name, grid
        return f"{name}[codes]"

    def _codes(self, name: str, grid: Grid | None, start: int, stop: int) -> Tensor:
        schemes, pieces = self.store.schemes, self._pieces(name)
        if grid is None and all(schemes[piece.name].codes for piece in pieces):
            keys = {piece.name: schemes[piece.name].codes.removeprefix(self.store.prefix) for piece in pieces}
            runs = _cut(pieces, start, stop, self._stop)
            parts = [self.store.stored_rows(keys[own], first, last) for own, first, last in runs]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        steps = grid or self.grid(name)
        assert steps is not None
        found = steps.codes(self.rows(name, start, stop), start, stop)
        return found if grid else stored_as(found, code_dtype(self.store, self.owner(name)))

    def _code_dtype(self, name: str, grid: Grid | None) -> str:
        if f"{name}[codes]" not in self.coded or grid is not None:
            return "float32"
        return code_dtype(self.store, self.owner(name))

    def owner(self, name: str) -> str:
        """Return the tensor that `name` is, or is cut from."""
        first = self._pieces(name.partition("[")[0])[0].name
        return self.folds.get(first, first)

    def folded(self, name: str) -> str:
        """Return a name for the matrices of a tensor [experts, rows, columns], one below the other."""
        self.folds[f"{name}[*]"] = name
        return f"{name}[*]"

    def stack(self, name: str, tensors: Sequence[str]) -> str:
        """Return a name for several tensors, one below the other."""
        self.pieces[name] = tuple(piece for tensor in tensors for piece in self._pieces(tensor))
        self.names = {**self.names, name: name}
        return name

    def covered(self, name: str) -> Iterator[tuple[str, tuple[int, int] | None]]:
        """Yield the tensors of which `name` has rows, and which; None: all. Rows of an expert count as the expert."""
        if name in self.names:
            yield name, None
        for tensor, start, stop in self._pieces(self.folds.get(name, name)):
            whole = self.folds.get(tensor, tensor)
            height = 1 if whole == tensor else self.info(whole).shape[1]
            yield whole, None if stop is None else (start // height, -(-stop // height))

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        if name in self.folds:
            return self._unfolded(self.folds[name], start, stop)
        return self.store.rows(name, start, stop)

    def _whole_info(self, piece: Piece) -> TensorInfo:
        return self.info(piece.name) if piece.name in self.folds else self.store.info(piece.name)

    def _unfolded(self, name: str, start: int, stop: int) -> Tensor:
        height, width = self.info(name).shape[1:]
        first = start // height
        whole = self.rows(name, first, -(-stop // height)).reshape(-1, width)
        return whole[start - first * height : stop - first * height]

    def quantised(self, name: str) -> str | None:
        """Name how a weight is stored, None when its numbers are the weights."""
        return self.store.quantised(self.owner(name)) if name not in self.held else None

    def unreadable(self, name: str) -> str | None:
        """Say why the real weight cannot be had; None when it can."""
        return self.store.unreadable(self.owner(name)) if name not in self.held else None

    def _pieces(self, name: str) -> tuple[Piece, ...]:
        return self.pieces.get(name) or (Piece(name),)

    def _stop(self, piece: Piece) -> int:
        return (*self._whole_info(piece).shape, 1)[0] if piece.stop is None else piece.stop


def _listed(store: Checkpoint) -> dict[str, str]:
    """Return the tensors of a checkpoint by name: real weights, without the scales and codes behind them."""
    names = [name for name in store.names if name not in store.owned]
    return {name: name for name in dict.fromkeys([*names, *store.schemes])}


def _is_whole(module: LoraModule) -> bool:
    """Tell whether a module may have another shape than the layer of its name: it replaces it, or has a vocabulary."""
    return not module.rank or module.variant == "embedding" or bool(TIED.search(f".{module.name}{_WEIGHT}"))


def _cut(pieces: Iterable[Piece], start: int, stop: int, end: Callable[[Piece], int]) -> Iterator[tuple[str, int, int]]:
    """Yield the pieces that rows [start, stop) of what they stack lie in."""
    at = 0
    for piece in pieces:
        last = end(piece)
        height = last - piece.start
        first, final = max(start - at, 0), min(stop - at, height)
        if first < final:
            yield piece.name, piece.start + first, piece.start + final
        at += height


def _with(adapter: LoraAdapter, modules: Mapping[str, LoraModule]) -> LoraAdapter:
    return replace(adapter, modules=modules)
