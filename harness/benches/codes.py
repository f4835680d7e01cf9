"""What the codes of a quantised layer are, and how a weight is rounded to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 64  # weights under one maximum, in bitsandbytes' 4-bit layers
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = tuple(sign * value for sign in (1.0, -1.0) for value in (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4))
_LEVELS: Mapping[str, tuple[float, ...]] = {"nf4": _NF4, "fp4": _FP4}
_FLOATS = {"fp8": "float8_e4m3fn", "fp8-e5m2": "float8_e5m2"}  # of eight bits, with one scale for the layer
_BY_ROW = "-rows"  # one for each row


class _Steps(NamedTuple):
    """Equal steps: `bits` of each code, how many weights of a row share a step (0: all), and between which ends.

    `even` ends are as far from 0 as the largest weight, the largest of `signed` ones is the lowest code, and `range` is
    from the smallest to the largest weight.
    """

    bits: int
    block: int = 0
    ends: Literal["even", "signed", "range"] = "even"


_STEPS: Mapping[str, _Steps] = {
    "int8": _Steps(8),
    "int4": _Steps(4),
    "int2": _Steps(2, 0, "range"),
    "q8_0": _Steps(8, 32),
    "q5_0": _Steps(5, 32, "signed"),
    "q5_1": _Steps(5, 32, "range"),
    "q4_0": _Steps(4, 32, "signed"),
    "q4_1": _Steps(4, 32, "range"),
    "q6_k": _Steps(6, 16),
    "q5_k": _Steps(5, 32, "range"),
    "q4_k": _Steps(4, 32, "range"),
    "q3_k": _Steps(3, 16, "signed"),
    "q2_k": _Steps(2, 16, "range"),
}  # of `_k` the scales are codes too, which is left out


def codes_of(module: torch.nn.Module) -> str:
    """Return what the weight of a layer is rounded to, as `rounded_to` calls it, or nothing where it is plain numbers.

    Of what a library calls otherwise it is eight bits.
    """
    from torch import Tensor

    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return ""
    kind = type(weight)
    if kind.__name__ == "Params4bit":
        said = str(getattr(weight, "quant_type", "nf4"))
        return said if said in _LEVELS else "fp4"
    if kind.__name__ == "GGUFParameter":
        return _of_gguf(str(getattr(weight.quant_type, "name", "")).lower())  # type: ignore[attr-defined]
    dequantises = getattr(kind, "dequantize", None) is not Tensor.dequantize
    coded = kind.__name__ == "Int8Params" or dequantises or not weight.is_floating_point() or weight.dtype.itemsize == 1
    found = _of_words(_words(weight)) if coded else ""
    return found + _BY_ROW if dequantises and found in _FLOATS else found


def _of_gguf(said: str) -> str:
    """Return the codes of a GGUF type; those that are not known by name are as coarse as others of their bits."""
    if said in _STEPS or said in ("f32", "f16", "bf16"):
        return said if said in _STEPS else ""
    bits = next((digit for digit in said if digit.isdigit()), "8")
    return next((name for name in ("q2_k", "q3_k", "q4_0", "q5_0") if bits <= name[1]), "q8_0")


def _words(weight: Tensor) -> str:
    """Return what torchao and optimum-quanto say of a weight's codes."""
    inner = next((getattr(weight, name) for name in ("qdata", "_data") if hasattr(weight, name)), weight)
    said = getattr(weight, "qtype", None) or getattr(weight, "target_dtype", None) or getattr(inner, "dtype", "")
    return str(getattr(said, "name", said)) + type(weight).__name__


def _of_words(words: str) -> str:
    words = words.lower()
    if "float8" in words:
        return "fp8-e5m2" if "e5m2" in words else "fp8"
    return next((f"int{bits}" for bits in (2, 4) if f"int{bits}" in words), "int8")


