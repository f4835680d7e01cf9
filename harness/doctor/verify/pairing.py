"""Two checkpoints as one list of tensors, whatever their names, fusions and ties."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256

import torch
from torch import Tensor

from harness.doctor.checkpoint import Checkpoint
from harness.doctor.match import place
from harness.doctor.verify.weights import Piece, Weights
from harness.files import LoraAdapter, LoraModule
from harness.files.architectures import Shape
from harness.files.tensor_file import TensorFile, is_float

_WEIGHT, _BIAS = ".weight", ".bias"
WHOLE_BYTES = 1 << 16  # read completely up to this size
_MOST_COMPARED = 1 << 27  # elements
_BETWEEN = (torch.bfloat16, torch.float16)  # a base may have been loaded in before it was stored in another dtype
EMA = re.compile(r"(?:^|\.)(?:model_ema|ema_model|ema)\.")
_LEFT_OVER = re.compile(r"\.lora_\w+(?:\.|$)|\.original_module\.|\.ranknum\.")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|shared|word_embeddings)\.weight$")
_SAVED = re.compile(r"\.modules_to_save\.\w+(?=\.)|\.base_layer(?=\.)")


def paired(base: Checkpoint, merged: Checkpoint, adapters: Sequence[LoraAdapter]) -> tuple[Weights, Weights]:
    """Return both under the names of the base, as far as the merged one has what it names.

    A head that a model ties to its embedding is in neither, or in one of them: it is then the embedding.
    """
    before, after = _paired(base, merged)
    heads = [name for store in (before, after) for name in store.names if _HEAD.search(name)]
    modules = [module for adapter in adapters for module in adapter.modules.values()]
    named = any(_HEAD.search(f"{module.name}{_WEIGHT}") for module in modules)
    head = next(iter(heads), "lm_head.weight" if named else None)
    pairs = [next((name for name in store.names if _EMBEDDING.search(name)), None) for store in (before, after)]
    if head and pairs[0] and pairs[1]:
        for store, embedding, other in ((before, pairs[0], after), (after, pairs[1], before)):
            fits = head not in other.names or other.info(head).shape == store.info(embedding).shape
            tied = store is before or head not in before.names or same_tensor(before, head, before, pairs[0])
            if head not in store.names and fits and tied:
                store.tie(head, embedding)
    return before, after


def _paired(base: Checkpoint, merged: Checkpoint) -> tuple[Weights, Weights]:
    before, after = Weights.of(base), Weights.of(merged)
    found: dict[str, tuple[Piece, ...]] = {name: (Piece(name),) for name in before.names if name in after.names}
    used = set(found)
    lost = [name for name in before.names if name not in found]
    left = {plain_name(name): name for name in after.names if name not in used and not is_left_over(name)}
    for name in lost:
        if plain_name(name) in left and (own := left.pop(plain_name(name))):
            found[name] = (Piece(own),)
    used = {piece.name for pieces in found.values() for piece in pieces}
    lost = [name for name in lost if name not in found and not EMA.search(name)]
    rest = [name for name in after.names if name not in used and not is_left_over(name)]
    found |= _renamed(before, after, lost, rest) if lost and rest else {}
    found |= dict(_alike(before, after, [name for name in lost if name not in found], rest, found))
    used = {after.folds.get(piece.name, piece.name) for pieces in found.values() for piece in pieces}
    found |= {own: (Piece(own),) for own in after.names if own not in used and own not in found}
    groups = {name: before.info(name).shape[1] for name, pieces in found.items() if _stacks(before, name, pieces)}
    return before, Weights(merged, found, {name: name for name in found}, after.folds, groups)


def _stacks(before: Weights, name: str, pieces: Sequence[Piece]) -> bool:
    """Tell whether a merged file keeps one by one what the base stacks."""
    return len(pieces) > 1 and name in before.names and len(before.info(name).shape) == 3


def plain_name(name: str) -> str:
    """Return a name without what PEFT puts around a layer."""
    return _SAVED.sub("", name)


def is_left_over(name: str) -> bool:
    """Tell whether a tensor belongs to an adapter that was left in a checkpoint."""
    return bool(_LEFT_OVER.search(name))


def _renamed(before: Weights, after: Weights, lost: Sequence[str], rest: Sequence[str]) -> dict[str, tuple[Piece, ...]]:
    """Return where the merged file has the tensors that it calls otherwise: the layers of the base, as if a LoRA's."""
    modules = {}
    for name in lost:
        shape = before.info(name).shape
        stem = plain_name(name).removesuffix(_WEIGHT)
        experts, (rows, columns) = (shape[0], shape[1:]) if len(shape) == 3 else (1, (*shape, 0, 0)[:2])
        kind = "experts" if len(shape) == 3 else "set"
        modules[name] = LoraModule(stem, 0, columns, rows, None, False, "F32", {}, kind, experts=experts)
    layers = {plain_name(name).removesuffix(_WEIGHT): name for name in rest}
    shapes: dict[str, Shape | None] = {layer: after.info(name).shape for layer, name in layers.items()}
    file = TensorFile(before.path, {}, {}, 0)
    model = LoraAdapter(before.path, "peft", modules, {}, (), "none", False, file)
    found = {}
    for name, slots in place(model, shapes, {**before.store.config, **after.store.config}).slots.items():
        parts = sorted(slots, key=lambda slot: slot.part or (0, 0))
        found[name] = tuple(_piece(after, layers[slot.layer], slot.rows) for slot in parts)
    return found | dict(_biases(lost, found, after))


