"""What the weights of a file show: NaN, factors that are zero, and one module or element far larger than its like."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from harness.files import LoraAdapter, LoraModule
from harness.text import count, first_of, printable
from harness.verdict.blocks import block_of, group_of, in_order
from harness.verdict.file_record import Hazard

# Of 69 adapters trained on tiny Llama, GPT-2 and BERT (AdamW and SGD, learning rates 1e-4 to 3e-2) the largest ratio is
# 19, and none passes both bounds. Of 2,400 drawn with blocks up to e**1 apart and Student-t elements 18 do, nearly all
# with 2.5 degrees of freedom, whose variance hardly exists.
RATIO = 25.0
SPREAD = 8.0
_LEAST = 4  # modules of a kind from which on there is a usual size
_SAMPLED = 512
_BULK = 2.0  # the largest element of normal ones is about 5 times their median: of a few alone it is 5 * ratio times
_ROLES = ("A", "B")
_NUMBERS = re.compile(r"(?<![^._])\d+(?=[._][A-Za-z])")


def outliers(adapter: LoraAdapter, largest: Mapping[str, float]) -> Iterator[Hazard]:
    """Yield LH717 for modules that are far larger than those of the same kind; `largest` maps a key to max |x|.

    Alike are modules whose names differ in the numbers of their blocks alone.
    """
    found = sorted(_excesses(adapter, largest).items(), key=lambda item: -item[1])
    if found:
        name, ratio = found[0]
        what = _what(adapter, name, ratio)
        kind = _kind(adapter, name).partition(":")[2]
        more = f"; {len(found) - 1} more" if len(found) > 1 else ""
        said = f"{first_of([name])}: {what} {ratio:.3g} times as large as usual in {printable(kind, 80)}{more}"
        yield Hazard(code="LH717", what=said)


def _excesses(adapter: LoraAdapter, largest: Mapping[str, float]) -> dict[str, float]:
    """Return the modules that stand out, with how many times they exceed the median of their family."""
    families: dict[str, dict[str, float]] = defaultdict(dict)
    for name, module in adapter.modules.items():
        sizes = [largest.get(module.keys.get(role, ""), 0.0) for role in _ROLES]
        if all(0 < size < math.inf for size in sizes):
            families[_kind(adapter, name)][name] = math.log(math.prod(sizes))
    return {name: math.exp(over) for family in families.values() for name, over in _over(family)}


def _kind(adapter: LoraAdapter, name: str) -> str:
    """Return a module's name without the numbers of its blocks; a last one tells layers apart (`to_out.0`, `net.2`)."""
    module = adapter.modules[name]
    return f"{module.component}:{_NUMBERS.sub('N', module.name)}"


def _over(family: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    if len(family) < _LEAST:
        return
    middle = median(family.values())
    spread = median(abs(value - middle) for value in family.values())
    limit = max(math.log(RATIO), SPREAD * spread)
    yield from ((name, value - middle) for name, value in family.items() if value - middle > limit)


def _what(adapter: LoraAdapter, name: str, ratio: float) -> str:
    """Say whether a module is large as a whole, as far as torch is there to read it."""
    try:
        part = adapter.part(name, "B").flatten()
    except ImportError:
        return "its largest elements are"
    usual = float(part[:: max(1, part.numel() // _SAMPLED)].abs().double().median())
    return "the whole module is" if float(part.abs().max()) < _BULK * ratio * usual else "a few of its elements are"


def lonely(adapter: LoraAdapter, dead: Collection[str]) -> list[str]:
    """Return dead modules in a block that training reached.

    Experts are left out, which a short training may pass over, and the last block, of which models use a part only.
    """
    blocks = {name: (module.component, *group_of(block_of(module.name))) for name, module in adapter.modules.items()}
    live = {blocks[name] for name in adapter.modules if name not in dead}
    last = {block[:2]: block for block in sorted(blocks.values(), key=lambda block: in_order(block[2]))}
    alone = [name for name in dead if blocks[name] in live and blocks[name] not in last.values()]
    return [name for name in alone if "experts" not in name]


_MOST_BYTES = 1 << 35  # of weights that are read unasked: half a minute, and more than any LoRA has


@dataclass(frozen=True)
class Weighed:
    """What the weights of a file say: hazards, notes, and whether they were read at all."""

    hazards: tuple[Hazard, ...] = ()
    notes: tuple[str, ...] = ()
    read: bool = False


def weigh(adapter: LoraAdapter) -> Weighed:
    """Read every weight once, for what is not finite (LH707) and for factors that are all zero (LH713, LH714).

    Raises:
        LoraFileError: the file cannot be read, or has changed.
    """
    modules, tensors = adapter.modules, adapter.file.tensors
    parts = {name: [key for role, key in module.keys.items() if role != "alpha"] for name, module in modules.items()}
    keys = [key for found in parts.values() for key in found]
    if sum(tensors[key].end - tensors[key].start for key in keys) > _MOST_BYTES:
        return Weighed(notes=("the weights are too many to be read unasked: NaN and zeros were not looked for",))
    extents = adapter.file.extents(keys)
    broken = {key for key, extent in extents.items() if not extent.finite}
    zeros = {key for key, extent in extents.items() if extent.largest == 0}
    found = [_not_finite([name for name, keys in parts.items() if not broken.isdisjoint(keys)])]
    dead = {name: part for name, module in modules.items() if (part := _zero_part(module, zeros))}
    odd = [name for name in dead if modules[name].keys.get("A") in zeros and modules[name].keys.get("B") not in zeros]
    odd += lonely(adapter, dead)
    said = f"{next(iter(dead.values()))} is all zero in {len(dead)} of {count(len(modules), 'module')}" if dead else ""
    said += f" ({first_of(list(dead))})" if dead else ""
    if dead and len(dead) == len(modules):
        found.append(Hazard(code="LH713", what=f"{said}: this LoRA changes nothing"))
    elif odd or 2 * len(dead) > len(modules):
        found.append(Hazard(code="LH714", what=f"{said}: these change nothing"))
    found += outliers(adapter, {key: extent.largest for key, extent in extents.items()})
    notes = (f"{said}: these change nothing, as is usual where training reaches no weight",) if dead else ()
    hazards = tuple(filter(None, found))
    said_already = any(hazard.code in ("LH713", "LH714") for hazard in hazards)
    return Weighed(hazards, () if said_already else notes, read=True)


def _not_finite(names: Sequence[str]) -> Hazard | None:
    where = f"{count(len(names), 'module')} ({first_of(names)})" if names else ""
    return Hazard(code="LH707", what=f"NaN or infinite weights in {where}") if names else None


_FACTORS = frozenset(
    {"A", "B", "mid", "diff", *(f"hada_w{i}_{half}" for i in "12" for half in "ab"), "lora_A", "lora_B", "lora_E"}
)
_ADDED = frozenset({"diff_b", "bias", "w_norm", "b_norm", "magnitude", "set_weight", "set_bias", "token_rows"})


def _zero_part(module: LoraModule, zeros: Collection[str]) -> str:
    """Return the role of a factor that is zero and makes all of the module's update zero, empty when none does."""
    if any(role in _ADDED and key not in zeros for role, key in module.keys.items()):
        return ""
    parts = [role for role, key in module.keys.items() if role in _FACTORS or role.startswith("lokr_w")]
    return next((role for role in parts if module.keys[role] in zeros), "")
