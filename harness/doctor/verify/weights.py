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

from harness.doctor.architectures import Shape
from harness.doctor.checkpoint import Checkpoint
from harness.doctor.match import Placement, place
from harness.doctor.quantised import Rows
from harness.errors import LoraFileError
from harness.files import LoraAdapter, LoraModule, TensorInfo
from harness.files.tensor_file import is_float

_WEIGHT = ".weight"
TIED = re.compile(
    r"(?:lm_head|embed_out|output|head|embed_tokens|wte|shared|word_embeddings|tok_embeddings|decoder)\.weight$"
)


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
    coded: dict[str, tuple[str, Rows | None]] = field(default_factory=dict)

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
            if name.endswith(_WEIGHT):
                found[self.store.prefix + name.removesuffix(_WEIGHT)] = name
            elif len(self.info(name).shape) > 2:
                found[self.store.prefix + name] = name
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
        first = place(_with(adapter, low), shapes)
        second = place(_with(adapter, whole), dict.fromkeys(shapes)) if whole else first
        return Placement(
            {**first.slots, **second.slots},
            tuple(dict.fromkeys((*first.missing, *second.missing))),
            {**first.ambiguous, **second.ambiguous},
            {**first.misfits, **second.misfits},
            first.replaced or second.replaced,
            first.families or second.families,
        )

    def slice(self, name: str, rows: tuple[int, int]) -> str:
        """Return a name for some rows of a tensor."""
        found = f"{name}[{rows[0]}:{rows[1]}]"
        self.pieces[found] = tuple(Piece(*cut) for cut in _cut(self._pieces(name), *rows, self._stop))
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
            return self.held[name][start:stop].flatten(1)
        if name in self.coded:
            own, step = self.coded[name]
            key = self.store.schemes[own].codes.removeprefix(self.store.prefix) if step is None else ""
            return (
                self.store.stored_rows(key, start, stop)
                if step is None
                else self.rows(own, start, stop) / step(start, stop)
            )
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

    def in_codes(self, name: str, step: Rows | None) -> str:
        """Return a name for a weight divided by the scales `step` of each row; None: for the codes stored for it."""
        self.coded[f"{name}[codes]"] = name, step
        return f"{name}[codes]"

    def _code_dtype(self, name: str, step: Rows | None) -> str:
        if f"{name}[codes]" not in self.coded or step is not None:
            return "float32"
        return self.store.dtype(self.store.schemes[name].codes.removeprefix(self.store.prefix))

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
