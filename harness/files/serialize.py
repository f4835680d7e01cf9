"""Bytes on disk: tensors in the order that is asked for, moved into place whole."""

from __future__ import annotations

import json
import os
import random
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

KeyOrder = Sequence[int] | random.Random | None
_DTYPES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


def ordered(tensors: dict[str, Tensor], order: KeyOrder) -> dict[str, Tensor]:
    """Return the tensors sorted by name, or in the permutation `order`, or in one drawn from a random generator.

    Raises:
        ValueError: `order` is no permutation of the keys.
    """
    if order is None:
        return dict(sorted(tensors.items()))
    keys = list(tensors)
    if isinstance(order, random.Random):
        places = list(range(len(keys)))
        order.shuffle(places)
    else:
        places = list(order)
    if sorted(places) != list(range(len(keys))):
        raise ValueError(f"key_order={places!r} is no permutation of the {len(keys)} keys")
    return {keys[place]: tensors[keys[place]] for place in places}


def replace_file(target: Path, content: bytes) -> None:
    """Write beside `target`, then move it there, so that readers see the old file or the whole new one."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file whose data lies in the order of `tensors`; safetensors' own writer sorts by name.

    Loaders see keys in the order of the data. Wider dtypes still go first, as there, because memory-mapping wants
    every tensor at a multiple of its element size.

    Raises:
        ValueError: a dtype that LoRA files do not have.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    blocks: list[bytes] = []
    at = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        blocks.append(_bytes(tensor))
        end = at + len(blocks[-1])
        header[key] = {"dtype": _dtype(tensor), "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *blocks])


def _dtype(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype={tensor.dtype} is not written, known are {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _bytes(tensor: Tensor) -> bytes:
    import torch

    raw: bytes = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return raw
