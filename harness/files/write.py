"""Write LoRA weights in any format, so that the loaders of that format read them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.files.adapter import LoraParts, LoraWeights
from harness.files.alpha import mlx_config, one_alpha
from harness.files.config import build
from harness.files.format import CONFIG_NAME, HEADER_KEY, Format
from harness.files.formats import FORMATS
from harness.files.gguf_file import write_gguf
from harness.files.keys import PAIRS
from harness.files.serialize import KeyOrder, ordered, replace_file, serialize

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PEFT_TAILS: Mapping[str, str] = {
    "embedding_A": "lora_embedding_A",
    "embedding_B": "lora_embedding_B",
    "magnitude": "lora_magnitude_vector",
    "bias": "lora_B.bias",
}
"""Role -> how its key ends where PEFT does not write the role itself."""

_COMMON = {"task_type": None, "base_model_name_or_path": None, "inference_mode": True, "modules_to_save": None}
_LORA = {"lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False}
_OTHERS = {"hada_": "LOHA", "lokr_": "LOKR"}


def peft_config(modules: Mapping[str, LoraWeights | LoraParts]) -> dict[str, Any]:
    """Return the adapter configuration of modules that all have the same variant.

    Raises:
        ValueError: a module without alpha, or PEFT has no configuration for the parts.
    """
    ranks = {name: rank_of(weights) for name, weights in modules.items()}
    config = build(ranks, {name: float(weights.alpha or 0.0) for name, weights in modules.items()}, rslora=False)
    roles = {role for weights in modules.values() if isinstance(weights, LoraParts) for role in weights.parts}
    other = next((kind for start, kind in _OTHERS.items() if any(role.startswith(start) for role in roles)), None)
    if other is None:
        flags = {"use_dora": "magnitude" in roles, "lora_bias": "bias" in roles}
        return {**_COMMON, **_LORA, **config, **flags, "peft_type": "LORA"}
    alphas = {"alpha": config.pop("lora_alpha"), "module_dropout": 0.0, "rank_dropout": 0.0}
    del config["use_rslora"]
    return {**_COMMON, **config, **alphas, "peft_type": other}


def rank_of(weights: LoraWeights | LoraParts) -> int:
    """Return the rank of one module from the shapes of its parts.

    Raises:
        ValueError: none of the parts has a rank.
    """
    if isinstance(weights, LoraWeights):
        return weights.rank
    for role, axis in (("A", 0), ("embedding_A", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if role in weights.parts:
            return int(weights.parts[role].shape[axis])
    raise ValueError(f"PEFT has no configuration for parts {', '.join(weights.parts)}")


Modules = Mapping[str, LoraWeights | LoraParts]
Pairs = Mapping[str, LoraWeights]
_PEFT_FIELDS = {
    "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True, "bias": "none",
    "lora_dropout": 0.0, "fan_in_fan_out": False, "modules_to_save": None, "use_dora": False,
}  # fmt: skip
_PART_TAILS = {"mid": "lora_mid.weight", "bias": "lora_B.bias", "magnitude": "dora_scale"}


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
    order. `prefix` replaces the format's own (such as `transformer.`), `pair` the spelling of the halves (see
    `keys.PAIRS`).

    Raises:
        ValueError: an argument that cannot be written, named with its value.
        LoraFileError: `gguf` is not installed.
    """
    row = _row(format, modules, pair)
    prefix = row.write_prefix if prefix is None else prefix
    if rslora and row.alpha[0] in ("tensor", "kv"):
        modules = {name: _with_root(name, weights) for name, weights in modules.items()}
    tensors = _tensors(row, prefix, modules, pair or row.pairs[0], dtype)
    pairs = {name: weights for name, weights in modules.items() if isinstance(weights, LoraWeights)}
    config = peft_config(modules) if _is_variant(row, modules) else _config(row, pairs, rslora)
    return _save(Path(path), row, ordered(tensors, key_order), _metadata(row, prefix, config), config, pairs)


