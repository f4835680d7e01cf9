"""llama.cpp's models as transformers has them: names, the order of rows, and the grid of quantised weights.

llama.cpp's converter (convert_hf_to_gguf.py, `LlamaModel.permute`) stores the rows of q and k of Llama's kind pair by
pair for its rotary embedding: row 2 j + i of a head is row i d / 2 + j in transformers, d rows a head. Other models
keep theirs; of those that are not listed here nobody says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from harness.doctor.quantised import Scheme
from harness.files.gguf_file import ARCHITECTURE_KEY, GgufFile, model_names

_PAIRED = frozenset({"llama", "granite"})
_PLAIN = frozenset({"qwen2", "qwen2vl", "qwen3", "olmo2", "starcoder2"})
_ENDS = (".weight", ".bias")
_COUNTS = {"q_proj": "head_count", "k_proj": "head_count_kv"}


@dataclass(frozen=True)
class Translation:
    """Names in transformers by key, and the rows of a head by key where they lie pair by pair."""

    names: Mapping[str, str]
    heads: Mapping[str, int]

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
    return Translation(names, heads)


def _count(file: GgufFile, key: str) -> int:
    text = file.metadata.get(key, "")
    return int(text) if text.isdigit() else 0


def scheme(file: GgufFile, key: str, order: Translation) -> Scheme | None:
    """Return how a tensor is quantised, where its weights lie on a grid."""
    info = file.tensors[key]
    if not file.has_grid(key):
        return None

    def grid(start: int, stop: int, part: int) -> Tensor:
        return order.rows(key, lambda a, b: file.grid(key, a, b)[part].flatten(1), start, stop)

    def rows(start: int, stop: int) -> Tensor:
        return order.rows(key, lambda a, b: torch.Tensor.flatten(file.rows(key, a, b), 1), start, stop)

    step, offset = (partial(grid, part=part) for part in (0, 1))
    return Scheme(f"GGUF {info.dtype}", info.shape, (key,), rows, step, offset=offset)
