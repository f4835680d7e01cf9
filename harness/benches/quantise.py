"""Quantised layers of real libraries: how a model's linear layers become such."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from harness.benches.codes import BLOCK
from harness.errors import UserError

_GGUF_BLOCK = 32  # weights under one scale


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


def _torchao(config: str) -> Callable[[Any], Any]:
    def convert(layer: Any) -> Any:
        library: Any = import_module("torchao.quantization")
        library.quantize_(layer, getattr(library, config)())
        return layer

    return convert


def _quanto(kind: str) -> Callable[[Any], Any]:
    def convert(layer: Any) -> Any:
        library: Any = import_module("optimum.quanto")
        new = library.QLinear.from_module(layer, weights=getattr(library, kind))
        new.freeze()
        return new

    return convert


def _gguf(kind: str) -> Callable[[Any], Any]:
    def convert(layer: Any) -> Any:
        import torch

        gguf: Any = import_module("gguf")
        library: Any = import_module("diffusers.quantizers.gguf.utils")
        stored = gguf.GGMLQuantizationType[kind]
        new = library.GGUFLinear(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32
        )
        codes = torch.from_numpy(gguf.quantize(layer.weight.data.numpy(), stored))
        new.weight = library.GGUFParameter(codes, quant_type=stored)
        new.bias = layer.bias
        return new

    return convert


def _scaled(layer: Any) -> Any:
    return import_module("harness.benches.scaled").ScaledLinear.of(layer)


@dataclass(frozen=True)
class Scheme:
    """The `package` with such layers, how it converts a linear layer, and what transformers sets on the model.

    The layer's inputs are a multiple of `block`: GGUF's blocks end with the row, and bitsandbytes' own code for
    processors with AVX-512 takes the maximum of another block where one goes on in the next row.
    """

    package: str
    convert: Callable[[Any], Any]
    mark: str | None = None
    block: int = 1


SCHEMES: Mapping[str, Scheme] = {
    "nf4": Scheme("bitsandbytes", _bnb4("nf4"), "is_loaded_in_4bit", BLOCK),
    "fp4": Scheme("bitsandbytes", _bnb4("fp4"), "is_loaded_in_4bit", BLOCK),
    "int8": Scheme("bitsandbytes", _bnb8, "is_loaded_in_8bit"),
    "torchao-int8": Scheme("torchao", _torchao("Int8WeightOnlyConfig")),
    "torchao-fp8": Scheme("torchao", _torchao("Float8WeightOnlyConfig")),
    "quanto-int8": Scheme("optimum-quanto", _quanto("qint8")),
    "quanto-fp8": Scheme("optimum-quanto", _quanto("qfloat8")),
    "gguf-q8_0": Scheme("gguf", _gguf("Q8_0"), block=_GGUF_BLOCK),
    "gguf-q4_0": Scheme("gguf", _gguf("Q4_0"), block=_GGUF_BLOCK),
    "fp8-scaled": Scheme("torch", _scaled),
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
