"""How the scale of one module is folded into its factors, and under which keys they are written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from harness.doctor.loader_law import Gain
from harness.doctor.repair.naming import Home
from harness.errors import UserError
from harness.files import FORMATS, LoraAdapter, LoraModule
from harness.files.keys import PAIRS
from harness.files.write import stem_of
from harness.text import count, first_of, printable

_GAINS = (("B", "bias"), ("hada_w2_a",), ("lokr_w1",), ("lokr_w1_a",))  # the parts that a product is linear in
FACTORS = re.compile(r"A|B|bias|mid|hada_.+|lokr_.+")
_LIVE = (
    (re.compile(r"\.modules_to_save\.[^.]+(?=\.)"), ""),
    (re.compile(r"(\.lora_magnitude_vector)(\.[^.]+)?(\.weight)?$"), r"\1"),
    (re.compile(r"(\.lora_[AB])\.[^.]+(\.(?:weight|bias))$"), r"\1\2"),
    (re.compile(r"(\.(?:lora_embedding_[AB]|trainable_tokens_delta))\.[^.]+$"), r"\1"),
)  # names of a live PEFT model, as PEFT saves them


class NewTensor(NamedTuple):
    """One factor of the new file: its key and what it holds."""

    key: str
    new: Tensor


Pieces = tuple[tuple[str, Home], ...]  # modules of the file, with the rows that go to one place


@dataclass(frozen=True)
class RepairedModule:
    """One module of the new file: its scale in training, the factor of its readers, its new alpha, its parts by role.

    `pieces` are the modules of the file that it is made of. `plain` modules are a pair and nothing else, which every
    format spells in its own way.
    """

    pieces: Pieces
    module: LoraModule
    home: Home
    scales: Mapping[str, float]
    gain: float
    alpha: float | None
    parts: Mapping[str, NewTensor]
    plain: bool

    @property
    def sources(self) -> tuple[str, ...]:
        """The modules of the file, each once."""
        return tuple(dict.fromkeys(name for name, _ in self.pieces))

    @property
    def rank(self) -> int:
        """The rank, that of one expert where there are several."""
        return int(self.parts["A"].new.shape[0]) if self.plain else self.module.rank


@dataclass(frozen=True)
class Folding:
    """How scales are folded: the reader's factor, the scale and the dtype that were asked for."""

    adapter: LoraAdapter
    to: str
    gain: Gain
    scale: float | None
    dtype: str | None


def assembled(how: Folding, pieces: Pieces) -> RepairedModule:
    """Return the plain module that rows of one module or more make up: A stacked, B in blocks."""
    module, home = how.adapter.modules[pieces[0][0]], pieces[0][1]
    scales = {name: _trained(how, how.adapter.modules[name]) for name, _ in pieces}
    a, exact = wanted(how.adapter, pieces, scales)
    alpha, here = _alpha(how, len(a), module.name)
    dtype = how.dtype or str(how.adapter.part(pieces[0][0], "B").dtype).removeprefix("torch.")
    new_a = _folded(a, 1.0, how.dtype, module.keys["A"])
    new_b = _folded(exact, 1.0 / here, dtype, module.keys["B"])
    parts = {"A": NewTensor(_spelled(how, "A", home), new_a), "B": NewTensor(_spelled(how, "B", home), new_b)}
    return RepairedModule(pieces, module, home, scales, here, alpha, parts, True)


