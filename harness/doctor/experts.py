"""Experts that one side keeps in one parameter and the other one by one: which rows of the one are which layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from harness.files import LoraModule
from harness.files.architectures import Shape, Slot, UnjudgedError, UnplacedError

# the parameter that stacks every expert (transformers, mlx-lm), and what each expert has of it, in that order
_PARTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
    "gate_proj": (("gate_proj",), ("w1",)),
    "up_proj": (("up_proj",), ("w3",)),
}
_OWNERS = (
    ("mlp.experts", "block_sparse_moe.experts", "mlp.switch_mlp", "block_sparse_moe.switch_mlp"),
    ("feed_forward.experts", "feed_forward.switch_mlp"),
)
_ONE = re.compile(r"(.+)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)")
Find = Callable[[str], str | None]  # a name in the LoRA's component -> the layer of the model, if there is one


def one_by_one(module: LoraModule, find: Find, layers: Mapping[str, Shape | None]) -> tuple[Slot, ...]:
    """Return the slots of a module of stacked experts in a model that keeps them one by one; empty when it does not.

    `part` are rows of B_e @ A_e of all experts, one below the other, as the layers lie: [out, in].

    Raises:
        UnplacedError: some experts are missing, or the shapes do not fit.
    """
    owner, _, parameter = module.name.rpartition(".")
    for other in _alike(owner):
        for parts in _PARTS.get(parameter, ()):
            names = [f"{other}.{expert}.{part}" for expert in range(module.experts) for part in parts]
            if find(names[0]) is not None:
                return tuple(_stacked(module, names, [find(name) for name in names], layers))
    return ()


def _alike(owner: str) -> Iterator[str]:
    yield owner
    for names in _OWNERS:
        for name in names:
            if owner.endswith(name):
                yield from (owner.removesuffix(name) + other for other in names if other != name)


def _stacked(
    module: LoraModule, names: list[str], found: list[str | None], layers: Mapping[str, Shape | None]
) -> Iterator[Slot]:
    lost = next((name for name, layer in zip(names, found, strict=True) if layer is None), None)
    if lost is not None:
        raise UnplacedError(f"the model has no {lost}")
    shapes = [layers[layer] for layer in found if layer is not None]
    heights = [shape[0] for shape in shapes if shape and len(shape) == 2]
    wide = {shape[1] for shape in shapes if shape and len(shape) == 2}
    whole = (sum(heights) // module.experts, *wide)
    if len(heights) != len(found) or whole not in _sides(module):
        raise UnplacedError(f"an expert is {module.out_features}x{module.in_features}, in the model {whole}")
    at = 0
    for layer, height in zip(found, heights, strict=True):
        assert layer is not None
        yield Slot(layer, module.name, None, (at, at + height))
        at += height


def _sides(module: LoraModule) -> tuple[tuple[int, ...], ...]:
    """Return the shapes [out, in] that an expert may have: PEFT before 0.19 takes the first side for the inputs."""
    return (module.out_features, module.in_features), (module.in_features, module.out_features)


def in_one(module: LoraModule, find: Find, layers: Mapping[str, Shape | None]) -> tuple[Slot, ...]:
    """Return the slot of one expert's layer in a model that stacks all of them; empty when it does not.

    `rows` are those of the matrices [out, in] of all experts, one below the other.

    Raises:
        UnplacedError: the shapes do not fit, or do not tell how the experts lie.
    """
    name = _ONE.fullmatch(module.name)
    if name is None:
        return ()
    owner, expert, own = name[1], int(name[2]), name[3]
    for parameter, kinds in _PARTS.items():
        for parts in kinds:
            names = [f"{one}.{parameter}" for one in _alike(owner)] if own in parts else []
            layer = next(filter(None, map(find, names)), None)
            if layer is not None and (shape := layers[layer]) and len(shape) == 3:
                return (_rows_of(module, layer, shape, expert, parts.index(own), len(parts)),)
    return ()


def _rows_of(module: LoraModule, layer: str, shape: Shape, expert: int, place: int, parts: int) -> Slot:
    count, height, width = shape
    out, into = module.out_features, module.in_features
    straight, turned = (parts * out, into), (into, parts * out)
    if expert >= count:
        raise UnplacedError(f"{layer} has {count} experts")
    if (height, width) not in (straight, turned):
        raise UnplacedError(f"it is {out}x{into}, an expert of {layer} is {height}x{width}")
    if straight == turned:
        raise UnjudgedError(f"{layer}: its experts are square, whether they lie as [out, in] cannot be told", [layer])
    if (height, width) == turned:
        raise UnjudgedError(f"{layer}: its experts lie as [in, out], of which single rows are not judged", [layer])
    start = expert * height + place * out
    return Slot(layer, module.name, (start, start + out))
