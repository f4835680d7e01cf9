"""llama.cpp's models as transformers has them: names, the order of rows, and the grid of quantised weights.

llama.cpp's converter (convert_hf_to_gguf.py, `LlamaModel.permute`) stores the rows of q and k of Llama's kind pair by
pair for its rotary embedding: row 2 j + i of a head is row i d / 2 + j in transformers, d rows a head. Other models
keep theirs; of those that are not listed here nobody says. Experts are stacked in one tensor [experts, out, in]. To the
norms of Gemma, which transformers multiplies by 1 + weight, 1 is added (conversion/gemma.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from harness.doctor.quantised import StorageScheme
from harness.files.gguf_file import ARCHITECTURE_KEY, GgufFile, model_names

_PAIRED = frozenset({"llama", "granite"})
_SHIFTED = frozenset({"gemma", "gemma2", "gemma3"})
_PLAIN = _SHIFTED | {"qwen2", "qwen2vl", "qwen3", "qwen2moe", "qwen3moe", "olmo2", "starcoder2", "phi2", "phi3"}
_ENDS = (".weight", ".bias")
_COUNTS = {"q_proj": "head_count", "k_proj": "head_count_kv"}


@dataclass(frozen=True)
class Translation:
    """Names in transformers by key, the rows of a head by key where they lie pair by pair, and norms with 1 added."""

    names: Mapping[str, str]
    heads: Mapping[str, int]
    shifted: frozenset[str] = frozenset()

    def rows(self, key: str, read: Callable[[int, int], Tensor], start: int, stop: int) -> Tensor:
        """Return rows [start, stop) in the order of transformers; `read` returns them as they lie."""
        size = self.heads.get(key, 0)
        if not size:
            return read(start, stop)
        first, last = start // size * size, -(-stop // size) * size
        whole = read(first, last)
        turned = whole.reshape(-1, size // 2, 2, *whole.shape[1:]).swapaxes(1, 2).reshape(whole.shape)
        return turned[start - first : stop - first]


NATIVE = Translation({}, {})  # as they lie


def translation(file: GgufFile) -> Translation:
    """Return how transformers has the tensors of a model; nothing where its architecture is not known here."""
    kind = file.metadata.get(ARCHITECTURE_KEY, "")
    stems = {key: next((key.removesuffix(end) for end in _ENDS if key.endswith(end)), key) for key in file.keys}
    counts = {part: _count(file, f"{kind}.attention.{count}") for part, count in _COUNTS.items()}
    if kind not in _PAIRED | _PLAIN or (kind in _PAIRED and not all(counts.values())):
        return NATIVE
    found = model_names(file, stems.values())
    names = {key: found[stem] + key.removeprefix(stem) for key, stem in stems.items() if stem in found}
    heads = {}
    for key, name in names.items():
        part = name.split(".")[-2]
        if kind in _PAIRED and part in counts and file.tensors[key].shape[0] % counts[part] == 0:
            heads[key] = file.tensors[key].shape[0] // counts[part]
    norms = (key for key in names if kind in _SHIFTED and key.endswith("norm.weight"))
    return Translation(names, heads, frozenset(norms))


def _count(file: GgufFile, key: str) -> int:
    text = file.metadata.get(key, "")
    return int(text) if text.isdigit() else 0


def scheme(file: GgufFile, key: str, order: Translation) -> StorageScheme | None:
    """Return how a tensor is quantised, where its weights lie on a grid; a sum with 1 lies on that of its type."""
    info = file.tensors[key]
    if key in order.shifted:
        return StorageScheme(
            f"GGUF {info.dtype} with 1 added",
            info.shape,
            (key,),
            partial(_less_one, file, key),
            partial(_ulp, file, key),
        )
    if not file.has_grid(key):
        return None

    def grid(start: int, stop: int, part: int) -> Tensor:
        return order.rows(key, lambda a, b: file.grid(key, a, b)[part].flatten(1), start, stop)

    def rows(start: int, stop: int) -> Tensor:
        return order.rows(key, lambda a, b: torch.Tensor.flatten(file.rows(key, a, b), 1), start, stop)

    step, offset = (partial(grid, part=part) for part in (0, 1))
    return StorageScheme(f"GGUF {info.dtype}", info.shape, (key,), rows, step, offset=offset)


def _less_one(file: GgufFile, key: str, start: int, stop: int) -> Tensor:
    """Return elements of a norm as transformers has them: [elements, 1]."""
    return file.rows(key, start, stop).float()[:, None] - 1


def _ulp(file: GgufFile, key: str, start: int, stop: int) -> Tensor:
    """Return the distance of each element of a norm to the next number of its type: [elements, 1]."""
    stored = file.rows(key, start, stop)[:, None]
    exponent = torch.frexp(stored.float().abs()).exponent - 1
    return torch.ldexp(torch.full(stored.shape, torch.finfo(stored.dtype).eps), exponent)
