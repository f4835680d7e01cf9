"""A new LoRA file whose scale readers agree on: alpha = rank, the trained scale folded into B, keys of one format."""

from __future__ import annotations

import dataclasses
import math
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from harness.doctor.loader_law import Gain, gain_of
from harness.doctor.repair.rename import prefix_of, renamed
from harness.errors import UserError
from harness.files import FORMATS, LoraAdapter, LoraModule, LoraWeights, read_lora, write_lora
from harness.text import count, printable
from harness.verdict.verdict import Record

if TYPE_CHECKING:
    from torch import Tensor

_PLAIN = ("lora", "conv")


class RepairReport(Record):
    """What `repair_file` wrote.

    `error` is the largest relative error ||gain * B' A' - scale * B A|| / ||scale * B A|| over the modules, read back
    from the new file; `rounded` counts the modules whose factors changed by rounding (0: lossless). `law` is the law
    of `loader`, `measured` says that it was measured here and now.
    """

    kind: Literal["repair"] = "repair"
    path: str
    format: str
    modules: int
    scales: tuple[float, float]
    loader: str | None = None
    law: str | None = None
    measured: bool = False
    rounded: int = 0
    error: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Piece:
    """One module on its way: its scale in training, the factor folded into B, and the old and new halves."""

    name: str
    scale: float
    gain: float
    old: tuple[Tensor, Tensor]
    new: LoraWeights


