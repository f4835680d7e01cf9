"""Write LoRA weights in any format, so that the loaders of that format read them."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.files.adapter import LoraParts, LoraWeights
from harness.files.configuration import configuration, one_of_all, stacked_experts
from harness.files.format import CONFIG_NAME, HEADER_KEY, Format
from harness.files.formats import FORMATS
from harness.files.gguf_file import ARCHITECTURE_KEY, write_gguf
from harness.files.keys import PAIRS
from harness.files.peft_folder import wrapped
from harness.outputs import replace_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Modules = Mapping[str, LoraWeights | LoraParts]
KeyOrder = Sequence[int] | random.Random | None
_PEFT_TAILS: Mapping[str, str] = {
    "embedding_A": "lora_embedding_A",
    "embedding_B": "lora_embedding_B",
    "magnitude": "lora_magnitude_vector",
    "bias": "lora_B.bias",
}
_PART_TAILS = {"mid": "lora_mid.weight", "bias": "lora_B.bias", "magnitude": "dora_scale"}
_DTYPES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


def write_lora(
    path: Path | str,
    format: str,
    modules: Modules,
    *,
    rslora: bool = False,
    key_order: KeyOrder = None,
    dtype: torch.dtype | None = None,
    prefix: str | None = None,
    pair: str | None = None,
    durable: bool = True,
) -> Path:
    """Write `modules` (model names with dots -> weights) and return what a loader gets.

    For `peft` and `mlx` that is the folder `path`; for every other format the file `path`, with `.safetensors` or
    `.gguf` appended when it is missing. A is [r, in], B is [out, r], whichever way the format stores them; `dtype`
    converts both, alpha is always stored in float32 or as JSON. `LoraParts` writes any variant, in the formats that
    keep alpha in a tensor or nowhere, and in `peft` those that PEFT has a configuration for.
    Without alpha (None): `peft` and `mlx` refuse, because their configuration always has one; `diffusers` writes no
    metadata when no module has one, and alpha = rank for those without when some have; the others write none. Formats
    that have no place for alpha (`xlabs`, `attn-procs`, `bfl-control`) refuse one; `mlx` and `gguf` have one for all
    modules. Formats that have no flag for `rslora` store alpha * sqrt(rank), as LyCORIS does, so that alpha / rank is
    right. `key_order` is a permutation of the keys or a random generator that draws one; the data is laid out in that
    order, and a configuration's default is the first of the values that are most common. `prefix` replaces the
    format's own (such as `transformer.`), `pair` the spelling of the halves (see `keys.PAIRS`). Without `durable`
    nothing waits for the disk.

    Raises:
        ValueError: an argument that cannot be written, named with its value.
        LoraFileError: `gguf` is not installed.
    """
    how: dict[str, Any] = {"rslora": rslora, "dtype": dtype, "prefix": prefix, "pair": pair}
    return write_in_order(path, format, modules, key_order=key_order, durable=durable, **how)[0]


def write_in_order(
    path: Path | str,
    format: str,
    modules: Modules,
    *,
    key_order: KeyOrder,
    durable: bool,
    trained: bool = False,
    **how: Any,
) -> tuple[Path, tuple[str, ...]]:
    """Do what `write_lora` does; return too the names of the modules in the order of the file's keys.

    One that was `trained` has the metadata of its trainer.
    """
    content = compose(format, modules, **how)
    told = {**content.metadata, **(_network(FORMATS[format], modules) if trained else {})}
    tensors = _ordered(content.tensors, key_order)
    config = content.config
    if config:
        ordered = _as_they_stand(FORMATS[format], modules, content.tensors, tensors)
        stand = _config(FORMATS[format], how.get("prefix"), ordered, how.get("rslora", False))
        config = {**stand, **{key: config[key] for key in ("target_parameters",) if key in config}}  # as declared
    order = _as_they_stand(FORMATS[format], modules, content.tensors, _laid_out(FORMATS[format], tensors))
    content = replace(content, tensors=tensors, config=config, metadata=told)
    return save(path, format, content, durable=durable), tuple(order)


def _network(row: Format, modules: Modules) -> dict[str, str]:
    """Return what a trainer says of the whole network: the rank and the alpha that most modules have."""
    shapes = [(weights.rank, weights.alpha) for weights in modules.values() if "A" in weights.parts]
    if row.trainer is None or not shapes or any(alpha is None for _, alpha in shapes):
        return {}
    values = zip(*shapes, strict=True)
    return {key: str(Counter(each).most_common(1)[0][0]) for key, each in zip(row.trainer, values, strict=True)}


def _as_they_stand(row: Format, modules: Modules, composed: Iterable[str], ordered: Iterable[str]) -> Modules:
    """Return the modules in the order of their keys in the file."""
    names = (name for name, weights in modules.items() for _ in (*weights.parts, *_own_alpha(row, weights)))
    owner = dict(zip(composed, names, strict=True))
    return {name: modules[name] for name in dict.fromkeys(owner[key] for key in ordered)}


@dataclass(frozen=True)
class Content:
    """What goes into a file: tensors in the order of the data, metadata, configuration, and GGUF's alpha.

    `config` is that of the whole file as its format keeps it: beside the file, or in the header with its component
    before every field.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]
    alpha: float | None = None


