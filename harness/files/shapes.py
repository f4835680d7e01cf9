"""Rank, features and variant of one module, from the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from harness.files.adapter import LoraModule, Problem
from harness.files.safetensors_file import SafetensorsFile, TensorInfo
from harness.files.scalars import FLOATS
from harness.files.text import printable

Shapes = Mapping[str, tuple[int, ...]]
Sizes = tuple[int, int, int]  # rank, in, out
_MOST_DIMENSIONS = 5


class ShapeError(ValueError):
    """Shapes that fit no module; `role` names the tensor at fault."""

    def __init__(self, role: str, problem: str) -> None:
        self.role = role
        super().__init__(problem)


def measure(
    file: SafetensorsFile, place: tuple[str, str], roles: Mapping[str, str], problems: list[Problem]
) -> LoraModule | None:
    """Return the module that the keys in `roles` make up, or None with the reason added to `problems`."""
    infos = {role: file.tensors[key] for role, key in roles.items()}
    try:
        variant = variant_of(roles, infos)
        rank, inputs, outputs = _SIZES.get(variant, _pair)({role: info.shape for role, info in infos.items()})
        _refuse_dtypes(infos)
    except ShapeError as error:
        key = roles.get(error.role) or next(iter(roles.values()))
        problems.append(Problem("LH706", printable(key), str(error), fatal=True))
        return None
    main = infos.get("A") or next(iter(infos.values()))
    kernel = main.shape[2:] if "A" in infos else ()
    return LoraModule(place[1], rank, inputs, outputs, None, False, main.dtype, dict(roles), variant, place[0], kernel)


def variant_of(roles: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> str:
    """Name what a module is by the roles it has: lora, conv, dora, lora_bias, embedding, tucker, loha, lokr."""
    if any(role.startswith("hada_") for role in infos):
        return "loha"
    if any(role.startswith("lokr_") for role in infos):
        return "lokr"
    if "mid" in infos:
        return "tucker"
    if "magnitude" in infos:
        return "dora"
    if "bias" in infos:
        return "lora_bias"
    if roles.get("A", "").endswith("embedding_A"):
        return "embedding"
    return "conv" if "A" in infos and len(infos["A"].shape) > 2 else "lora"


def _pair(shapes: Shapes) -> Sizes:
    """Sizes of A: [r, in, *kernel] and B: [out, r, 1, ...]."""
    for role, other in (("A", "B"), ("B", "A")):
        if role not in shapes:
            raise ShapeError(other, f"its partner, the {'down' if role == 'A' else 'up'} half ({role}), is missing")
        if not 2 <= len(shapes[role]) <= _MOST_DIMENSIONS:
            raise ShapeError(role, f"has {len(shapes[role])} dimensions {_shown(shapes[role])}, 2 to 5 are needed")
    (rank, inputs), (outputs, other_rank) = shapes["A"][:2], shapes["B"][:2]
    if rank != other_rank:
        raise ShapeError("A", f"A {_shown(shapes['A'])} has rank {rank}, B {_shown(shapes['B'])} has rank {other_rank}")
    return _positive("A", rank, inputs, outputs, shapes["A"])


def _tucker(shapes: Shapes) -> Sizes:
    """Sizes of lora_mid: [r, r, *kernel] between A: [r, in, 1, 1] and B: [out, r, 1, 1]."""
    rank, inputs, outputs = _pair(shapes)
    if shapes["mid"][:2] != (rank, rank):
        raise ShapeError("mid", f"has shape {_shown(shapes['mid'])}, [{rank}, {rank}, …] is needed")
    return rank, inputs, outputs


def _loha(shapes: Shapes) -> Sizes:
    """Sizes of LoHa, w1_a: [out, r] and w1_b: [r, in] (Tucker: w1_a: [r, out] and t1: [r, r, *kernel])."""
    for role in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"):
        if len(shapes.get(role, ())) != 2:
            raise ShapeError(role, f"LoHa needs a two-dimensional {role}")
    first, second = shapes["hada_w1_a"], shapes["hada_w1_b"]
    outputs, rank = (first[1], first[0]) if "hada_t1" in shapes else first
    if rank != second[0]:
        raise ShapeError("hada_w1_a", f"hada_w1_a {_shown(first)} and hada_w1_b {_shown(second)} do not fit")
    return _positive("hada_w1_a", rank, second[1], outputs, first)


def _lokr(shapes: Shapes) -> Sizes:
    """Sizes of LoKr, the Kronecker product of w1 and w2, each full or a low-rank pair; rank 0 when both are full."""
    (out1, in1, rank1), (out2, in2, rank2) = _factor(shapes, "lokr_w1"), _factor(shapes, "lokr_w2")
    return rank2 or rank1, in1 * in2, out1 * out2


def _factor(shapes: Shapes, name: str) -> Sizes:
    if name in shapes:
        if len(shapes[name]) < 2:
            raise ShapeError(name, f"has shape {_shown(shapes[name])}, two dimensions are needed")
        return shapes[name][0], shapes[name][1], 0
    first, second = shapes.get(f"{name}_a", ()), shapes.get(f"{name}_b", ())
    tucker = name == "lokr_w2" and "lokr_t2" in shapes
    if len(first) != 2 or len(second) != 2 or first[0 if tucker else 1] != second[0]:
        raise ShapeError(f"{name}_a", f"LoKr needs {name}, or {name}_a and {name}_b that fit")
    return (first[1] if tucker else first[0]), second[1], second[0]


_SIZES: Mapping[str, Callable[[Shapes], Sizes]] = {"tucker": _tucker, "loha": _loha, "lokr": _lokr}


def _positive(role: str, rank: int, inputs: int, outputs: int, shape: tuple[int, ...]) -> Sizes:
    if rank == 0:
        raise ShapeError(role, f"has rank 0 {_shown(shape)}")
    if 0 in (inputs, outputs):
        raise ShapeError(role, f"is empty {_shown(shape)}")
    return rank, inputs, outputs


def _refuse_dtypes(infos: Mapping[str, TensorInfo]) -> None:
    for role, info in infos.items():
        if role != "alpha" and info.dtype not in FLOATS:
            raise ShapeError(role, f"has dtype {info.dtype}, a floating-point type is needed")


def _shown(shape: tuple[int, ...]) -> str:
    return str(list(shape)) if len(shape) <= _MOST_DIMENSIONS else f"[{shape[0]}, {shape[1]}, …]"
