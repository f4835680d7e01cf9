"""ΔW A^T and |ΔW|^2 of one layer, a chunk of rows at a time, in the arithmetic in which this processor is quickest."""

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
_DEVICE_BYTES = 1 << 26  # of one chunk in 16 bits on another device, whose calls cost more than its memory
_TRIAL = (64, 2048, 32)  # rows, columns, rank: some milliseconds


class Passed(NamedTuple):
    """ΔW A^T: [rows, r], and |ΔW|^2 of every row: [rows], NaN or infinite where a weight is; both in float32."""

    products: Tensor
    energies: Tensor


def row_products(before: Rows, after: Rows, right: Tensor, *, rows: int, bfloat16: bool, device: str = "cpu") -> Passed:
    """Return (after - before) @ right^T and the sums of squares of after - before; right: [r, columns].

    `bfloat16` says that the weights after are stored so: those before are then rounded first, and the product is made
    in bfloat16 where that is quicker. On another `device` than the processor it always is.
    """
    if device != "cpu":
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        return _in_one_dtype(before, after, right, _spans(rows, right.shape[1], _DEVICE_BYTES), dtype, device)
    if bfloat16 and bfloat16_is_quicker():
        return _in_one_dtype(before, after, right, _spans(rows, right.shape[1], _NARROW_BYTES), torch.bfloat16, "cpu")
    return _in_float32(before, after, right, _spans(rows, right.shape[1], _CHUNK_BYTES), rounded=bfloat16)


def _spans(rows: int, columns: int, size: int) -> list[tuple[int, int]]:
    """Return runs of rows of at most `size` bytes each in 16 bits."""
    step = max(1, size // (2 * columns))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _in_one_dtype(
    before: Rows, after: Rows, right: Tensor, spans: list[tuple[int, int]], dtype: torch.dtype, device: str
) -> Passed:
    """Make the change of each chunk in one buffer: fresh memory costs as much as the product."""
    turned = right.to(device, dtype).t()
    change = torch.empty(spans[0][1], right.shape[1], dtype=dtype, device=device)
    seen, energies = (torch.empty(spans[-1][1], *size, device=device) for size in ((right.shape[0],), ()))
    for start, stop in spans:
        part = change[: stop - start]
        torch.sub(after(start, stop).to(device, dtype), before(start, stop).to(device, dtype), out=part)
        seen[start:stop], energies[start:stop] = part @ turned, _squares(part)
    return Passed(seen.cpu(), energies.cpu())


def _squares(change: Tensor) -> Tensor:
    """Return |ΔW|^2 of rows, to the precision of their dtype: half the time of asking for float32."""
    norms: Tensor = torch.linalg.vector_norm(change, dim=1)
    return norms.float().square()


def _in_float32(before: Rows, after: Rows, right: Tensor, spans: list[tuple[int, int]], *, rounded: bool) -> Passed:
    """Convert each chunk into buffers that are used again."""
    turned = right.float().t().contiguous()
    change, old = (torch.empty(spans[0][1], right.shape[1]) for _ in range(2))
    seen, energies = torch.empty(spans[-1][1], right.shape[0]), torch.empty(spans[-1][1])
    for start, stop in spans:
        count = stop - start
        first = before(start, stop)
        old[:count].copy_(first.bfloat16() if rounded else first)
        torch.mm(change[:count].copy_(after(start, stop)).sub_(old[:count]), turned, out=seen[start:stop])
        energies[start:stop] = _squares(change[:count])
    return Passed(seen, energies)


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