def compose(
    format: str,
    modules: Modules,
    *,
    rslora: bool = False,
    dtype: torch.dtype | None = None,
    prefix: str | None = None,
    pair: str | None = None,
) -> Content:
    """Return what `write_lora` writes.

    Raises:
        ValueError: an argument that cannot be written, named with its value.
    """
    row = _row(format, modules, pair)
    prefix = row.write_prefix if prefix is None else prefix
    if rslora and row.alpha[0] in ("tensor", "kv"):
        modules = {name: _with_root(name, weights) for name, weights in modules.items()}
    tensors = _tensors(row, prefix, modules, pair or row.pairs[0], dtype)
    config = _config(row, prefix, modules, rslora)
    return Content(
        tensors, row.metadata, config, one_of_all("gguf", "alpha", modules) if row.alpha[0] == "kv" else None
    )


def _config(row: Format, prefix: str | None, modules: Modules, rslora: bool) -> dict[str, Any]:
    config = configuration(row, modules, rslora=rslora)
    start = (row.write_prefix if prefix is None else prefix) if row.alpha[0] == "header" else ""
    return {f"{start}{key}": value for key, value in config.items()}


def save(path: Path | str, format: str, content: Content, *, durable: bool = True) -> Path:
    """Write `content` as `write_lora` does and return what a loader gets.

    Raises:
        ValueError: a dtype that LoRA files do not have.
        LoraFileError: `gguf` is not installed.
    """
    row, path = FORMATS[format], Path(path)
    target = path / row.weights_name if row.folder else _with_suffix(path, row.suffix)
    if row.alpha[0] == "kv":
        target.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(target, content.tensors, content.alpha, content.metadata.get(ARCHITECTURE_KEY, "llama"))
        return target
    config = json.dumps(content.config, indent=2, sort_keys=True)
    serialized = _serialized(content.tensors, {**content.metadata, **header_of(row, content.config)})
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, serialized, durable=durable)
    if row.folder:
        replace_file(path / CONFIG_NAME, config.encode() + b"\n", durable=durable)
    return path if row.folder else target


