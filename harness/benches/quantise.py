"""Quantised layers: what their codes are, how a weight is rounded to them, and how a model's layers get them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from harness.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BLOCK = 64  # weights under one maximum, in bitsandbytes' 4-bit layers
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = tuple(sign * value for sign in (1.0, -1.0) for value in (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4))
_LEVELS: Mapping[str, tuple[float, ...]] = {"nf4": _NF4, "fp4": _FP4}
_MOST = 127  # of eight bits with a sign


def codes_of(module: torch.nn.Module) -> str:
    """Return what the weight of a layer is rounded to: `nf4`, `fp4`, `int8`, or nothing."""
    from torch import Tensor

    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return ""
    kind = type(weight)
    if kind.__name__ == "Params4bit":
        said = str(getattr(weight, "quant_type", "nf4"))
        return said if said in _LEVELS else "fp4"
    dequantises = getattr(kind, "dequantize", None) is not Tensor.dequantize
    return "int8" if kind.__name__ == "Int8Params" or dequantises or not weight.is_floating_point() else ""


def rounded_to(codes: str, weight: Tensor) -> Tensor:
    """Return `weight`, [rows, columns] in float64, as codes of this kind hold it.

    Four bits have a maximum for every 64 weights in a row of memory, eight one for each row of the matrix.
    """
    import torch

    if codes in _LEVELS:
        flat = weight.flatten()
        blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % _BLOCK)).reshape(-1, _BLOCK)
        most = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        levels = torch.tensor(sorted(_LEVELS[codes]), dtype=weight.dtype)
        places = torch.bucketize(blocks / most, (levels[1:] + levels[:-1]) / 2)
        return (levels[places] * most).flatten()[: flat.numel()].reshape(weight.shape)
    step = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny) / _MOST
    return (weight / step).round() * step


def _bnb4(kind: str) -> Callable[[Any], Any]:
    def convert(layer: Any) -> Any:
        import torch

        bnb: Any = import_module("bitsandbytes")
        new = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            quant_type=kind,
            compute_dtype=torch.float32,
            compress_statistics=False,
        )
        new.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type=kind, compress_statistics=False
        )
        new.support_avx512bf16_for_cpu = False  # else its first forward repacks the codes, on some processors only
        return _with_bias(new, layer)

    return convert


def _bnb8(layer: Any) -> Any:
    bnb: Any = import_module("bitsandbytes")
    new = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, threshold=0.0
    )
    new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return _with_bias(new, layer)


def _with_bias(new: Any, layer: Any) -> Any:
    if layer.bias is not None:
        new.bias = layer.bias
    return new.to("cpu")


def _torchao(layer: Any) -> Any:
    library: Any = import_module("torchao.quantization")
    library.quantize_(layer, library.Int8WeightOnlyConfig())
    return layer


def _quanto(layer: Any) -> Any:
    library: Any = import_module("optimum.quanto")
    new = library.QLinear.from_module(layer, weights=library.qint8)
    new.freeze()
    return new


@dataclass(frozen=True)
class Scheme:
    """The `package` with such layers, how it converts a linear layer, and what transformers sets on the model.

    The layer's inputs are a multiple of `block`: bitsandbytes' own code for processors with AVX-512 takes the maximum
    of another block where one goes on in the next row.
    """

    package: str
    convert: Callable[[Any], Any]
    mark: str | None = None
    block: int = 1


SCHEMES: Mapping[str, Scheme] = {
    "nf4": Scheme("bitsandbytes", _bnb4("nf4"), "is_loaded_in_4bit", _BLOCK),
    "fp4": Scheme("bitsandbytes", _bnb4("fp4"), "is_loaded_in_4bit", _BLOCK),
    "int8": Scheme("bitsandbytes", _bnb8, "is_loaded_in_8bit"),
    "torchao-int8": Scheme("torchao", _torchao),
    "quanto-int8": Scheme("optimum-quanto", _quanto),
}


def quantised(make: Callable[[], Any], name: str, targets: Callable[[str], bool]) -> Callable[[], Any]:
    """Return a function that builds the model of `make` with its linear layers quantised, those that `targets` names.

    Layers that the scheme cannot hold stay as they are.

    Raises:
        UserError: no such scheme; of the function: it holds none of the layers.
    """
    check_scheme(name)
    scheme = SCHEMES[name]

    def build() -> Any:
        model = make()
        linear = _linear(model, targets)
        held = [path for path, layer in linear.items() if layer.in_features % scheme.block == 0]
        if not held:
            raise UserError(_no_layer(name, linear.values()))
        for path in held:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _converted(scheme, linear[path]))
        if scheme.mark:
            setattr(model, scheme.mark, True)
        return model

    return build


def _linear(model: Any, targets: Callable[[str], bool]) -> dict[str, Any]:
    import torch

    named = list(model.named_modules())
    return {path: layer for path, layer in named if type(layer) is torch.nn.Linear and path and targets(path)}


def _no_layer(name: str, linear: Collection[Any]) -> str:
    if not linear:
        return f"quantise={name!r}: none of the layers that take a LoRA is a torch.nn.Linear"
    widths = ", ".join(map(str, sorted({layer.in_features for layer in linear})))
    block = SCHEMES[name].block
    return (
        f"quantise={name!r}: its blocks are {block} weights of a row, and no layer's inputs are a multiple of that "
        f"({widths}); --bench llama-wide has such, or give a model of your own such widths"
    )


def _converted(scheme: Scheme, module: Any) -> Any:
    try:
        return scheme.convert(module)
    except ImportError as error:
        raise UserError(f"{scheme.package} is not installed, or does not fit the installed torch: {error}") from error


@cache
def check_scheme(scheme: str) -> None:
    """Refuse a scheme that there is not.

    Raises:
        UserError: no such scheme.
    """
    if scheme not in SCHEMES:
        raise UserError(f"quantise={scheme!r}: no such scheme; known are {', '.join(SCHEMES)}")
