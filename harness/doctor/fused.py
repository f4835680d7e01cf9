"""Split layers stacked into a merged one: B: [out, n * r] whose off-diagonal blocks are exactly zero."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import FileIO

from harness.files import LoraAdapter, LoraModule, TensorInfo

_BLOCKS = (3, 4)  # q, k, v and, in FLUX's single blocks, the MLP


def block_diagonal(adapter: LoraAdapter) -> Iterator[tuple[str, int]]:
    """Yield (module, number of blocks) where the first and last rows of B say that it is block-diagonal.

    Reads one or two rows of each module from the file, as bytes: no torch. Blocks of rows may differ in height, blocks
    of columns may not.
    """
    able = [name for name, module in adapter.modules.items() if _divides(module)]
    if not able:
        return
    with adapter.file.path.open("rb", buffering=0) as stream:
        for name in able:
            info = adapter.file.tensors[adapter.modules[name].keys["B"]]
            if len(info.shape) == 2 and 0 not in info.shape and (blocks := _blocks(stream, info)):
                yield name, blocks


def _divides(module: LoraModule) -> bool:
    plain = "B" in module.keys and not module.kernel and "B" not in module.flipped
    return plain and 0 in [module.rank % blocks for blocks in _BLOCKS]


def _blocks(stream: FileIO, info: TensorInfo) -> int | None:
    _, (rows, columns), start, end = info
    width = (end - start) // rows
    first = _row(stream, start, width)
    for blocks in (n for n in _BLOCKS if columns % n == 0 and _only(first, 0, width // n)):
        if _only(_row(stream, end - width, width), width - width // blocks, width):
            return blocks
    return None


def _row(stream: FileIO, start: int, width: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(stream.fileno(), width, start)
    stream.seek(start)
    return stream.read(width)


def _only(row: bytes, start: int, end: int) -> bool:
    """Tell whether `row` is non-zero somewhere in [start, end) and zero everywhere else."""
    return not any(row[end:]) and not any(row[:start]) and any(row[start:end])