def header_of(row: Format, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata that hold a configuration, where a format keeps it in the header."""
    return {HEADER_KEY: json.dumps(config, indent=2, sort_keys=True)} if row.alpha[0] == "header" and config else {}


def key_of(row: Format, role: str) -> str:
    """Return how a format calls a part of a module, behind its name."""
    return _tail(row, role, row.pairs[0])


def _row(format: str, modules: Modules, pair: str | None) -> Format:
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown, known are {', '.join(FORMATS)}")
    row = FORMATS[format]
    if not modules:
        raise ValueError("modules is empty, at least one module is needed")
    if pair is not None and pair not in row.pairs:
        raise ValueError(f"pair={pair!r} is not written by {format}, it has {', '.join(row.pairs)}")
    for name, weights in modules.items():
        _refuse(row, name, weights)
    return row


def _refuse(row: Format, name: str, weights: LoraWeights | LoraParts) -> None:
    if not name:
        raise ValueError("a module name is empty")
    if row.alpha[0] == "none" and weights.alpha is not None:
        what = f"a {row.name} file has no place for alpha: multiply B by alpha / rank and pass None"
        raise ValueError(f"modules[{name!r}].alpha={weights.alpha:g}: {what}")
    if row.alpha[0] == "config" and weights.alpha is None:
        raise ValueError(f"modules[{name!r}].alpha=None: a {row.name} configuration always has an alpha")
    if weights.parts.keys() != {"A", "B"}:
        if row.alpha[0] not in ("tensor", "none", "config"):
            raise ValueError(f"modules[{name!r}]: parts of a variant are not written to {row.name}")
        return
    if getattr(weights, "experts", 0) and not row.folder:
        raise ValueError(f"modules[{name!r}]: a {row.name} file has no stacked experts, only peft")
    a, b = (tuple(weights.parts[half].shape) for half in "AB")
    if row.flips(name) and max(len(a), len(b)) > 2:
        raise ValueError(f"modules[{name!r}]: {row.name} holds matrices only, a is {list(a)}, b {list(b)}")
    if len(a) < 2 or len(b) < 2 or a[0] != b[1] or 0 in a or 0 in b:
        raise ValueError(f"modules[{name!r}]: a {list(a)} and b {list(b)} are no pair [r, in], [out, r]")


def _with_root(name: str, weights: LoraWeights | LoraParts) -> LoraWeights | LoraParts:
    if weights.parts.keys() != {"A", "B"}:
        raise ValueError(f"modules[{name!r}]: rslora is not written for the parts of a variant")
    return weights if weights.alpha is None else replace(weights, alpha=weights.alpha * math.sqrt(weights.rank))


def _tensors(row: Format, prefix: str, modules: Modules, pair: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    import torch

    tensors: dict[str, Tensor] = {}
    stacked = wrapped(stacked_experts(modules))
    for name, weights in modules.items():
        stem = prefix + stem_of(row, stacked.get(name, name))
        for role, tensor in weights.parts.items():
            key = f"{stem}.{_tail(row, role, pair)}"
            if key in tensors:
                raise ValueError(f"modules[{name!r}]: another name flattens to {stem!r} too")
            tensor = tensor.flatten() if row.folder and role == "magnitude" else tensor  # PEFT's is a vector
            tensors[key] = (tensor.t() if role in row.flips(name) else tensor).to(dtype=dtype).contiguous()
        for alpha in _own_alpha(row, weights):
            tensors[f"{stem}.alpha"] = torch.tensor(float(alpha), dtype=torch.float32)
    return tensors


def _own_alpha(row: Format, weights: LoraWeights | LoraParts) -> tuple[float, ...]:
    """Return the alpha of a module that has a tensor of its own."""
    return (weights.alpha,) if row.alpha[0] == "tensor" and weights.alpha is not None else ()


def stem_of(row: Format, name: str) -> str:
    """Return how a format spells a module path behind its prefix.

    Raises:
        ValueError: it has no such module.
    """
    if row.naming is None:
        return name.replace(".", "_") if row.flattened else name
    if stem := row.naming.write(name):
        return stem
    raise ValueError(f"modules[{name!r}]: a {row.name} file has no such module, only {row.naming.example}")


def _tail(row: Format, role: str, pair: str) -> str:
    if role in ("A", "B"):
        return PAIRS[pair]["AB".index(role)].replace("*", "default")
    if row.alpha[0] == "config" and role in _PEFT_TAILS:
        return _PEFT_TAILS[role]
    own = {known: tail for tail, known in row.extras.items()}
    return own.get(role) or _PART_TAILS.get(role, role)


def _with_suffix(path: Path, suffix: str) -> Path:
    return path if path.suffix == suffix else path.with_name(path.name + suffix)


def _ordered(tensors: Mapping[str, Tensor], order: KeyOrder) -> dict[str, Tensor]:
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


def _laid_out(row: Format, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the keys in the order of the data: wider dtypes first, but in GGUF."""
    return list(tensors) if row.alpha[0] == "kv" else sorted(tensors, key=lambda key: -tensors[key].element_size())


def _serialized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
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