def _biases(
    lost: Sequence[str], found: Mapping[str, tuple[Piece, ...]], after: Weights
) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    """Yield where the biases are of layers whose weights have other names: they have the rows of the weights."""
    for name in (name for name in lost if name.endswith(_BIAS) and name not in found):
        weights = found.get(f"{name.removesuffix(_BIAS)}{_WEIGHT}", ())
        pieces = tuple(piece._replace(name=f"{piece.name.removesuffix(_WEIGHT)}{_BIAS}") for piece in weights)
        if pieces and all(piece.name in after.names for piece in pieces):
            yield name, pieces


def _alike(
    before: Weights, after: Weights, lost: Sequence[str], rest: Sequence[str], found: Mapping[str, tuple[Piece, ...]]
) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    """Yield what is no matrix, such as the weights of norms, that the merged file has under names no table knows."""
    used = {piece.name for pieces in found.values() for piece in pieces}
    same: dict[tuple[torch.dtype, bytes], list[str]] = {}
    shapes = {before.info(name).shape for name in lost}
    left = (name for name in rest if name not in used and after.info(name).shape in shapes)
    for name in (name for name in left if _is_no_matrix(after, name)):
        tensor = after.rows(name, 0, after.info(name).shape[0])
        same.setdefault((tensor.dtype, _digest(tensor)), []).append(name)
    dtypes = {dtype for dtype, _ in same}
    for name in (name for name in lost if dtypes and _is_no_matrix(before, name)):
        tensor = before.rows(name, 0, before.info(name).shape[0])
        ways = ((dtype, _digest(tensor.to(dtype))) for dtype in dtypes)
        if own := next(filter(None, (same.get(way) for way in ways)), None):
            yield name, (Piece(own.pop(0)),)


def _is_no_matrix(store: Weights, name: str) -> bool:
    info = store.info(name)
    return len(info.shape) not in (0, 2) and info.elements <= _MOST_COMPARED and is_float(info.dtype)


def _digest(tensor: Tensor) -> bytes:
    return sha256(_bits(tensor).numpy().tobytes()).digest()


def _piece(store: Weights, tensor: str, rows: tuple[int, int] | None) -> Piece:
    """Return some rows of a tensor, of the matrices of experts one below the other."""
    if rows is None:
        return Piece(tensor)
    return Piece(store.folded(tensor) if len(store.info(tensor).shape) > 2 else tensor, *rows)


def same_tensor(first: Weights, name: str, second: Weights, other: str) -> bool:
    """Tell whether two tensors hold the same numbers, read in chunks."""
    rows = first.info(name).shape[0]
    step = max(1, WHOLE_BYTES * 16 // max(1, (first.info(name).end - first.info(name).start) // max(rows, 1)))
    runs = ((start, min(start + step, rows)) for start in range(0, rows, step))
    return all(unchanged(second.rows(other, *run), first.rows(name, *run)) for run in runs)


def unchanged(before: Tensor, after: Tensor) -> bool:
    """Tell whether rows are those of the base in the dtype of the merge, also by way of a type of 16 bits."""
    ways = [before.to(after.dtype)]
    if after.dtype != before.dtype:
        ways += [before.to(between).to(after.dtype) for between in _BETWEEN]
    return any(torch.equal(_bits(way), _bits(after)) for way in ways)


def _bits(tensor: Tensor) -> Tensor:
    """View the numbers as bytes, so that NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)