def rounded_to(codes: str, weight: Tensor) -> Tensor:
    """Return `weight`, [rows, columns] in float64, as codes of this kind hold it.

    The four bits of bitsandbytes have a maximum for every 64 weights in a row of memory, those of others one in each
    row of the matrix, or one for each block of a row.
    """
    if codes in _LEVELS:
        return _to_levels(weight, _LEVELS[codes])
    if codes.startswith("fp8"):
        return _to_floats(weight, _FLOATS[codes.removesuffix(_BY_ROW)], by_row=codes.endswith(_BY_ROW))
    return _to_steps(weight, _STEPS[codes])


def _to_levels(weight: Tensor, levels: tuple[float, ...]) -> Tensor:
    import torch

    blocks = _blocks(weight.reshape(1, -1), BLOCK)
    most = _positive(blocks.abs().amax(-1, keepdim=True))
    known = torch.tensor(sorted(levels), dtype=weight.dtype)
    places = torch.bucketize(blocks / most, (known[1:] + known[:-1]) / 2)
    return (known[places] * most).flatten()[: weight.numel()].reshape(weight.shape)


def _to_floats(weight: Tensor, dtype: str, *, by_row: bool) -> Tensor:
    import torch

    kind = getattr(torch, dtype)
    most = weight.abs().amax(1 if by_row else (0, 1), keepdim=True)
    step = _positive(most) / torch.finfo(kind).max
    return (weight / step).float().to(kind).to(weight.dtype) * step


def _to_steps(weight: Tensor, steps: _Steps) -> Tensor:
    blocks = _blocks(weight, steps.block or max(1, weight.shape[1]))
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    if steps.ends == "range":
        step = _positive((high - low) / (2**steps.bits - 1))
        found = ((blocks - low) / step).round() * step + low
    elif steps.ends == "signed":
        half = 2 ** (steps.bits - 1)
        step = _positive(high.maximum(-low) / half)
        sign = 1 - 2 * (high > -low).to(step)  # the lowest code is the end that is further from 0
        found = (blocks / step * sign).round().clamp(-half, half - 1) * step * sign
    else:
        step = _positive(high.maximum(-low)) / (2 ** (steps.bits - 1) - 1)
        found = (blocks / step).round() * step
    return found.flatten(1)[:, : weight.shape[1]].reshape(weight.shape)


def cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Return `model` in `dtype`; numbers of eight bits, which are codes, and complex ones stay as they are."""
    import torch

    kept = [place for owner in model.modules() for place in _kept(owner)]
    for held, name, _ in kept:
        held[name] = None
    torch.nn.Module.to(model, dtype)  # its own: diffusers' override logs a line on every call
    for held, name, value in kept:
        held[name] = value
    for module in model.modules():
        if isinstance(vars(module).get("compute_dtype"), torch.dtype):  # of bitsandbytes and GGUF: users say it
            vars(module)["compute_dtype"] = dtype
    return model


def _kept(module: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    tensors: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for held in tensors:
        for name, value in held.items():
            if value is not None and (value.is_complex() or (value.is_floating_point() and value.dtype.itemsize == 1)):
                yield held, name, value


def numbers_behind(value: Tensor) -> Tensor:
    """Return the numbers that a tensor of any class stands for, codes where it does not say which."""
    import torch

    inner = value.detach().data
    if inner.is_complex():
        return torch.view_as_real(inner)
    if getattr(type(inner), "dequantize", None) is not torch.Tensor.dequantize:
        meant: Tensor = inner.dequantize()
        return meant
    with torch._C.DisableTorchFunctionSubclass():
        return inner.as_subclass(torch.Tensor)


def _blocks(rows: Tensor, length: int) -> Tensor:
    """Return rows in blocks, [rows, blocks, length], the last filled with zeros."""
    import torch

    whole = torch.nn.functional.pad(rows, (0, -rows.shape[1] % length))
    return whole.reshape(len(rows), whole.shape[1] // length, length)


def _positive(steps: Tensor) -> Tensor:
    import torch

    return steps.clamp_min(torch.finfo(torch.float64).tiny)
