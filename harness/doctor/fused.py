"""Split layers stacked into a merged one: B: [out, n * r] whose off-diagonal blocks are exactly zero."""

from __future__ import annotations

from harness.files import LoraAdapter, LoraModule

_BLOCKS = (3, 4)  # q, k, v and, in FLUX's single blocks, the MLP


def block_diagonal(adapter: LoraAdapter, module: LoraModule) -> int | None:
    """Return the number of blocks of B when its first and last rows say it is block-diagonal, else None.

    Reads two rows from the file, as bytes: no torch. Blocks of rows may differ in height, blocks of columns may not.
    """
    if "B" not in module.keys or module.kernel or not any(module.rank % n == 0 for n in _BLOCKS):
        return None
    first, last = _row(adapter, module, 0), _row(adapter, module, module.out_features - 1)
    for blocks in _BLOCKS:
        width = len(first) // blocks
        if module.rank % blocks == 0 and _only(first, 0, width) and _only(last, len(last) - width, len(last)):
            return blocks
    return None


def _row(adapter: LoraAdapter, module: LoraModule, index: int) -> bytes:
    info = adapter.file.tensors[module.keys["B"]]
    width = (info.end - info.start) // module.out_features
    with adapter.file.path.open("rb") as stream:
        stream.seek(info.start + index * width)
        return stream.read(width)


def _only(row: bytes, start: int, end: int) -> bool:
    """Tell whether `row` is non-zero somewhere in [start, end) and zero everywhere else."""
    return any(row[start:end]) and not any(row[:start]) and not any(row[end:])
