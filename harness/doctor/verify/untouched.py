"""The tensors that a LoRA does not name: they must be what they were, as far as conversions leave them so."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from harness.doctor.checkpoint import Checkpoint
from harness.doctor.verify.pairing import (
    EMA,
    WHOLE_BYTES,
    is_left_over,
    plain_name,
    same_tensor,
    unchanged,
)
from harness.doctor.verify.vote import half_step
from harness.doctor.verify.weights import TIED, Weights, code_dtype
from harness.text import count

_ROWS = 4
_STEP, _STEP_ROUNDED = 0.51, 2.0**-9  # steps, and per step from 0: the step is stored in 16 bits
_NEAR, _CLAMPED = 0.9, 2.0  # share of rows that lie as near, and steps that the last code may be off
_BUFFERS = re.compile(
    r"(?:inv_freq|position_ids|masked_bias|num_batches_tracked|\.attn\.bias|token_type_ids|original_inv_freq)$"
)
_COMPONENT = "the component "
_COMPONENTS = re.compile(
    r"(first_stage_model|cond_stage_model|conditioner|text_encoders?(?:_\d)?|vae|image_encoder|safety_checker)\."
)


@dataclass(frozen=True)
class Untouched:
    """What was compared: how many tensors, which changed, which only one side has; `notes` are right conversions.

    `broken` are those of `changed` that are NaN or infinite now. `left` are how many could not be compared: in a
    component that one side lacks, or stored as codes that are not read here.
    """

    compared: int
    changed: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    reshaped: tuple[str, ...]
    broken: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    left: int = 0

    @property
    def is_other_model(self) -> bool:
        """True when most tensors differ: the merge did not start from this base."""
        return self.compared > 1 and 2 * len(self.changed) > self.compared


Touched = Mapping[str, Sequence[tuple[int, int]] | None]  # rows of a tensor that the LoRA names; None: all of them


def compare_untouched(base: Weights, merged: Weights, touched: Touched, *, full: bool = False) -> Untouched:
    """Compare every tensor, or the rows of it, that is not in `touched`: a few rows of each, everything with `full`.

    A tensor stored in another dtype is unchanged when it is the base's rounded to that dtype, also by way of 16 bits. A
    vocabulary of another size is unchanged when the rows that both have are.
    """
    both = [name for name in base.names if name in merged.names and touched.get(name, ()) is not None]
    unread = {name: why for name in both if (why := base.unreadable(name) or merged.unreadable(name))}
    common = [name for name in both if name not in unread]
    resized = [name for name in common if _is_resized(base, merged, name)]
    fits = {name for name in common if base.info(name).shape == merged.info(name).shape or name in resized}
    others = [name for name in common if name in fits and not _BUFFERS.search(name)]
    changed = [
        name for name in others if _differs(base, merged, name, touched.get(name) or (), full=full or name in resized)
    ]
    changed = [name for name in changed if not _follows_tie(base, merged, name)]
    missing, gone = _split(base, merged, touched)
    extra, more, added = _split_extra(base, merged, touched)
    notes = [f"{why} left out: {count(times, 'tensor')}" for why, times in gone.items()]
    notes += [*more, *(f"{name}: {_rows_of(base, merged, name)}" for name in resized)]
    notes += [f"{count(times, 'tensor')} not compared: {why}" for why, times in Counter(unread.values()).items()]
    lacked = sum(times for why, times in gone.items() if why.startswith(_COMPONENT))
    closed = sorted(base.store.pickled | merged.store.pickled)
    notes += [f"{_COMPONENT}{name} not compared: a pickle, which is never opened" for name in closed]
    return Untouched(
        compared=len(others),
        changed=tuple(changed),
        missing=tuple(missing),
        extra=tuple(extra),
        reshaped=tuple(name for name in common if name not in fits),
        broken=tuple(name for name in changed if _is_broken(merged, name)),
        notes=tuple(notes),
        left=len(unread) + added + len(closed) + lacked,
    )


def _is_resized(base: Weights, merged: Weights, name: str) -> bool:
    first, second = base.info(name).shape, merged.info(name).shape
    return len(first) > 0 and first != second and first[1:] == second[1:] and bool(TIED.search(plain_name(name)))


def _rows_of(base: Weights, merged: Weights, name: str) -> str:
    first, second = base.info(name).shape[0], merged.info(name).shape[0]
    return f"{second} rows for {first}; those that both have are compared"


def _split(base: Weights, merged: Weights, touched: Touched) -> tuple[list[str], dict[str, int]]:
    """Return the tensors that the merged file lost, and how many there are of what it may leave out."""
    gone = [name for name in base.names if name not in merged.names and name not in touched]
    kept = {component_of(merged.store, name) for name in merged.names}
    why = {name: _left_out(base, merged, name, kept) for name in gone}
    return [name for name in gone if not why[name]], dict(Counter(filter(None, why.values())))


def _left_out(base: Weights, merged: Weights, name: str, kept: set[str]) -> str:
    """Say what a tensor is that a merged file may leave out; empty where it is missing."""
    if EMA.search(name):
        return "EMA weights"
    if _BUFFERS.search(name) or is_left_over(name):
        return "buffers"
    component = component_of(base.store, name)
    if component and component not in kept | merged.store.promised:
        return f"{_COMPONENT}{component}"
    return "tied weights" if _twin(base, name, base, merged) else ""


def _split_extra(base: Weights, merged: Weights, touched: Touched) -> tuple[list[str], list[str], int]:
    """Return the tensors that only the merged file has, in words those that may be there, and how many no base has."""
    more = [name for name in merged.names if name not in base.names and name not in touched]
    fine = [name for name in more if is_left_over(name) or _BUFFERS.search(name) or EMA.search(name)]
    tied = [
        name
        for name in more
        if name not in fine and (_twin(merged, name, merged, merged) or _twin(merged, name, base, base))
    ]
    notes = [f"only in the merged checkpoint, and no part of the model: {len(fine)} tensors"] if fine else []
    known = {component_of(base.store, name) for name in base.store.names} | {""}
    added = {name: part for name in more if (part := component_of(merged.store, name)) not in known}
    fine += added
    for part, times in Counter(added.values()).items():
        notes.append(f"{_COMPONENT}{part} is only in the merged checkpoint: {count(times, 'tensor')}, not compared")
    notes += [f"{name} is a copy of a weight that the model ties it to" for name in tied]
    return [name for name in more if name not in fine and name not in tied], notes, len(added)


def component_of(store: Checkpoint, name: str) -> str:
    """Return the component of a pipeline that a tensor belongs to by its name or folder, empty for the model itself."""
    key = store.names.get(name, name)
    found = _COMPONENTS.match(key) or _COMPONENTS.match(name)
    return store.folders.get(key) or (found[1] if found else "")


def _twin(store: Weights, name: str, other: Weights, among: Weights) -> str | None:
    """Return a tensor of `other`, whose name `among` has too, that an embedding or a head `name` equals bit by bit."""
    if not TIED.search(plain_name(name)):
        return None
    info = store.info(name)
    for twin in other.names:
        alike = twin != name and twin in among.names and bool(TIED.search(plain_name(twin)))
        if alike and other.info(twin).shape == info.shape and same_tensor(store, name, other, twin):
            return twin
    return None


def _follows_tie(base: Weights, merged: Weights, name: str) -> bool:
    """Tell whether a head changed because it is the embedding, in both checkpoints."""
    twin = _twin(base, name, base, merged)
    return (
        twin is not None
        and base.info(name).shape == merged.info(name).shape
        and same_tensor(merged, name, merged, twin)
    )


def _is_broken(store: Weights, name: str) -> bool:
    whole = store.rows(name, 0, (*store.info(name).shape, 1)[0])
    return not bool(torch.isfinite(whole if whole.dtype.itemsize > 1 else whole.float()).all())


def _differs(base: Weights, merged: Weights, name: str, without: Sequence[tuple[int, int]], *, full: bool) -> bool:
    info = base.info(name)
    rows = min((*info.shape, 1)[0], (*merged.info(name).shape, 1)[0])
    if rows == 0:
        return False
    size = max(1, (info.end - info.start) // max((*info.shape, 1)[0], 1))
    step = rows if info.end - info.start <= WHOLE_BYTES else max(1, WHOLE_BYTES * 16 // size) if full else 1
    starts = range(0, rows, step) if full or step == rows else [rows * part // _ROWS for part in range(_ROWS)]
    for start in starts:
        for run in _outside((start, min(start + step, rows)), without):
            if not unchanged(base.rows(name, *run), merged.rows(name, *run)) and not requantised(
                base, merged, name, run
            ):
                return True
    return False


def requantised(base: Weights, merged: Weights, name: str, run: tuple[int, int]) -> bool:
    """Tell whether rows are the base's in steps of the merged file, which stores them otherwise than the base.

    Where its steps are not known nothing is said against it.
    """
    scheme = merged.store.schemes.get(merged.owner(name))
    if scheme is None or base.quantised(name) == scheme.name:
        return False
    grid = merged.grid(name)
    if grid is None:
        return True
    before, after = (grid.codes(store.rows(name, *run), *run) for store in (base, merged))
    off, kind = (before - after).abs(), code_dtype(merged.store, merged.owner(name))
    if kind != "int8":
        half = torch.from_numpy(half_step(after.float().numpy(), kind))
        return bool((off <= 2 * _STEP * half).float().mean() >= _NEAR and (off <= 2 * _CLAMPED * half).all())
    near = off <= _STEP + after.abs() * _STEP_ROUNDED
    return bool(near.float().mean() >= _NEAR and off.max() <= _CLAMPED)


def _outside(run: tuple[int, int], without: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    at = run[0]
    for start, stop in sorted(without):
        if at < min(start, run[1]):
            yield at, min(start, run[1])
        at = max(at, stop)
    if at < run[1]:
        yield at, run[1]
