"""What becomes of every tensor of a file: its scale is folded into it, it is carried bit for bit, or it is refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.doctor.loader_law import Gain
from harness.doctor.repair.naming import Home
from harness.errors import UserError
from harness.files import FORMATS, LoraAdapter, LoraModule
from harness.files.keys import PAIRS, cut
from harness.files.write import stem_of
from harness.text import count, printable

_PAIRS = ("lora", "conv")  # what every format can say
_LOW_RANK = frozenset({*_PAIRS, "embedding", "experts", "dora", "lora_bias", "lora_diff", "tucker", "loha", "lokr"})
_WHOLE = frozenset({"diff", "norm", "set", "tokens", "copy"})
_LYCORIS = frozenset({"kohya", "comfyui"})  # formats whose readers share the tails of all that is no plain pair
_GAINS = (("B", "bias"), ("hada_w2_a",), ("lokr_w1",), ("lokr_w1_a",))  # the parts that a product is linear in
_FACTORS = re.compile(r"A|B|bias|mid|hada_.+|lokr_.+")
_COPY = "base_copy"
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^module\.")
_LIVE = (
    (re.compile(r"\.modules_to_save\.[^.]+(?=\.)"), ""),
    (re.compile(r"(\.lora_magnitude_vector)(\.[^.]+)?(\.weight)?$"), r"\1"),
    (re.compile(r"(\.lora_[AB])\.[^.]+(\.(?:weight|bias))$"), r"\1\2"),
    (re.compile(r"(\.(?:lora_embedding_[AB]|trainable_tokens_delta))\.[^.]+$"), r"\1"),
)  # names of a live PEFT model, as PEFT saves them
_SHOWN = 4


@dataclass(frozen=True)
class Part:
    """One tensor on its way: its keys in the file and in the new one, what it was and what it becomes."""

    source: str
    key: str
    old: Tensor
    new: Tensor


@dataclass(frozen=True)
class RepairedModule:
    """One module on its way: its scale in training, the factor of its readers, its new alpha, and its parts by role.

    `plain` modules are a pair and nothing else, which every format spells in its own way.
    """

    source: str
    module: LoraModule
    home: Home
    scale: float
    gain: float
    alpha: float | None
    parts: Mapping[str, Part]
    plain: bool

    @property
    def rank(self) -> int:
        """The rank, that of one expert where there are several."""
        return self.module.rank


@dataclass
class Plan:
    """What the new file holds: repaired modules, tensors carried as {new key: key}; and the keys left out on purpose.

    Every key of the source is in one of them.
    """

    modules: list[RepairedModule] = field(default_factory=list)
    carried: dict[str, str] = field(default_factory=dict)
    settled: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)


def plan_repair(
    adapter: LoraAdapter, to: str, places: Mapping[str, Home], gain: Gain, *, scale: float | None, dtype: str | None
) -> Plan:
    """Say for every tensor of `adapter` what becomes of it in a file of the format `to`.

    Raises:
        UserError: a trained tensor has no place there, or a module whose scale cannot be folded; the keys are named.
    """
    plan, refused = Plan(), list[str]()
    for name, module in adapter.modules.items():
        _refuse_kind(adapter, module)
        low_rank = module.variant in _LOW_RANK and module.rank > 0
        kept = {role: key for role, key in module.keys.items() if _is_kept(role, low_rank=low_rank)}
        copies = [key for role, key in kept.items() if role.startswith(_COPY)]
        if not _takes(adapter, to):
            plan.copies += copies
            kept = {role: key for role, key in kept.items() if key not in copies}
        plain = low_rank and module.variant in _PAIRS and not kept.keys() - {_COPY, f"{_COPY}_bias"}
        if not plain and kept.keys() | module.keys.keys() - {"alpha"} and not _takes(adapter, to):
            refused += [key for role, key in module.keys.items() if role != "alpha" and key not in copies]
            continue
        if low_rank:
            plan.modules.append(_repaired(adapter, name, places[name], gain, to, plain, scale, dtype))
            plan.settled += [module.keys["alpha"]] if "alpha" in module.keys else []
        for key in kept.values():
            plan.carried[_unused(plan, adapter, rekeyed(adapter, key, module, places[name], to))] = key
    refused += _others(adapter, to, plan)
    if refused:
        raise UserError(f"{adapter.path}: {_refusal(refused, to, adapter.format)}")
    _account(adapter, plan)
    return plan


def _is_kept(role: str, *, low_rank: bool) -> bool:
    """Tell whether a part is carried as it is."""
    return not (low_rank and (role == "alpha" or _FACTORS.fullmatch(role)))


def _takes(adapter: LoraAdapter, to: str) -> bool:
    """Tell whether a file of the format `to` says what is no plain pair as the source does."""
    return to == adapter.format or {to, adapter.format} <= _LYCORIS


def _refuse_kind(adapter: LoraAdapter, module: LoraModule) -> None:
    if module.variant not in _LOW_RANK | _WHOLE:
        what = f"{printable(module.name)} is a {module.variant} module, whose scale is no alpha / rank to be repaired"
        raise UserError(f"{adapter.path}: {what}")


def _others(adapter: LoraAdapter, to: str, plan: Plan) -> list[str]:
    """Carry the keys that no module has within the same format; return those that another format has no place for."""
    known = {key for module in adapter.modules.values() for key in module.keys.values()}
    refused = []
    for key in adapter.file.keys:
        if key in known:
            continue
        if (parts := cut(key)) and parts[1] == "alpha":
            plan.settled.append(key)  # a scale of nothing, or one that the configuration overrides
        elif to == adapter.format:
            plan.carried[_unused(plan, adapter, plain_key(key, to))] = key
        else:
            refused.append(key)
    return refused


def _refusal(keys: Sequence[str], to: str, own: str) -> str:
    shown = ", ".join(printable(key, 80) for key in keys[:_SHOWN]) + (", …" if len(keys) > _SHOWN else "")
    tensors = "1 trained tensor has" if len(keys) == 1 else f"{count(len(keys), 'trained tensor')} have"
    return f"{tensors} no place in a {to} file ({shown}); --to {own} keeps all of them"


def _unused(plan: Plan, adapter: LoraAdapter, key: str) -> str:
    if key in plan.carried:
        raise UserError(f"{adapter.path}: two tensors would be called {printable(key)}: not written")
    return key


def _account(adapter: LoraAdapter, plan: Plan) -> None:
    """Refuse to go on when a tensor of the source would be lost, or two would get one name.

    Raises:
        UserError: naming the keys.
    """
    parts = [part for module in plan.modules for part in module.parts.values()]
    going = {part.source for part in parts} | {*plan.carried.values(), *plan.settled, *plan.copies}
    if lost := [key for key in adapter.file.keys if key not in going]:
        raise UserError(f"{adapter.path}: {count(len(lost), 'tensor')} would be lost, such as {printable(lost[0])}")
    times = Counter([part.key for part in parts] + [*plan.carried])
    if twice := next((key for key, number in times.items() if number > 1), None):
        raise UserError(f"{adapter.path}: two tensors would be called {printable(twice)}: not written")


def plain_key(key: str, format: str) -> str:
    """Return a key without what torch.compile, FSDP and a live PEFT model put into it."""
    key = _WRAPPERS.sub("", key)
    if format in ("peft", "diffusers"):
        for pattern, short in _LIVE:
            key = pattern.sub(short, key)
    return key


def rekeyed(adapter: LoraAdapter, key: str, module: LoraModule, home: Home, to: str) -> str:
    """Return a key with the new prefix and name of its module, and its own tail."""
    key, row = plain_key(key, to), FORMATS[adapter.format]
    try:
        stem, new = stem_of(row, module.name), home.prefix + stem_of(FORMATS[to], home.name)
    except ValueError:
        return key
    for start in sorted({*row.prefixes, home.prefix, ""}, key=len, reverse=True):
        if key.startswith(f"{start}{stem}."):
            return new + key[len(start) + len(stem) :]
    return key if key.startswith(home.prefix) else home.prefix + key


def _repaired(
    adapter: LoraAdapter,
    name: str,
    home: Home,
    gain: Gain,
    to: str,
    plain: bool,
    scale: float | None,
    dtype: str | None,
) -> RepairedModule:
    module = adapter.modules[name]
    trained = scale if scale is not None else trained_scale(adapter, module)
    alpha = None if FORMATS[to].alpha[0] == "none" else float(module.rank)
    here = gain.at_one(alpha, module.rank)
    if not here:
        raise UserError(f"this loader gives {printable(name)} the factor {here:g} at strength 1: nothing can be folded")
    gains = next(found for roles in _GAINS if (found := [role for role in roles if role in module.keys]))
    parts = {}
    for role, key in module.keys.items():
        if not _FACTORS.fullmatch(role):
            continue
        old = adapter.part(name, role) if plain else adapter.file.tensor(key)
        new = _folded(old, trained / here if role in gains else 1.0, dtype, key)
        parts[role] = Part(key, _spelled(adapter, role, module, home, to, plain), old, new)
    return RepairedModule(name, module, home, trained, here, alpha, parts, plain)


def _spelled(adapter: LoraAdapter, role: str, module: LoraModule, home: Home, to: str, plain: bool) -> str:
    """Return the new key of a factor: in the format's own spelling for a plain pair, else with its own tail."""
    if not plain:
        return rekeyed(adapter, module.keys[role], module, home, to)
    row = FORMATS[to]
    try:
        stem = stem_of(row, home.name)
    except ValueError as error:
        raise UserError(f"cannot be written as {to}: {error}") from None
    return f"{home.prefix}{stem}.{PAIRS[row.pairs[0]]['AB'.index(role)].replace('*', 'default')}"


