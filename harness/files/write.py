"""Write LoRA weights in any format, so that the loaders of that format read them."""

from __future__ import annotations

import json
import math
import os
import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.files.adapter import LoraWeights
from harness.files.config import build
from harness.files.format import CONFIG_NAME, HEADER_KEY, WEIGHTS_NAME, Format
from harness.files.formats import FORMATS
from harness.files.keys import PAIRS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KeyOrder = Sequence[int] | random.Random | None
_DTYPES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_PEFT_FIELDS = {
    "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True, "bias": "none",
    "lora_dropout": 0.0, "fan_in_fan_out": False, "modules_to_save": None, "use_dora": False,
}  # fmt: skip


def write_lora(
    path: Path | str,
    format: str,
    modules: Mapping[str, LoraWeights],
    *,
    rslora: bool = False,
    key_order: KeyOrder = None,
    dtype: torch.dtype | None = None,
    prefix: str | None = None,
    pair: str | None = None,
) -> Path:
    """Write `modules` (model names with dots -> weights) and return what a loader gets.

    For `peft` that is the folder `path`; for every other format the file `path`, with `.safetensors` appended when it
    is missing. A is [r, in], B is [out, r]; `dtype` converts both, alpha is always stored in float32 or as JSON.
    Without alpha (None): `peft` refuses, because its configuration always has one; `diffusers` writes no metadata
    when no module has one, and alpha = rank for those without when some have; the others write no `.alpha`.
    Formats that have no flag for `rslora` store alpha * sqrt(rank), as LyCORIS does, so that alpha / rank is right.
    `key_order` is a permutation of the keys or a random generator that draws one; the data is laid out in that order.
    `prefix` replaces the format's own (such as `transformer.`), `pair` the spelling of the halves (see `keys.PAIRS`).

    Raises:
        ValueError: an argument that cannot be written, named with its value.
    """
    row = _row(format, modules, pair)
    prefix = row.write_prefix if prefix is None else prefix
    home = row.alpha[0]
    if rslora and home == "tensor":
        modules = {name: _with_root(weights) for name, weights in modules.items()}
    tensors = _tensors(row, prefix, modules, pair or row.pairs[0], dtype)
    metadata = dict(row.metadata)
    config = _config(row, modules, rslora)
    if config and home == "header":
        metadata[HEADER_KEY] = json.dumps({f"{prefix}{k}": v for k, v in config.items()}, indent=2, sort_keys=True)
    return _save(Path(path), row, _ordered(tensors, key_order), metadata, config)


def _row(format: str, modules: Mapping[str, LoraWeights], pair: str | None) -> Format:
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown, known are {', '.join(FORMATS)}")
    row = FORMATS[format]
    if not modules:
        raise ValueError("modules is empty, at least one module is needed")
    if pair is not None and pair not in row.pairs:
        raise ValueError(f"pair={pair!r} is not written by {format}, it has {', '.join(row.pairs)}")
    for name, weights in modules.items():
        _refuse(name, weights)
    missing = [name for name, weights in modules.items() if weights.alpha is None]
    if row.folder and missing:
        raise ValueError(f"modules[{missing[0]!r}].alpha=None: a {format} configuration always has an alpha")
    return row


def _refuse(name: str, weights: LoraWeights) -> None:
    a, b = tuple(weights.a.shape), tuple(weights.b.shape)
    if not name:
        raise ValueError("a module name is empty")
    if len(a) < 2 or len(b) < 2 or a[0] != b[1] or 0 in a or 0 in b:
        raise ValueError(f"modules[{name!r}]: a {list(a)} and b {list(b)} are no pair [r, in], [out, r]")


def _with_root(weights: LoraWeights) -> LoraWeights:
    return weights if weights.alpha is None else replace(weights, alpha=weights.alpha * math.sqrt(weights.rank))


def _tensors(
    row: Format, prefix: str, modules: Mapping[str, LoraWeights], pair: str, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    import torch

    down, up = (tail.replace("*", "default") for tail in PAIRS[pair])
    tensors: dict[str, Tensor] = {}
    for name, weights in modules.items():
        stem = prefix + (name.replace(".", "_") if row.flattened else name)
        if f"{stem}.{down}" in tensors:
            raise ValueError(f"modules[{name!r}]: another name flattens to {stem!r} too")
        tensors[f"{stem}.{down}"] = weights.a.to(dtype=dtype)
        tensors[f"{stem}.{up}"] = weights.b.to(dtype=dtype)
        if row.alpha[0] == "tensor" and weights.alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(float(weights.alpha), dtype=torch.float32)
    return tensors


def _config(row: Format, modules: Mapping[str, LoraWeights], rslora: bool) -> dict[str, Any]:
    alphas = {name: weights.alpha for name, weights in modules.items() if weights.alpha is not None}
    if row.alpha[0] == "tensor" or not alphas:
        return {}
    ranks = {name: weights.rank for name, weights in modules.items()}
    neutral = {name: math.sqrt(rank) if rslora else float(rank) for name, rank in ranks.items()}
    config = build(ranks, {**neutral, **alphas}, rslora=rslora)
    return {**_PEFT_FIELDS, **config} if row.folder else config


def _ordered(tensors: dict[str, Tensor], order: KeyOrder) -> dict[str, Tensor]:
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


def _save(path: Path, row: Format, tensors: dict[str, Tensor], metadata: dict[str, str], config: Any) -> Path:
    target = path / WEIGHTS_NAME if row.folder else _with_suffix(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, serialize(tensors, metadata))
    if row.folder:
        replace_file(path / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
    return path if row.folder else target


def _with_suffix(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")


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