def _is_variant(row: Format, modules: Modules) -> bool:
    return row.alpha[0] == "config" and any(isinstance(weights, LoraParts) for weights in modules.values())


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
    if isinstance(weights, LoraParts):
        if row.alpha[0] not in ("tensor", "none", "config"):
            raise ValueError(f"modules[{name!r}]: parts of a variant are not written to {row.name}")
        return
    a, b = tuple(weights.a.shape), tuple(weights.b.shape)
    if len(a) < 2 or len(b) < 2 or a[0] != b[1] or 0 in a or 0 in b:
        raise ValueError(f"modules[{name!r}]: a {list(a)} and b {list(b)} are no pair [r, in], [out, r]")


def _with_root(name: str, weights: LoraWeights | LoraParts) -> LoraWeights:
    if isinstance(weights, LoraParts):
        raise ValueError(f"modules[{name!r}]: rslora is not written for the parts of a variant")
    return weights if weights.alpha is None else replace(weights, alpha=weights.alpha * math.sqrt(weights.rank))


def _tensors(row: Format, prefix: str, modules: Modules, pair: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    import torch

    tensors: dict[str, Tensor] = {}
    for name, weights in modules.items():
        stem = prefix + _stem(row, name)
        for role, tensor in _parts(weights).items():
            key = f"{stem}.{_tail(row, role, pair)}"
            if key in tensors:
                raise ValueError(f"modules[{name!r}]: another name flattens to {stem!r} too")
            tensor = tensor.flatten() if row.folder and role == "magnitude" else tensor  # PEFT's is a vector
            tensors[key] = (tensor.t() if role in row.flipped(name) else tensor).to(dtype=dtype).contiguous()
        if row.alpha[0] == "tensor" and weights.alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(float(weights.alpha), dtype=torch.float32)
    return tensors


def _stem(row: Format, name: str) -> str:
    if row.naming is None:
        return name.replace(".", "_") if row.flattened else name
    if stem := row.naming.write(name):
        return stem
    raise ValueError(f"modules[{name!r}]: a {row.name} file has no such module, only {row.naming.example}")


def _parts(weights: LoraWeights | LoraParts) -> Mapping[str, Tensor]:
    return weights.parts if isinstance(weights, LoraParts) else {"A": weights.a, "B": weights.b}


def _tail(row: Format, role: str, pair: str) -> str:
    if role in ("A", "B"):
        return PAIRS[pair]["AB".index(role)].replace("*", "default")
    if row.alpha[0] == "config" and role in PEFT_TAILS:
        return PEFT_TAILS[role]
    own = {known: tail for tail, known in row.extras.items()}
    return own.get(role) or _PART_TAILS.get(role, role)


def _config(row: Format, modules: Pairs, rslora: bool) -> dict[str, Any]:
    if row.alpha[0] == "scale":
        return mlx_config(modules, rslora=rslora)
    alphas = {name: weights.alpha for name, weights in modules.items() if weights.alpha is not None}
    if row.alpha[0] not in ("config", "header") or not alphas:
        return {}
    ranks = {name: weights.rank for name, weights in modules.items()}
    neutral = {name: math.sqrt(rank) if rslora else float(rank) for name, rank in ranks.items()}
    config = build(ranks, {**neutral, **alphas}, rslora=rslora)
    return {**_PEFT_FIELDS, **config} if row.folder else config


def _metadata(row: Format, prefix: str, config: Mapping[str, Any]) -> dict[str, str]:
    if not config or row.alpha[0] != "header":
        return dict(row.metadata)
    text = json.dumps({f"{prefix}{key}": value for key, value in config.items()}, indent=2, sort_keys=True)
    return {**row.metadata, HEADER_KEY: text}


def _save(
    path: Path, row: Format, tensors: dict[str, Tensor], metadata: dict[str, str], config: Any, pairs: Pairs
) -> Path:
    target = path / row.weights_name if row.folder else _with_suffix(path, row.suffix)
    if row.alpha[0] == "kv":
        alpha = one_alpha(row.name, pairs)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_gguf(target, tensors, alpha)
        return target
    content = serialize(tensors, metadata)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, content)
    if row.folder:
        replace_file(path / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
    return path if row.folder else target


def _with_suffix(path: Path, suffix: str) -> Path:
    return path if path.suffix == suffix else path.with_name(path.name + suffix)
