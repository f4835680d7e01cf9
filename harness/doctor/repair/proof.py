"""The proof that nothing trained was lost: the new file is read back, and every tensor of the source accounted for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from harness.doctor.loader_law import Gain
from harness.doctor.repair.folding import NewTensor, RepairedModule, wanted
from harness.doctor.repair.plan import RepairPlan
from harness.doctor.verify.changes import loha_product, lokr_product, pair_product
from harness.doctor.verify.products import Product
from harness.errors import UserError
from harness.files import FORMATS, LoraAdapter, read_lora
from harness.text import printable

_CHUNK_ELEMENTS = 1 << 22
_PRODUCTS = {"loha": loha_product, "lokr": lokr_product, "tucker": pair_product}


def proved(adapter: LoraAdapter, written: Path, plan: RepairPlan, gain: Gain) -> list[float]:
    """Return each module's relative error as its readers will see it, from the file as written.

    Raises:
        UserError: a tensor did not arrive, or an effect is off by more than rounding explains.
    """
    back = read_lora(written)
    _compare_carried(adapter, back, plan)
    found = {key: name for name, module in back.modules.items() for key in module.keys.values()}
    errors = []
    for module in plan.modules:
        names = {found.get(part.key) for part in module.parts.values()}
        name = next(iter(names)) if len(names) == 1 else None
        if name is None or not _same_name(module, back, name):
            what = f"{printable(module.home.name)}: the format has no way to write this name: not written"
            raise UserError(what)
        errors.append(_error(adapter, back, module, name, gain))
        bound = 4 * max(float(torch.finfo(part.new.dtype).eps) for part in module.parts.values())
        if not errors[-1] <= bound:
            raise UserError(f"the new file is off by {errors[-1]:.1e}, rounding explains {bound:.1e}: not written")
    return errors


def _same_name(module: RepairedModule, back: LoraAdapter, name: str) -> bool:
    row, wanted = FORMATS[back.format], module.home.name
    return back.modules[name].name in (wanted, wanted.replace(".", "_") if row.flattened else wanted)


def _compare_carried(adapter: LoraAdapter, back: LoraAdapter, plan: RepairPlan) -> None:
    for key, source in plan.carried.items():
        if key not in back.file.tensors or not identical(back.file.tensor(key), adapter.file.tensor(source)):
            raise UserError(f"{printable(source)}: did not arrive bit for bit: not written")


def identical(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are the same bit for bit, NaN included."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    left, right = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(left, right)


def _error(adapter: LoraAdapter, back: LoraAdapter, module: RepairedModule, name: str, gain: Gain) -> float:
    """Return ||factor * new - scale * old|| / ||scale * old|| of what a module adds, its bias included."""
    new = back.modules[name]
    factor = gain.at_one(new.alpha, new.rank)
    if new.variant != module.module.variant or new.rank != module.rank:
        raise UserError(f"{printable(module.home.name)}: reads back as another kind of module: not written")
    if not all(identical(back.file.tensor(part.key), stored) for part, stored in _stored(back, module, name)):
        raise UserError(f"{printable(module.home.name)}: did not arrive as written: not written")
    if module.plain:
        return _pair_error(back.tensors(name), factor, wanted(adapter, module.pieces, module.scales), 1.0)
    source = module.sources[0]
    scale, old_bias = module.scales[source], module.module.keys.get("bias", "")
    bias = [_vector_error(module.parts["bias"].new, factor, adapter.file.tensor(old_bias), scale)] if old_bias else []
    if module.module.variant in _PRODUCTS:
        make = _PRODUCTS[module.module.variant]
        return max([_product_error(make(adapter, source), make(back, name), scale, factor), *bias])
    pairs = _pairs(adapter, source), _pairs(back, name)
    every = (_pair_error(now, factor, old, scale) for old, now in zip(*pairs, strict=True))
    return max([*every, *bias])


def _pairs(adapter: LoraAdapter, name: str) -> list[tuple[Tensor, Tensor]]:
    """Return A and B, of each expert where there are several."""
    a, b = adapter.tensors(name)
    return list(zip(a, b, strict=True)) if adapter.modules[name].variant == "experts" else [(a, b)]


def _stored(back: LoraAdapter, module: RepairedModule, name: str) -> Iterator[tuple[NewTensor, Tensor]]:
    flipped = back.modules[name].flipped
    for role, part in module.parts.items():
        yield part, part.new.t() if module.plain and role in flipped else part.new


def _vector_error(new: Tensor, factor: float, old: Tensor, scale: float) -> float:
    was = scale * old.double()
    whole = float(was.norm())
    return float((factor * new.double() - was).norm()) / whole if whole else 0.0


def _pair_error(new: tuple[Tensor, Tensor], factor: float, old: tuple[Tensor, Tensor], scale: float) -> float:
    """Return the error of B @ A from matrices of rank size."""
    (a, b), (old_a, old_b) = ([half.double().flatten(1) for half in pair] for pair in (new, old))
    same = torch.equal(a, old_a)
    left = factor * b - scale * old_b if same else torch.cat([factor * b, -scale * old_b], 1)
    if same and not left.any():
        return 0.0
    right = a if same else torch.cat([a, old_a])
    whole = _norm(scale * old_b, old_a)
    return _norm(left, right) / whole if whole else 0.0


def _norm(left: Tensor, right: Tensor) -> float:
    square = float(((left.t() @ left) * (right @ right.t())).sum())
    return math.sqrt(max(square, 0.0))


def _product_error(old: Product, new: Product, scale: float, factor: float) -> float:
    rows, columns = old.shape
    step = max(1, _CHUNK_ELEMENTS // columns)
    off = whole = 0.0
    for start in range(0, rows, step):
        run = torch.arange(start, min(start + step, rows))
        was, now = (product.part(run, slice(None), torch.float64) for product in (old, new))
        off += float((factor * now - scale * was).square().sum())
        whole += float((scale * was).square().sum())
    return math.sqrt(off / whole) if whole else 0.0