def repair_file(
    lora: Path | str,
    to: str,
    out: Path | str,
    *,
    scale: float | None = None,
    lora_alpha: float | None = None,
    loader: str | None = None,
    model_names: Iterable[str] | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> RepairReport:
    """Write `lora` in the format `to` as the new file (or folder) `out`, so that strength 1.0 gives the trained effect.

    alpha becomes the rank and the trained scale is folded into B: readers that use alpha / rank and readers that
    ignore alpha then agree. With `loader` its law is measured and B is folded for that loader instead. `scale` is the
    trained factor on B @ A for every module, `lora_alpha` the alpha of the training; one of them is needed where the
    file carries none. `model_names` are the model's layers, needed to undo flattened (kohya) names. `dtype` converts
    the halves (`float32`, `bfloat16`, `float16`); without it they keep theirs.

    Raises:
        UserError: the file cannot be read or repaired, the loader has no known law, `out` exists (without `force`) or
            is `lora` itself, or the written file does not give the trained effect; nothing is left behind then.
    """
    adapter = read_lora(lora)
    target = _target(adapter, to, Path(out), force)
    gain = gain_of(loader, to) if loader else Gain()
    names = renamed(adapter, to, model_names)
    pieces = [_piece(adapter, name, new, gain, to, scale, lora_alpha, dtype) for name, new in names.items()]
    with _beside(target) as folder:
        written = _written(folder / target.name, to, pieces, prefix_of(adapter, to, names.values()))
        errors = _checked(written, pieces, gain)
        _moved(written, target)
    return RepairReport(
        path=str(target),
        format=to,
        modules=len(pieces),
        scales=(min(p.scale for p in pieces), max(p.scale for p in pieces)),
        loader=loader,
        law=gain.formula,
        measured=gain.measured,
        rounded=sum(error > 0 for error in errors),
        error=max(errors),
        notes=tuple(_notes(adapter, gain, pieces, errors)),
    )


def _target(adapter: LoraAdapter, to: str, out: Path, force: bool) -> Path:
    """Return where the file goes, refusing what must not be written."""
    if to not in FORMATS:
        raise UserError(f"format={to!r} is unknown, known are {', '.join(FORMATS)}")
    odd = next((module for module in adapter.modules.values() if not _is_plain(module)), None)
    if odd is not None:
        raise UserError(
            f"{adapter.path}: {printable(odd.name)} is a {odd.variant} module, only plain pairs are repaired"
        )
    if not FORMATS[to].folder and out.suffix != ".safetensors":
        out = out.with_name(out.name + ".safetensors")
    if out.exists() and (out.samefile(adapter.path) or out.samefile(adapter.file.path)):
        raise UserError(f"{out}: is the file itself; write a new one")
    if os.path.lexists(out) and not force:
        raise UserError(f"{out}: exists already; --force replaces it")
    return out


def _is_plain(module: LoraModule) -> bool:
    return module.variant in _PLAIN and set(module.keys) <= {"A", "B", "alpha"}


def _piece(
    adapter: LoraAdapter,
    name: str,
    new_name: str,
    gain: Gain,
    to: str,
    scale: float | None,
    lora_alpha: float | None,
    dtype: str | None,
) -> _Piece:
    module = adapter.modules[name]
    trained = scale if scale is not None else _trained(adapter, module, lora_alpha)
    alpha = None if FORMATS[to].alpha[0] == "none" else float(module.rank)
    here = gain.at_one(alpha, module.rank)
    if not here:
        raise UserError(f"this loader gives {printable(name)} the factor {here:g} at strength 1: nothing can be folded")
    a, b = adapter.tensors(name)
    folded = _converted(b.double() * (trained / here), dtype or str(b.dtype).removeprefix("torch."), name)
    new_a = _converted(a, dtype, name) if dtype else a
    return _Piece(new_name, trained, here, (a, b), LoraWeights(new_a, folded, alpha))


def _trained(adapter: LoraAdapter, module: LoraModule, lora_alpha: float | None) -> float:
    alpha = module.alpha if module.alpha is not None else lora_alpha
    if alpha is None:
        raise UserError(f"{adapter.path}: carries no alpha; give lora_alpha of the training, or the scale it used")
    if alpha == 0:
        raise UserError(f"{adapter.path}: alpha is 0, which readers take as 0, 1 or the rank; give the trained scale")
    return dataclasses.replace(module, alpha=alpha).trained_scale


def _converted(values: Tensor, dtype: str, name: str) -> Tensor:
    import torch

    converted = values.to(getattr(torch, dtype))
    if torch.isfinite(values).all() and not torch.isfinite(converted.float()).all():
        raise UserError(f"{printable(name)}: folding the scale overflows {dtype}; choose float32")
    return converted


def _written(path: Path, to: str, pieces: list[_Piece], prefix: str | None) -> Path:
    try:
        return write_lora(path, to, {piece.name: piece.new for piece in pieces}, prefix=prefix)
    except ValueError as error:
        raise UserError(f"cannot be written as {to}: {error}") from None


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Yield a temporary folder on the same file system as the target, so that moving is one step."""
    folder = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _moved(written: Path, target: Path) -> None:
    if written.is_dir() and target.is_dir():
        for file in written.iterdir():
            os.replace(file, target / file.name)
    else:
        os.replace(written, target)


def _checked(written: Path, pieces: list[_Piece], gain: Gain) -> list[float]:
    """Return each module's relative error as the loader will see it, from the file as written."""
    back = read_lora(written)
    found = {module.name: name for name, module in back.modules.items()}
    errors = []
    for piece in pieces:
        name = found.get(piece.name) or found[piece.name.replace(".", "_")]
        module = back.modules[name]
        factor = gain.at_one(module.alpha, module.rank)
        errors.append(_difference(back.tensors(name), factor, piece.old, piece.scale))
    bound = max(_roundoff(piece.new) for piece in pieces)
    if max(errors) > bound:
        raise UserError(f"the new file is off by {max(errors):.1e}, rounding explains {bound:.1e}: not written")
    return errors


def _difference(new: tuple[Tensor, Tensor], factor: float, old: tuple[Tensor, Tensor], scale: float) -> float:
    """Return ||factor * B' A' - scale * B A|| / ||scale * B A|| from matrices of rank size."""
    import torch

    (a, b), (old_a, old_b) = ([half.double().flatten(1) for half in pair] for pair in (new, old))
    same = torch.equal(a, old_a)
    left = factor * b - scale * old_b if same else torch.cat([factor * b, -scale * old_b], 1)
    right = a if same else torch.cat([a, old_a])
    whole = _norm(scale * old_b, old_a)
    return _norm(left, right) / whole if whole else 0.0


def _norm(left: Tensor, right: Tensor) -> float:
    square = float(((left.t() @ left) * (right @ right.t())).sum())
    return math.sqrt(max(square, 0.0))


def _roundoff(weights: LoraWeights) -> float:
    import torch

    return 4 * max(float(torch.finfo(half.dtype).eps) for half in (weights.a, weights.b))


def _notes(adapter: LoraAdapter, gain: Gain, pieces: list[_Piece], errors: list[float]) -> Iterator[str]:
    rounded = sum(error > 0 for error in errors)
    if rounded:
        dtype = str(pieces[0].new.b.dtype).removeprefix("torch.")
        yield f"B was rounded to {dtype} in {count(rounded, 'module')}, the effect is off by {max(errors):.1e} at most"
    if adapter.unused_keys:
        yield f"{count(len(adapter.unused_keys), 'key')} that belong to no pair were left out"
    others = [piece for piece in pieces if piece.gain != 1.0]
    if others:
        yield f"folded for this loader: readers that use alpha / rank are {1 / others[0].gain:.4g} times as strong"
    yield from gain.notes


def names_from(path: Path) -> list[str]:
    """Return module names: one per line of a text file, or the layers of a safetensors checkpoint.

    Raises:
        UserError: the file cannot be read or names nothing.
    """
    from harness.doctor.base import BaseWeights

    if path.is_dir() or path.suffix == ".safetensors":
        return BaseWeights.open(path).names
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no list of names can be read ({printable(error, 80)})") from None
    if not any(names):
        raise UserError(f"{path}: names no module")
    return [name for name in names if name]