def trained_scale(adapter: LoraAdapter, module: LoraModule) -> float:
    """Return the factor that training put on a module.

    Raises:
        UserError: the file does not say.
    """
    if module.alpha is None:
        raise UserError(f"{adapter.path}: carries no alpha; give lora_alpha of the training, or the scale it used")
    if module.alpha == 0:
        what = "alpha is 0, which readers take as 0, 1 or the rank; give lora_alpha of the training, or the scale"
        raise UserError(f"{adapter.path}: {what}")
    return module.trained_scale


def _folded(old: Tensor, factor: float, dtype: str | None, key: str) -> Tensor:
    """Return factor * old in its dtype or another.

    Raises:
        UserError: it holds NaN or infinity, or does not fit the dtype.
    """
    exact = old.double()
    if not exact.isfinite().all():
        raise UserError(f"{printable(key)}: holds NaN or infinity, which no repair makes right")
    if factor == 1.0 and dtype is None:
        return old
    into = dtype or str(old.dtype).removeprefix("torch.")
    new = (exact * factor).to(getattr(torch, into))
    if not new.double().isfinite().all():
        raise UserError(f"{printable(key)}: folding the scale overflows {into}; choose float32")
    return new


def config_with(
    source: Mapping[str, Any], generated: Mapping[str, Any], *, renamed: bool, names: Sequence[str]
) -> dict[str, Any]:
    """Return a configuration that says alpha = rank for every module and keeps all other fields of the source's.

    Ranks stay where the source has them, so that whatever it meant, alpha follows them; where modules are `renamed`,
    or its target_modules leave some of `names` out, they are named one by one.
    """
    config = {**generated, **source}
    if renamed:
        config |= {name: generated[name] for name in ("r", "rank_pattern", "alpha_pattern") if name in generated}
    ranks = config.get("rank_pattern") or {}
    alpha = "alpha" if "alpha" in generated else "lora_alpha"
    config |= {alpha: config.setdefault("r", 8), "rank_pattern": ranks, "alpha_pattern": dict(ranks)}
    config |= {"use_rslora": False} if "use_rslora" in config else {}
    if names and (renamed or not all(_selects(config, name) for name in names)):
        config["target_modules"] = sorted(names)
        config |= {
            name: None for name in ("layers_to_transform", "layers_pattern", "exclude_modules") if name in config
        }
    return config


def _selects(config: Mapping[str, Any], name: str) -> bool:
    """Tell whether target_modules choose a module; expressions are left to PEFT."""
    targets = config.get("target_modules")
    return not isinstance(targets, list | tuple) or any(f".{name}".endswith(f".{target}") for target in targets)


def notes_of(plan: Plan) -> Iterator[str]:
    """Yield what a user should know about tensors that were not converted."""
    if plan.carried:
        yield f"carried bit for bit: {_some(list(plan.carried.values()))}"
    if plan.copies:
        yield f"left out as copies of the base's own weights: {_some(plan.copies)}"


def _some(keys: Sequence[str]) -> str:
    return ", ".join(printable(key, 60) for key in keys[:_SHOWN]) + (
        f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    )