def wanted(adapter: LoraAdapter, pieces: Pieces, scales: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Return A: [all ranks, in] and scale * B: [rows of the layer, all ranks] in float64, as training had them.

    The rows of every piece stand in their place and in the columns of its module.
    """
    name, home = pieces[0]
    halves = {name: adapter.tensors(name) for name, _ in pieces}
    a, scaled = halves[name][0], {name: b.double() * scales[name] for name, (_, b) in halves.items()}
    if len(pieces) == 1 and home.rows is None:
        return a, scaled[name][slice(*(home.part or (None,)))]
    starts = dict(zip(halves, accumulate((len(one) for one, _ in halves.values()), initial=0), strict=False))
    ranks = sum(len(one) for one, _ in halves.values())
    height = home.height or max(home.rows[1] for _, home in pieces if home.rows)
    whole = scaled[name].new_zeros(height, ranks, *scaled[name].shape[2:])
    for name, home in pieces:
        columns = slice(starts[name], starts[name] + len(halves[name][0]))
        whole[slice(*(home.rows or (None,))), columns] = scaled[name][slice(*(home.part or (None,)))]
    return torch.cat([one for one, _ in halves.values()]) if len(halves) > 1 else a, whole


def scaled_module(how: Folding, name: str, home: Home) -> RepairedModule:
    """Return a module that is no plain pair: the scale goes into the part that its product is linear in."""
    module, adapter = how.adapter.modules[name], how.adapter
    trained = _trained(how, module)
    alpha, here = _alpha(how, module.rank, name)
    gains = next(found for roles in _GAINS if (found := [role for role in roles if role in module.keys]))
    parts = {}
    for role, key in module.keys.items():
        if FACTORS.fullmatch(role):
            old = adapter.file.tensor(key)
            new = _folded(old, trained / here if role in gains else 1.0, how.dtype, key)
            parts[role] = NewTensor(rekeyed(adapter, key, module, home, how.to), new)
    return RepairedModule(((name, home),), module, home, {name: trained}, here, alpha, parts, False)


def _alpha(how: Folding, rank: int, name: str) -> tuple[float | None, float]:
    """Return the alpha that is written, and the factor that its readers then use."""
    alpha = None if FORMATS[how.to].alpha[0] == "none" else float(rank)
    here = how.gain.at_one(alpha, rank)
    if not here:
        raise UserError(f"this loader gives {printable(name)} the factor {here:g} at strength 1: nothing can be folded")
    return alpha, here


def _spelled(how: Folding, role: str, home: Home) -> str:
    """Return the new key of a half in the format's own spelling."""
    row = FORMATS[how.to]
    try:
        stem = stem_of(row, home.name)
    except ValueError as error:
        raise UserError(f"cannot be written as {how.to}: {error}") from None
    return f"{home.prefix}{stem}.{PAIRS[row.pairs[0]]['AB'.index(role)].replace('*', 'default')}"


def _trained(how: Folding, module: LoraModule) -> float:
    return how.scale if how.scale is not None else trained_scale(how.adapter, module)


def trained_scale(adapter: LoraAdapter, module: LoraModule) -> float:
    """Return the factor that training put on a module.

    Raises:
        UserError: the file does not say.
    """
    if module.alpha is None and not module.unscaled:
        what = "has an alpha that releases read in two ways" if adapter.alpha_by_release else _without_alpha(adapter)
        raise UserError(f"{adapter.path}: {what}; give lora_alpha of the training, or the scale it used")
    if module.alpha == 0:
        what = "alpha is 0, which readers take as 0, 1 or the rank; give lora_alpha of the training, or the scale"
        raise UserError(f"{adapter.path}: {what}")
    return module.trained_scale


def _without_alpha(adapter: LoraAdapter) -> str:
    every = [module for module in adapter.modules.values() if module.rank and not module.unscaled]
    without = [printable(module.name) for module in every if module.alpha is None]
    if len(without) == len(every):
        return "carries no alpha"
    return f"carries no alpha in {len(without)} of {count(len(every), 'module')} ({first_of(without)})"


def _folded(old: Tensor, factor: float, dtype: str | None, key: str) -> Tensor:
    """Return factor * old in its dtype or another.

    Raises:
        UserError: it holds NaN or infinity, or does not fit the dtype.
    """
    if not _is_finite(old):
        raise UserError(f"{printable(key)}: holds NaN or infinity, which no repair makes right")
    if factor == 1.0 and dtype is None:
        return old
    into = dtype or str(old.dtype).removeprefix("torch.")
    new = (old.double() * factor).to(getattr(torch, into))
    if not _is_finite(new):
        raise UserError(f"{printable(key)}: folding the scale overflows {into}; choose float32")
    return new


def _is_finite(tensor: Tensor) -> bool:
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.double()  # torch has no such test for 8-bit floats
    return bool(wide.isfinite().all())


def plain_key(adapter: LoraAdapter, key: str) -> str:
    """Return a key without what torch.compile, FSDP and a live PEFT model put into it."""
    key = adapter.plain(key)
    if adapter.format in ("peft", "diffusers"):
        for pattern, short in _LIVE:
            key = pattern.sub(short, key)
    return key


def rekeyed(adapter: LoraAdapter, key: str, module: LoraModule, home: Home, to: str) -> str:
    """Return a key with the new prefix and name of its module, and its own tail."""
    key, row = plain_key(adapter, key), FORMATS[adapter.format]
    try:
        stem, new = stem_of(row, module.name), home.prefix + stem_of(FORMATS[to], home.name)
    except ValueError:
        return key
    for start in sorted({*row.prefixes, home.prefix, ""}, key=len, reverse=True):
        if key.startswith(f"{start}{stem}."):
            return new + key[len(start) + len(stem) :]
    return key if key.startswith(home.prefix) or to != "peft" else home.prefix + key
