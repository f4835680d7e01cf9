"""How quantised weights are stored, and the real weight behind them: one view per layer, rows only on demand.

A scheme is recognised by the tensors beside a weight, as their writers name them. What cannot be dequantised here has a
scheme as well, which says so by name: its codes are never taken for weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.files import TensorInfo
from harness.text import parse_json

Read = Callable[[str, int, int], Tensor]  # key, first row, end -> rows as stored, with their other dimensions
Rows = Callable[[int, int], Tensor]
_WEIGHT = ".weight"
_CODES = ("F8_E4M3", "F8_E5M2", "I8")
_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
_IDLE = (".input_scale", ".scale_input", ".output_scale", ".input_activation_scale", ".comfy_quant", ".weight_format")
_GROUPS, _BITS = (32, 64, 128), (2, 3, 4, 5, 6, 8)
_LARGEST_STATE = 4096  # bytes of bitsandbytes' JSON
TABLES: Mapping[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ),
    "fp4": (
        -1.0, -2 / 3, -0.5, -1 / 3, -0.25, -1 / 6, -1 / 192, 0.0, 0.0, 1 / 192, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1.0,
    ),
}  # fmt: skip
"""The numbers of 4-bit codes, in order, in shares of the largest of their block."""


@dataclass(frozen=True)
class StorageScheme:
    """How the weight of one layer is stored.

    `shape` is that of the real weight, empty when it is not known. `owned` are the keys that belong to it: codes,
    scales, zero points. `rows` returns rows [start, stop) of the real weight as float32 [rows, in]; without it `why`
    says what stands in the way. `step`, where the real weights are the numbers of `codes`, times it, plus `offset`,
    returns the scales of these rows, [rows or 1, in or 1], `offset` likewise; `codes` is the key of those numbers,
    empty where they are packed: `table` then names what they are, whole numbers where it is empty.
    """

    name: str
    shape: tuple[int, ...]
    owned: tuple[str, ...]
    rows: Rows | None = None
    step: Rows | None = None
    codes: str = ""
    offset: Rows | None = None
    table: str = ""
    why: str = ""


@dataclass(frozen=True)
class Tensors:
    """The tensors of a checkpoint: what the header says of each, how rows are read, and the model's configuration."""

    infos: Mapping[str, TensorInfo]
    read: Read
    config: Mapping[str, Any]

    def whole(self, key: str) -> Tensor:
        """Return a small tensor, as stored."""
        shape = self.infos[key].shape
        return self.read(key, 0, shape[0] if shape else 1)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor, empty when there is none."""
        return self.infos[key].shape if key in self.infos else ()

    def there(self, stem: str, *tails: str) -> tuple[str, ...]:
        """Return the keys `<stem><tail>` that exist."""
        return tuple(stem + tail for tail in tails if stem + tail in self.infos)


def schemes(tensors: Tensors) -> dict[str, StorageScheme]:
    """Return {name of a layer's weight: how it is stored} for every quantised layer.

    The name ends in `.weight`, also where the file spells the codes in another way (`.qweight`).

    Raises:
        ValueError: the description of a layer cannot be read.
    """
    found: dict[str, StorageScheme] = {}
    for key in tensors.infos:
        for tail, recognise in _KINDS:
            if key.endswith(tail) and (scheme := recognise(tensors, key.removesuffix(tail))):
                found.setdefault(*scheme)
                break
    return found


def idle(keys: Mapping[str, Any]) -> frozenset[str]:
    """Return the keys that only mark a file as quantised or serve activations: neither a layer's nor a weight's."""
    return frozenset(key for key in keys if key.endswith(_IDLE) or key.rpartition(".")[2] == "scaled_fp8")


Found = tuple[str, StorageScheme] | None


def _scaled(tensors: Tensors, stem: str) -> Found:
    """Codes of fp8 or int8 times a scale: of the tensor, of each row or column, or of square blocks.

    W = code * scale (ComfyUI's `scale_weight`; `weight_scale` of compressed-tensors; DeepSeek's `weight_scale_inv`,
    which is multiplied all the same). A zero point is subtracted from the code first.
    """
    codes, scale = stem + _WEIGHT, next(iter(tensors.there(stem, *_SCALES)), "")
    info = tensors.infos[codes]
    if not scale or info.dtype not in _CODES:
        return None
    shape, zero = info.shape, next(iter(tensors.there(stem, ".weight_zero_point")), "")
    owned = (codes, scale, *tensors.there(stem, ".weight_zero_point", ".weight_shape"))
    name = f"scaled {'int8' if info.dtype == 'I8' else 'fp8'}"
    spread = _spread(shape, tensors.shape(scale))
    if spread is None:
        return codes, StorageScheme(
            name, shape, owned, why=f"the shape of {scale.rpartition('.')[2]} fits no known layout"
        )
    factors = partial(_factors, tensors, scale, spread)

    def step(start: int, stop: int) -> Tensor:
        return factors(start, stop)[:, : math.prod(shape[1:])]

    def rows(start: int, stop: int) -> Tensor:
        code = tensors.read(codes, start, stop).flatten(1).float()
        code = code - _factors(tensors, zero, spread, start, stop) if zero else code
        return code * step(start, stop)

    return codes, StorageScheme(name, shape, owned, rows, None if zero else step, codes)


Spread = tuple[int, int]  # rows and columns that share a scale; 0: all of them


def _spread(shape: tuple[int, ...], scale: tuple[int, ...]) -> Spread | None:
    """Return how many rows and columns share one scale, None when the shapes do not say."""
    if math.prod(scale) == 1:
        return 0, 0
    if len(shape) < 2 or not scale:
        return None
    rows, columns = shape[0], math.prod(shape[1:])
    high, wide = scale[0], math.prod(scale[1:])
    if (high, wide) == (rows, 1):
        return 1, 0
    side = next((side for side in (128, 64, 32, 16) if (high, wide) == (-(-rows // side), -(-columns // side))), 0)
    if side:
        return side, side
    group = columns // wide if high == rows and wide and columns % wide == 0 else 0
    return (1, group) if group else None


def _factors(tensors: Tensors, key: str, spread: Spread, start: int, stop: int) -> Tensor:
    """Return the scales of rows [start, stop), each as often as it is used: [rows or 1, columns or 1]."""
    high, wide = spread
    if not high:
        return tensors.whole(key).float().reshape(1, 1)
    first = start // high
    part = tensors.read(key, first, -(-stop // high)).float().reshape(-(-stop // high) - first, -1)
    tall = part.repeat_interleave(high, 0)[start - first * high : stop - first * high]
    return tall.repeat_interleave(wide, 1) if wide else tall


def _bnb8(tensors: Tensors, stem: str) -> Found:
    """bitsandbytes LLM.int8(): W = code * SCB / 127, SCB [out] the absolute maxima of the rows."""
    codes = stem + _WEIGHT
    if codes not in tensors.infos or tensors.infos[codes].dtype != "I8":
        return None
    shape, owned = tensors.shape(codes), (codes, *tensors.there(stem, ".SCB", ".weight_format"))
    if math.prod(tensors.shape(f"{stem}.SCB")) != shape[0]:
        return codes, StorageScheme("bitsandbytes int8", shape, owned, why="SCB has not one number per row")

    def step(start: int, stop: int) -> Tensor:
        return tensors.read(f"{stem}.SCB", start, stop).float().reshape(-1, 1) / 127.0

    def rows(start: int, stop: int) -> Tensor:
        return tensors.read(codes, start, stop).float() * step(start, stop)

    return codes, StorageScheme("bitsandbytes int8", shape, owned, rows, step, codes)


def _bnb4(tensors: Tensors, stem: str) -> Found:
    """bitsandbytes nf4 and fp4: W = quant_map[code] * absmax of its block, two codes a byte, first the high half.

    With double quantisation absmax = nested_quant_map[code] * nested_absmax of its block + nested_offset.
    """
    marker = f"{stem}.quant_state.bitsandbytes__"
    state = next((f"{marker}{kind}" for kind in ("nf4", "fp4") if f"{marker}{kind}" in tensors.infos), "")
    if not state or stem not in tensors.infos:
        return None
    said = _state(tensors, state)
    shape = tuple(int(side) for side in said["shape"])
    if not _bnb4_fits(tensors, stem, said, math.prod(shape)):
        raise ValueError(f"{state} describes another layer than {stem} holds")
    tails = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
    owned, kind = (stem, state, *tensors.there(stem, *tails)), str(said["quant_type"])
    rows, maxima = (partial(part, tensors, stem, said) for part in (_bnb4_rows, _bnb4_maxima))
    known = kind in TABLES and np.allclose(np.sort(tensors.whole(f"{stem}.quant_map").float()), TABLES[kind], atol=1e-3)
    return stem, StorageScheme(f"bitsandbytes {kind}", shape, owned, rows, maxima if known else None, table=kind)


def _state(tensors: Tensors, key: str) -> Mapping[str, Any]:
    if tensors.infos[key].elements > _LARGEST_STATE:
        raise ValueError(f"{key} is no description of a layer")
    said = parse_json(bytes(tensors.whole(key).flatten().tolist()))
    if not isinstance(said, dict):
        raise ValueError(f"{key} is no description of a layer")
    said = {"quant_type": "4-bit", "nested_blocksize": 256, "nested_offset": 0.0, **said}
    sides = said.get("shape")
    numbers = [said.get("blocksize"), said["nested_blocksize"], *(sides if isinstance(sides, list) else [0])]
    offset = said["nested_offset"]
    if not all(isinstance(n, int) and n > 0 for n in numbers) or not isinstance(offset, int | float):
        raise ValueError(f"{key} is no description of a layer")
    return said


def _bnb4_fits(tensors: Tensors, name: str, said: Mapping[str, Any], elements: int) -> bool:
    blocks = -(-elements // said["blocksize"])
    sizes = {"": -(-elements // 2), ".absmax": blocks, ".quant_map": 16}
    if f"{name}.nested_absmax" in tensors.infos:
        sizes |= {".nested_absmax": -(-blocks // said["nested_blocksize"]), ".nested_quant_map": 256}
    return all(math.prod(tensors.shape(name + tail) or (0,)) == size for tail, size in sizes.items())


def _bnb4_rows(tensors: Tensors, name: str, said: Mapping[str, Any], start: int, stop: int) -> Tensor:
    columns = math.prod(said["shape"][1:])
    first, end = start * columns, stop * columns
    packed = tensors.read(name, first // 2, -(-end // 2)).flatten()
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten()[first % 2 :][: end - first]
    values = tensors.whole(f"{name}.quant_map").float()[codes.long()].reshape(stop - start, columns)
    return values * _bnb4_maxima(tensors, name, said, start, stop)


def _bnb4_maxima(tensors: Tensors, name: str, said: Mapping[str, Any], start: int, stop: int) -> Tensor:
    """Return the absolute maximum of the block of each element in rows [start, stop)."""
    columns = math.prod(said["shape"][1:])
    blocks = torch.arange(start * columns, stop * columns) // said["blocksize"]
    low, high = int(blocks[0]), int(blocks[-1]) + 1
    maxima = tensors.read(f"{name}.absmax", low, high)
    if f"{name}.nested_absmax" in tensors.infos:
        outer = tensors.whole(f"{name}.nested_absmax").float()[torch.arange(low, high) // said["nested_blocksize"]]
        maxima = tensors.whole(f"{name}.nested_quant_map").float()[maxima.long()] * outer + said["nested_offset"]
    return maxima.float()[blocks - low].reshape(stop - start, columns)


def _quanto(tensors: Tensors, stem: str) -> Found:
    """optimum-quanto: W = data * scale for 8 bits; fewer are packed and not read."""
    codes, owned = f"{stem}._data", tensors.there(stem, "._data", "._scale", "._shift", "._data._data")
    if codes not in tensors.infos or tensors.infos[codes].dtype not in _CODES:
        return stem, StorageScheme("quanto, packed", (), owned, why="quanto's packed weights are not dequantised here")
    shape = tensors.shape(codes)
    spread = _spread(shape, tensors.shape(f"{stem}._scale"))
    if spread is None or spread[1]:
        return stem, StorageScheme("quanto", shape, owned, why="the shape of _scale fits no known layout")
    step = partial(_factors, tensors, f"{stem}._scale", spread)
    return stem, StorageScheme(
        "quanto 8-bit", shape, owned, lambda a, b: tensors.read(codes, a, b).float() * step(a, b), step, codes
    )


def _affine(tensors: Tensors, stem: str) -> Found:
    """MLX: W = scales * code + biases per group of columns; codes are packed from the low end of each row's bits."""
    codes, owned = stem + _WEIGHT, tensors.there(stem, _WEIGHT, ".scales", ".biases")
    if codes not in tensors.infos or tensors.infos[codes].dtype != "U32" or len(tensors.shape(codes)) != 2:
        return None
    said = tensors.config.get("quantization") or tensors.config.get("quantization_config") or {}
    said = {**said, **said[stem]} if isinstance(said.get(stem), dict) else said
    bits, (rows, words), groups = said.get("bits"), tensors.shape(codes), tensors.shape(f"{stem}.scales")
    alike = len(groups) == 2 and groups[0] == rows and groups[1] and groups == tensors.shape(f"{stem}.biases")
    if bits not in _BITS or not alike or said.get("mode", "affine") != "affine":
        why = "its bits are not said: config.json with the model's `quantization` belongs beside it"
        return codes, StorageScheme("MLX", (), owned, why=why)
    columns = 32 * words // int(bits)
    if 32 * words % int(bits) or columns % groups[1]:
        return codes, StorageScheme("MLX", (), owned, why=f"{bits} bits do not fit the shapes of its codes and scales")
    group = columns // groups[1]
    decode = partial(_affine_rows, tensors, stem, int(bits), group)
    step, offset = (partial(_per_group, tensors, f"{stem}.{part}", group) for part in ("scales", "biases"))
    return codes, StorageScheme(f"MLX {bits}-bit", (rows, columns), owned, decode, step, offset=offset)


def _per_group(tensors: Tensors, key: str, group: int, start: int, stop: int) -> Tensor:
    return tensors.read(key, start, stop).float().repeat_interleave(group, 1)


def _affine_rows(tensors: Tensors, stem: str, bits: int, group: int, start: int, stop: int) -> Tensor:
    raw = tensors.read(stem + _WEIGHT, start, stop).contiguous().view(torch.uint8).reshape(stop - start, -1).int()
    raw = torch.nn.functional.pad(raw, (0, 1))
    at = torch.arange((raw.shape[1] - 1) * 8 // bits) * bits
    codes = ((raw[:, at // 8] | raw[:, at // 8 + 1] << 8) >> (at % 8)) & (1 << bits) - 1
    scales, biases = (_per_group(tensors, f"{stem}.{part}", group, start, stop) for part in ("scales", "biases"))
    return codes * scales + biases


_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENT = 127  # what is added to the exponents of scales


def _mxfp4(tensors: Tensors, stem: str) -> Found:
    """MXFP4 of gpt-oss: [e, out, groups, 16] of two codes a byte, first the low half, [e, out, groups] of exponents.

    The model has the experts the other way round, [e, in, out].
    """
    blocks, scales = tensors.shape(f"{stem}_blocks"), tensors.shape(f"{stem}_scales")
    kinds = {tensors.infos[key].dtype for key in tensors.there(stem, "_blocks", "_scales")}
    if len(blocks) != 4 or blocks[:-1] != scales or kinds != {"U8"}:
        return None
    shape, owned = (blocks[0], 2 * blocks[2] * blocks[3], blocks[1]), tensors.there(stem, "_blocks", "_scales")

    def rows(start: int, stop: int) -> Tensor:
        packed = tensors.read(f"{stem}_blocks", start, stop).reshape(stop - start, *blocks[1:])
        exponents = tensors.read(f"{stem}_scales", start, stop).reshape(stop - start, *scales[1:], 1)
        numbers = torch.tensor([*_FP4, *(-number for number in _FP4)])
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
        found = torch.ldexp(numbers[codes.int()], exponents.int() - _EXPONENT)
        return found.flatten(-2).transpose(1, 2).flatten(1)

    return stem, StorageScheme("MXFP4", shape, owned, rows)


_PACKED = (
    ("SVDQuant (nunchaku)", (".wscales",)),
    ("GPTQ or AWQ", (".qzeros", ".scales", ".g_idx")),
    ("NVFP4", (".weight_global_scale", ".weight_scale_2")),
    ("HQQ", (".zero", ".scale")),
    ("MXFP4", ("_scales",)),
)
_BESIDE = (
    ".qzeros", ".scales", ".g_idx", ".wscales", ".wzeros", ".wcscales", ".wtscale", ".smooth_factor",
    ".smooth_factor_orig", ".proj_down", ".proj_up", ".weight_scale", ".weight_scale_2", ".weight_shape",
    ".weight_zero_point", ".weight_global_scale", ".input_global_scale", ".weight_g_idx", "_scales",
)  # fmt: skip


def _packed(tensors: Tensors, stem: str, tail: str) -> Found:
    """Codes packed in ways of their own: named, never read."""
    if tail == _WEIGHT and tensors.infos[stem + tail].dtype != "U8":
        return None
    if tail == "_blocks" and f"{stem}_scales" not in tensors.infos:
        return None
    kind = next((name for name, beside in _PACKED if tensors.there(stem, *beside)), "")
    if tail == _WEIGHT and not tensors.there(stem, ".weight_scale", *_SCALES):
        return None
    kind = kind or {".weight_packed": "compressed-tensors, packed"}.get(tail, "packed integer")
    owned = tensors.there(stem, tail, *_BESIDE)
    return stem + _WEIGHT, StorageScheme(kind, (), owned, why=f"{kind} weights are not dequantised here")


def _kinds() -> Iterator[tuple[str, Callable[[Tensors, str], Found]]]:
    yield ".absmax", _bnb4
    yield ".SCB", _bnb8
    yield "._scale", _quanto
    yield ".scales", _affine
    yield "_blocks", _mxfp4
    for tail in (".qweight", ".weight_packed", ".W_q", "_blocks"):
        yield tail, partial(_packed, tail=tail)
    yield _WEIGHT, _scaled
    yield _WEIGHT, partial(_packed, tail=_WEIGHT)


_KINDS = tuple(_kinds())
