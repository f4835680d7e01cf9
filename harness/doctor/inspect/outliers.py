"""One module, or one element, that is far larger than its like: in other blocks the same layer has no such values."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from statistics import median

from harness.files import LoraAdapter
from harness.text import first_of, printable
from harness.verdict.blocks import block_of
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
    """Return dead modules in a block that training reached, but for experts, which a short training may pass over."""
    blocks = {name: (module.component, block_of(module.name)) for name, module in adapter.modules.items()}
    live = {blocks[name] for name in adapter.modules if name not in dead}
    return [name for name in dead if blocks[name] in live and "experts" not in name]
