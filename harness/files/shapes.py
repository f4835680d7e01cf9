"""Rank, features and variant of one module, from the shapes of its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from harness.files.adapter import LoraModule, Problem
from harness.files.config import LORA_METHODS
from harness.files.keys import COPIES, EXTRAS, OTHER_PARTS, WHOLE_ROLES
from harness.files.tensor_file import TensorFile, is_float
from harness.text import printable

Shapes = Mapping[str, tuple[int, ...]]
Sizes = tuple[int, int, int]  # rank, in, out
_MOST_DIMENSIONS = 5
_TABLE = re.compile(r"(?:^|\.)(?:(?!embed_out)\w*embed\w*|wte|wpe)$")
_UNLIKELY = 256  # no trainer gives a layer of half that size such a rank
GROUPED = ("lora_gate_and_up_A", "lora_down_A")  # halves of experts that are stored [e, in, r] and [e, r, out]
_NOT_WEIGHTS = ("alpha", "reshape_weight", "set_weight", *COPIES, *OTHER_PARTS)
_TAKEN = dict.fromkeys(
    ("I8", "I16", "I32", "I64", "U8"),
    ": PEFT, LyCORIS and ComfyUI take such whole numbers as the weights, diffusers refuses them, and a scale that "
    "belongs to them is lost",
)
_KNOWN_ROLES = frozenset({"A", "B", *EXTRAS.values(), *WHOLE_ROLES, *COPIES})


class ShapeError(ValueError):
    """Shapes that fit no module; `role` names the tensor at fault."""

    def __init__(self, role: str, problem: str) -> None:
        self.role = role
        super().__init__(problem)


Signature = tuple[object, ...]


def measure(
    file: TensorFile,
    place: tuple[str, str],
    roles: Mapping[str, str],
    problems: list[Problem],
    flips: tuple[str, ...] = (),
    *,
    known: dict[Signature, LoraModule],
    method: str = "lora",
) -> LoraModule | None:
    """Return the module that the keys in `roles` make up, or None with the reason added to `problems`.

    `flips` are roles that the format stores transposed; three-dimensional ones are experts, which it does not. `known`
    keeps what was found, because the modules of a file share few shapes. `method` is PEFT's: roles that no format knows
    are its own.
    """
    first = roles.get("A", "")
    table = first.endswith("embedding_A") or first.startswith("token_embd.")  # A is that of an embedding
    table |= first.endswith(".lora_a") and bool(flips) and bool(_TABLE.search(place[1]))
    tensors, grouped = file.tensors, first.endswith(GROUPED)
    parts = [tensors[key][:2] for key in roles.values()]
    flips = ("A", "B") if grouped else flips
    signature = (table, flips, grouped, *roles, *parts)
    kind = known.get(signature)
    try:
        if kind is None:
            shapes = dict(zip(roles, parts, strict=True))
            kind = known[signature] = _kind(shapes, flips, table=table, method=method, grouped=grouped)
    except ShapeError as error:
        key = roles.get(error.role) or next(iter(roles.values()))
        problems.append(Problem("LH706", printable(key), str(error), fatal=True))
        return None
    if kind.variant in LORA_METHODS:  # whose product has other factors: nobody shall take the two for a pair
        roles = {f"lora_{role}" if role in ("A", "B") else role: key for role, key in roles.items()}
    return kind.changed(name=place[1], component=place[0], keys=roles)


def _kind(
    parts: Mapping[str, tuple[str, tuple[int, ...]]], flips: tuple[str, ...], *, table: bool, method: str, grouped: bool
) -> LoraModule:
    """Return the nameless module that tensors of these dtypes and shapes are; `table`: A is an embedding's.

    Raises:
        ShapeError: they fit no module.
    """
    stored = {role: shape for role, (_, shape) in parts.items()}
    flipped = flips if grouped else tuple(role for role in flips if len(stored.get(role, ())) == 2)
    shapes = {role: (*shape[:-2], *shape[:-3:-1]) if role in flipped else shape for role, shape in stored.items()}
    experts = bool(flips) and (grouped or not flipped) and len(shapes.get("A", ())) == 3
    variant = "experts" if experts else _variant(shapes, table=table, method=method)
    sizes = (_SIZES.get(variant) or (_pair if "A" in shapes or "B" in shapes else _unsized))(shapes)
    _refuse_additions(shapes, variant, sizes)
    _refuse_dtypes(parts)
    main = "A" if "A" in parts else next(iter(parts))
    kernel = stored["A"][2:] if "A" in stored and not experts else ()
    number = stored["A"][0] if experts else 1
    return LoraModule("", *sizes, None, False, parts[main][0], {}, variant, "", kernel, flipped, number)


def turned(modules: Iterable[LoraModule]) -> Iterator[Problem]:
    """Yield a problem where every pair has a rank far above the size of its layer: its halves lie the other way round.

    Of a layer [n, n] swapped or transposed halves of rank r fit each other, as a pair of rank n in a layer [r, r].
    """
    pairs = [module for module in modules if module.variant == "lora" and not module.flipped]
    sizes = {(module.in_features, module.out_features) for module in pairs}
    if len(sizes) == 1 and len(set(*sizes)) == 1 and min(module.rank for module in pairs) >= _UNLIKELY:
        rank, size = pairs[0].rank, pairs[0].in_features
        if rank >= 2 * size:
            what = f"rank {rank} in a layer of {size}x{size}: the halves lie the other way round, swapped or transposed"
            yield Problem("LH706", printable(pairs[0].keys["A"]), what, fatal=True)


def _variant(shapes: Shapes, *, table: bool, method: str = "lora") -> str:
    """Name what a module is by the roles it has.

    lora, conv, embedding; dora, lora_bias, tucker, loha, lokr; lora_diff (a pair beside whole tensors); diff, norm,
    set, tokens, copy (whole tensors alone); oft, ia3, … (other methods).
    """
    if other := next((OTHER_PARTS[role] for role in shapes if role in OTHER_PARTS), None):
        return "boft" if len(shapes.get("oft_blocks", ())) == 4 else other
    if any(role not in _KNOWN_ROLES for role in shapes) or (method in LORA_METHODS and "A" in shapes):
        return method
    if any(role.startswith("hada_") for role in shapes):
        return "loha"
    if any(role.startswith("lokr_") for role in shapes):
        return "lokr"
    named = (("mid", "tucker"), ("magnitude", "dora"), ("bias", "lora_bias"))
    if found := next((variant for role, variant in named if role in shapes), None):
        return found
    if any(role in WHOLE_ROLES for role in shapes):
        return "lora_diff" if "A" in shapes or "B" in shapes else _whole(shapes)
    if table:
        return "embedding"
    if shapes.keys() <= COPIES:
        return "copy"
    return "conv" if len(shapes.get("A", ())) > 2 else "lora"


def _whole(shapes: Shapes) -> str:
    if "diff" in shapes or "diff_b" in shapes:
        return "diff"
    if "token_rows" in shapes:
        return "tokens"
    if {"set_weight", "set_bias"} & shapes.keys():
        return "set"
    return "set" if "set_weight" in shapes or "reshape_weight" in shapes else "norm"


def _pair(shapes: Shapes) -> Sizes:
    """Sizes of A: [r, in, *kernel] and B: [out, r, 1, ...]."""
    _both(shapes)
    (rank, inputs), (outputs, other_rank) = shapes["A"][:2], shapes["B"][:2]
    if rank != other_rank:
        fits = "; the other way round they fit: swapped, or transposed" if inputs == outputs else ""
        found = f"A {_shown(shapes['A'])} has rank {rank}, B {_shown(shapes['B'])} has rank {other_rank}"
        raise ShapeError("A", found + fits)
    if math.prod(shapes["B"][2:]) != 1:
        raise ShapeError("B", f"has shape {_shown(shapes['B'])}: the up half of a convolution is 1x1")
    return _positive("A", rank, inputs, outputs, shapes["A"])


def _both(shapes: Shapes) -> None:
    for role, other in (("A", "B"), ("B", "A")):
        if role not in shapes:
            raise ShapeError(other, f"its partner, the {'down' if role == 'A' else 'up'} half ({role}), is missing")
        if not 2 <= len(shapes[role]) <= _MOST_DIMENSIONS:
            lost = "; DeepSpeed ZeRO-3 and FSDP leave this where shards were not gathered" if 0 in shapes[role] else ""
            what = f"has {len(shapes[role])} dimensions {_shown(shapes[role])}, 2 to 5 are needed{lost}"
            raise ShapeError(role, what)


def _experts(shapes: Shapes) -> Sizes:
    """Sizes of A: [experts, r, in] and B: [experts, out, r]."""
    _both(shapes)
    first, second = shapes["A"], shapes["B"]
    if len(second) != 3 or (first[0], first[1]) != (second[0], second[2]):
        raise ShapeError("A", f"A {_shown(first)} and B {_shown(second)} are no experts [e, r, in], [e, out, r]")
    return _positive("A", first[1], first[2], second[1], first)


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
    for role, other, side in (("hada_w2_a", first, 0), ("hada_w2_b", second, 1)):
        if shapes[role][1 if "hada_t2" in shapes else side] != other[1 if "hada_t1" in shapes else side]:
            ours = f"{role} {_shown(shapes[role])}"
            raise ShapeError(role, f"{ours} and {role.replace('2', '1')} {_shown(other)} do not fit")
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


def _full(shapes: Shapes) -> Sizes:
    """Sizes of whole tensors: [out, in, ...] of a weight, or [n] of a bias or norm; nothing low-rank, so rank 0."""
    roles = ("diff", "set_weight", "w_norm", "token_rows", "base_copy")
    role = next((role for role in roles if role in shapes), next(iter(shapes)))
    shape = shapes[role]
    if role == "set_weight" and not shape:  # a counter of a batch norm
        return 0, 0, 1
    if not 1 <= len(shape) <= _MOST_DIMENSIONS:
        raise ShapeError(role, f"has {len(shape)} dimensions {_shown(shape)}, 1 to 5 are needed")
    return 0, shape[1] if len(shape) > 1 else 0, shape[0]


def _unsized(shapes: Shapes) -> Sizes:
    return 0, 0, 0


def _glora(shapes: Shapes) -> Sizes:
    if lost := next((role for role in ("a1.weight", "a2.weight", "b1.weight", "b2.weight") if role not in shapes), ""):
        raise ShapeError(next(iter(shapes)), f"its partner {lost} is missing: GLoRA has four of them")
    return 0, 0, 0


def _adalora(shapes: Shapes) -> Sizes:
    """Sizes of A: [r, in], E: [r, 1], B: [out, r]; the update is B @ (A * E)."""
    rank, inputs, outputs = _pair(shapes)
    if shapes.get("lora_E") != (rank, 1):
        raise ShapeError("lora_E", f"AdaLoRA needs lora_E [{rank}, 1]")
    return rank, inputs, outputs


def _halves(shapes: Shapes) -> Sizes:
    """Sizes of a pair whose halves may be blocks of others, so that only A: [r, in] tells something, the rank."""
    _both(shapes)
    return _positive("A", shapes["A"][0], 1, 1, shapes["A"])[0], 0, 0


_SIZES: Mapping[str, Callable[[Shapes], Sizes]] = {
    "tucker": _tucker, "loha": _loha, "lokr": _lokr, "experts": _experts, "diff": _full, "norm": _full, "set": _full,
    "tokens": _full, "copy": _full, **dict.fromkeys(LORA_METHODS, _halves), "adalora": _adalora,
    "glora": _glora,
}  # fmt: skip


def _positive(role: str, rank: int, inputs: int, outputs: int, shape: tuple[int, ...]) -> Sizes:
    if rank == 0:
        raise ShapeError(role, f"has rank 0 {_shown(shape)}")
    if 0 in (inputs, outputs):
        raise ShapeError(role, f"is empty {_shown(shape)}")
    return rank, inputs, outputs


def _refuse_additions(shapes: Shapes, variant: str, sizes: Sizes) -> None:
    """Refuse a magnitude or a bias that no layer of a pair can have."""
    _, inputs, outputs = sizes
    able = {"magnitude": (inputs, outputs), "bias": (outputs,)} if variant in ("dora", "lora_bias") else {}
    for role, counts in able.items():
        if role in shapes and math.prod(shapes[role]) not in counts:
            what = f"has shape {_shown(shapes[role])}, which fits no layer of {outputs} rows and {inputs} columns"
            raise ShapeError(role, what)


def _refuse_dtypes(parts: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    for role, (dtype, _) in parts.items():
        if role in _KNOWN_ROLES and role not in _NOT_WEIGHTS and not is_float(dtype):
            raise ShapeError(role, f"has dtype {dtype}, a floating-point type is needed{_TAKEN.get(dtype, '')}")


def _shown(shape: tuple[int, ...]) -> str:
    return str(list(shape)) if len(shape) <= _MOST_DIMENSIONS else f"[{shape[0]}, {shape[1]}, …]"
