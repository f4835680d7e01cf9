"""<ΔW, B A> as <ΔW A^T, B>, and |ΔW|^2, of every row of one layer, in the arithmetic in which it is quickest here."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

Rows = Callable[[int, int], Tensor]  # rows [start, stop) of a weight, as stored; they hold until the next call

_CHUNK_BYTES = 1 << 20  # of one chunk in 16 bits: fits the cache with everything that is computed from it in 32
_NARROW_BYTES = 1 << 21  # of one chunk that stays in 16 bits
_DEVICE_BYTES = 1 << 28  # of one chunk in 16 bits on another device: most layers in one, since its calls cost most
_TRIAL = (64, 2048, 32)  # rows, columns, rank: some milliseconds


class Passed(NamedTuple):
    """<ΔW A^T, B> and |ΔW|^2 of every row, NaN or infinite where a weight is: [rows] each, in float32."""

    overlaps: Tensor
    energies: Tensor


def row_products(
    before: Rows, after: Rows, left: Tensor, right: Tensor, *, bfloat16: bool, device: str = "cpu"
) -> Passed:
    """Return those of after - before; left: [rows, r], right: [r, columns].

    `bfloat16` says that the weights after are stored so: those before are then rounded first, and ΔW A^T is made in
    bfloat16 where that is quicker. On another `device` than the processor it always is.
    """
    if device != "cpu":
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        return _in_one_dtype(before, after, left, right, _spans(left, right, _DEVICE_BYTES), dtype, device)
    if bfloat16 and bfloat16_is_quicker():
        return _in_one_dtype(before, after, left, right, _spans(left, right, _NARROW_BYTES), torch.bfloat16, "cpu")
    return _in_float32(before, after, left, right, _spans(left, right, _CHUNK_BYTES), rounded=bfloat16)


def _spans(left: Tensor, right: Tensor, size: int) -> list[tuple[int, int]]:
    """Return runs of rows of at most `size` bytes each in 16 bits."""
    rows, step = len(left), max(1, size // (2 * right.shape[1]))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _in_one_dtype(
    before: Rows, after: Rows, left: Tensor, right: Tensor, spans: list[tuple[int, int]], dtype: torch.dtype,
    device: str,
) -> Passed:  # fmt: skip
    """Make the change of each chunk in one buffer: fresh memory costs as much as the product."""
    turned = right.to(device, dtype).t()
    change, seen, norms = (torch.empty(size, dtype=dtype, device=device) for size in (
        (spans[0][1], right.shape[1]), left.shape, (len(left),)
    ))  # fmt: skip
    for start, stop in spans:
        part = change[: stop - start]
        torch.sub(after(start, stop).to(device, dtype), before(start, stop).to(device, dtype), out=part)
        torch.mm(part, turned, out=seen[start:stop])
        torch.linalg.vector_norm(part, dim=1, out=norms[start:stop])
    overlaps = torch.linalg.vecdot(seen.float(), left.to(device).float())
    return Passed(*torch.stack([overlaps, norms.float().square()]).cpu())


def _in_float32(
    before: Rows, after: Rows, left: Tensor, right: Tensor, spans: list[tuple[int, int]], *, rounded: bool
) -> Passed:
    """Convert each chunk into buffers that are used again."""
    turned = right.float().t().contiguous()
    change, old = (torch.empty(spans[0][1], right.shape[1]) for _ in range(2))
    seen, norms = torch.empty(left.shape), torch.empty(len(left))
    for start, stop in spans:
        count = stop - start
        first = before(start, stop)
        old[:count].copy_(first.bfloat16() if rounded else first)
        torch.mm(change[:count].copy_(after(start, stop)).sub_(old[:count]), turned, out=seen[start:stop])
        torch.linalg.vector_norm(change[:count], dim=1, out=norms[start:stop])
    return Passed(torch.linalg.vecdot(seen, left.float()), norms.square())


@cache
def bfloat16_is_quicker() -> bool:
    """Tell by trying whether a product of bfloat16 takes less time here than converting to float32 first.

    With instructions for it the product is about twice as quick, without them 15 to 50 times slower.
    """
    rows, columns, rank = _TRIAL
    wide, narrow = torch.ones(rows, columns, dtype=torch.bfloat16), torch.ones(columns, rank, dtype=torch.bfloat16)
    single = narrow.float()
    return _seconds(lambda: wide @ narrow) < _seconds(lambda: wide.float() @ single)


def _seconds(work: Callable[[], Tensor]) -> float:
    """Return the least of three times after one that warms up."""
    work()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
