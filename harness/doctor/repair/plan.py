"""What becomes of every tensor of a file: its scale is folded into it, it is carried bit for bit, or it is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from harness.doctor.loader_law import Gain
from harness.doctor.repair.folding import FACTORS, Folding, RepairedModule, assembled, plain_key, rekeyed, scaled_module
from harness.doctor.repair.naming import Home, Homes
from harness.errors import UserError
from harness.files import LoraAdapter, LoraModule
from harness.files.config import PAIRED
from harness.files.keys import cut
from harness.text import count, printable

_PAIRS = ("lora", "conv")  # what every format can say
_LOW_RANK = frozenset({*_PAIRS, "embedding", "experts", "dora", "lora_bias", "lora_diff", "tucker", "loha", "lokr"})
_WHOLE = frozenset({"diff", "norm", "set", "tokens", "copy", "textual_inversion"})
_LYCORIS = frozenset({"kohya", "comfyui"})  # formats whose readers share the tails of all that is no plain pair
_COPIES = ("base_copy", "base_copy_bias")
_SHOWN = 4


@dataclass
class RepairPlan:
    """What the new file holds: repaired modules, tensors carried as {new key: key}; and the keys left out on purpose.

    Every key of the source is in one of them, or `converted`.
    """

    modules: list[RepairedModule] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    carried: dict[str, str] = field(default_factory=dict)
    settled: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)


def plan_repair(
    adapter: LoraAdapter, to: str, places: Homes, gain: Gain, *, scale: float | None, dtype: str | None
) -> RepairPlan:
    """Say for every tensor of `adapter` what becomes of it in a file of the format `to`.

    Raises:
        UserError: a trained tensor has no place there, or a module whose scale cannot be folded; the keys are named.
    """
    plan, refused, how = RepairPlan(), list[str](), Folding(adapter, to, gain, scale, dtype)
    stacks: dict[tuple[str, str], list[tuple[str, Home]]] = {}
    for name, module in adapter.modules.items():
        _refuse_kind(adapter, module)
        kept, plain = _kept(adapter, to, module, plan)
        if not plain and (module.keys.keys() - {"alpha", *_COPIES}) and not _takes(adapter, to, places[name]):
            refused += [key for role, key in module.keys.items() if role not in ("alpha", *_COPIES)]
            continue
        if _is_low_rank(module):
            plan.converted += [key for key in module.keys.values() if key not in kept]
            if plain:
                for home in places[name]:
                    stacks.setdefault((home.prefix, home.name), []).append((name, home))
            else:
                plan.modules.append(scaled_module(how, name, places[name][0]))
        for key in kept:
            plan.carried[_unused(plan, adapter, rekeyed(adapter, key, module, places[name][0], to))] = key
    refused += _others(adapter, to, plan)
    if refused:
        raise UserError(f"{adapter.path}: {_refusal(refused, to, adapter.format)}")
    plan.modules += [assembled(how, tuple(pieces)) for pieces in stacks.values()]
    _account(adapter, plan)
    return plan


def _is_low_rank(module: LoraModule) -> bool:
    return module.variant in _LOW_RANK and module.rank > 0


def _kept(adapter: LoraAdapter, to: str, module: LoraModule, plan: RepairPlan) -> tuple[list[str], bool]:
    """Return the keys of a module that are carried, and whether it is a plain pair but for copies of the base."""
    low_rank = _is_low_rank(module)
    kept = {role: key for role, key in module.keys.items() if _is_kept(role, low_rank=low_rank)}
    plain = low_rank and module.variant in _PAIRS and kept.keys() <= set(_COPIES)
    if to != adapter.format:
        plan.copies += [kept.pop(role) for role in _COPIES if role in kept]
    return list(kept.values()), plain


def _is_kept(role: str, *, low_rank: bool) -> bool:
    """Tell whether a part is carried as it is."""
    return not (low_rank and (role == "alpha" or FACTORS.fullmatch(role)))


def _takes(adapter: LoraAdapter, to: str, places: Sequence[Home]) -> bool:
    """Tell whether a file of the format `to` says what is no plain pair as the source does."""
    whole = len(places) == 1 and places[0][2:4] == (None, None)
    return whole and (to == adapter.format or {to, adapter.format} <= _LYCORIS)


def _refuse_kind(adapter: LoraAdapter, module: LoraModule) -> None:
    alone = adapter.kind not in (*PAIRED, "xlora", "poly")  # a method that has no pairs for readers to scale
    if module.variant not in _LOW_RANK | _WHOLE or alone:
        name = printable(module.name or next(iter(module.keys.values())))
        kind = printable(adapter.kind, 40) if alone else module.variant
        what = f"{name} is a {kind} module, whose scale is no alpha / rank to be repaired"
        raise UserError(f"{adapter.path}: {what}")


def _others(adapter: LoraAdapter, to: str, plan: RepairPlan) -> list[str]:
    """Carry the keys that no module has within the same format; return those that another format has no place for."""
    refused, known = list[str](), {key for module in adapter.modules.values() for key in module.keys.values()}
    for key in adapter.file.keys:
        if key in known:
            continue
        if (parts := cut(key)) and parts[1] == "alpha":
            plan.settled.append(key)  # a scale of nothing, or one that the configuration overrides
        elif to == adapter.format:
            plan.carried[_unused(plan, adapter, plain_key(adapter, key))] = key
        else:
            refused.append(key)
    return refused


def _refusal(keys: Sequence[str], to: str, own: str) -> str:
    shown = ", ".join(printable(key, 80) for key in keys[:_SHOWN]) + (", …" if len(keys) > _SHOWN else "")
    tensors = "1 trained tensor has" if len(keys) == 1 else f"{count(len(keys), 'trained tensor')} have"
    return f"{tensors} no place in a {to} file that repair knows of ({shown}); --to {own} keeps all of them"


def _unused(plan: RepairPlan, adapter: LoraAdapter, key: str) -> str:
    if key in plan.carried:
        raise UserError(f"{adapter.path}: two tensors would be called {printable(key)}: not written")
    return key


def _account(adapter: LoraAdapter, plan: RepairPlan) -> None:
    """Refuse to go on when a tensor of the source would be lost, or two would get one name.

    Raises:
        UserError: naming the keys.
    """
    going = {*plan.converted, *plan.carried.values(), *plan.settled, *plan.copies}
    if lost := [key for key in adapter.file.keys if key not in going]:
        raise UserError(f"{adapter.path}: {count(len(lost), 'tensor')} would be lost, such as {printable(lost[0])}")
    keys = [part.key for module in plan.modules for part in module.parts.values()] + [*plan.carried]
    if twice := next((key for key, number in Counter(keys).items() if number > 1), None):
        raise UserError(f"{adapter.path}: two tensors would be called {printable(twice)}: not written")


def notes_of(plan: RepairPlan) -> Iterator[str]:
    """Yield what a user should know about tensors that were not converted."""
    if plan.carried:
        yield f"carried bit for bit: {_some(list(plan.carried.values()))}"
    if plan.copies:
        yield f"left out as copies of the base's own weights: {_some(plan.copies)}"


def _some(keys: Sequence[str]) -> str:
    return ", ".join(printable(key, 60) for key in keys[:_SHOWN]) + (
        f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    )
