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
from typing import Any, Literal

import torch
from torch import Tensor

from harness.doctor.checkpoint import Checkpoint
from harness.doctor.loader_law import Gain, gain_of
from harness.doctor.match import match_layers
from harness.errors import UserError
from harness.files import FORMATS, LoraAdapter, LoraModule, LoraWeights, read_lora, write_lora
from harness.text import count, printable
from harness.verdict.verdict import Record

_PLAIN = ("lora", "conv")
_DENOISER = frozenset({"", "unet", "transformer", "diffusion_model", "lycoris"})
_UNET_LAYERS = ("down_blocks.", "up_blocks.", "mid_block.", "down_blocks_", "up_blocks_")
_TEXT_ENCODERS = (
    frozenset({"te", "te1", "text_encoder", "text_encoders"}), frozenset({"te2", "text_encoder_2"}),
    frozenset({"te3", "text_encoder_3"}),
)  # fmt: skip


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
class RepairOptions:
    """How a file is repaired.

    `scale` is the trained factor on B @ A for every module, `lora_alpha` the alpha of the training; one of them is
    needed where the file carries none. With `loader` its law is measured and B is folded for that loader. `model_names`
    are the model's layers, needed to undo flattened (kohya) names. `dtype` converts the halves (`float32`, `bfloat16`,
    `float16`); without it they keep theirs. `force` replaces a file that is there.
    """

    scale: float | None = None
    lora_alpha: float | None = None
    loader: str | None = None
    model_names: Iterable[str] | None = None
    dtype: str | None = None
    force: bool = False


@dataclass(frozen=True)
class RepairedModule:
    """One module on its way: its scale in training, the factor of its readers, and the old and new halves."""

    name: str
    scale: float
    gain: float
    old: tuple[Tensor, Tensor]
    new: LoraWeights


def repair_file(
    lora: Path | str, to: str, out: Path | str, options: RepairOptions | None = None, **fields: Any
) -> RepairReport:
    """Write `lora` in the format `to` as the new file (or folder) `out`, so that strength 1.0 gives the trained effect.

    alpha becomes the rank and the trained scale is folded into B: readers that use alpha / rank and readers that
    ignore alpha then agree. The fields of `options` may be given by keyword.

    Raises:
        UserError: the file cannot be read or repaired, the loader has no known law, `out` exists (without `force`) or
            is `lora` itself, or the written file does not give the trained effect; nothing is left behind then.
    """
    options = dataclasses.replace(options or RepairOptions(), **fields)
    adapter = read_lora(lora)
    target = _target(adapter, to, Path(out), options.force)
    gain = gain_of(options.loader, to) if options.loader else Gain()
    names = _renamed(adapter, to, options.model_names)
    modules = [_repaired(adapter, name, new, gain, to, options) for name, new in names.items()]
    with _beside(target) as folder:
        written = _written(folder / target.name, to, modules, _prefix_of(adapter, to, names.values()))
        errors = _checked(written, modules, gain)
        _moved(written, target)
    scales = [module.scale for module in modules]
    return RepairReport(
        path=str(target),
        format=to,
        modules=len(modules),
        scales=(min(scales), max(scales)),
        loader=options.loader,
        law=gain.formula,
        measured=gain.measured,
        rounded=sum(error > 0 for error in errors),
        error=max(errors),
        notes=tuple(_notes(adapter, gain, modules, errors)),
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


def _renamed(adapter: LoraAdapter, to: str, model_names: Iterable[str] | None) -> dict[str, str]:
    """Return {module of the adapter: name to write}.

    Raises:
        UserError: flattened names without the model's own, or names that fit no layer of the model.
    """
    components = {module.component for module in adapter.modules.values()}
    if len(components) > 1:
        listed = ", ".join(sorted(component or "no prefix" for component in components))
        raise UserError(f"{adapter.path}: adapts several components ({listed}); one file per component is written")
    if not adapter.flattened or (FORMATS[to].flattened and model_names is None):
        return {name: module.name for name, module in adapter.modules.items()}
    if model_names is None:
        raise UserError(
            f"{adapter.path}: its names are flattened; {to} needs the model's layers: --model-names or --base"
        )
    matched = match_layers(adapter, tuple(model_names))
    lost = [name for name in adapter.modules if name not in matched]
    if lost:
        what = f"{count(len(lost), 'module')} fit no single layer of the model, such as {printable(lost[0])}"
        raise UserError(f"{adapter.path}: {what}")
    return {name: match.spelling for name, match in matched.items()}


def _prefix_of(adapter: LoraAdapter, to: str, names: Iterable[str]) -> str | None:
    """Return the prefix that `to` gives the adapter's component; None for the one it writes by itself.

    Raises:
        UserError: the format has no place for this component.
    """
    component = next(iter(adapter.modules.values())).component
    by_component = {owner: prefix for prefix, owner in reversed(tuple(FORMATS[to].prefixes.items()))}
    if component in _DENOISER:
        is_unet = any(name.startswith(_UNET_LAYERS) for name in names)
        return by_component.get("unet") if is_unet and to == "diffusers" else None
    alike = next((names for names in _TEXT_ENCODERS if component in names), frozenset({component}))
    found = next((by_component[name] for name in sorted(alike, reverse=True) if name in by_component), None)
    if found is None and FORMATS[to].prefixes and FORMATS[to].write_prefix not in ("", "base_model.model."):
        raise UserError(f"{adapter.path}: {to} has no place for the component {component}")
    return found


def _repaired(
    adapter: LoraAdapter, name: str, new_name: str, gain: Gain, to: str, options: RepairOptions
) -> RepairedModule:
    module, dtype = adapter.modules[name], options.dtype
    trained = options.scale if options.scale is not None else _trained(adapter, module, options.lora_alpha)
    alpha = None if FORMATS[to].alpha[0] == "none" else float(module.rank)
    here = gain.at_one(alpha, module.rank)
    if not here:
        raise UserError(f"this loader gives {printable(name)} the factor {here:g} at strength 1: nothing can be folded")
    a, b = adapter.tensors(name)
    folded = _converted(b.double() * (trained / here), dtype or str(b.dtype).removeprefix("torch."), name)
    new_a = _converted(a, dtype, name) if dtype else a
    return RepairedModule(new_name, trained, here, (a, b), LoraWeights(new_a, folded, alpha))


def _trained(adapter: LoraAdapter, module: LoraModule, lora_alpha: float | None) -> float:
    alpha = module.alpha if module.alpha is not None else lora_alpha
    if alpha is None:
        raise UserError(f"{adapter.path}: carries no alpha; give lora_alpha of the training, or the scale it used")
    if alpha == 0:
        raise UserError(f"{adapter.path}: alpha is 0, which readers take as 0, 1 or the rank; give the trained scale")
    return dataclasses.replace(module, alpha=alpha).trained_scale


def _converted(values: Tensor, dtype: str, name: str) -> Tensor:
    converted = values.to(getattr(torch, dtype))
    if values.double().isfinite().all() and not converted.double().isfinite().all():
        raise UserError(f"{printable(name)}: folding the scale overflows {dtype}; choose float32")
    return converted


def _written(path: Path, to: str, modules: list[RepairedModule], prefix: str | None) -> Path:
    try:
        return write_lora(path, to, {module.name: module.new for module in modules}, prefix=prefix)
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


def _checked(written: Path, modules: list[RepairedModule], gain: Gain) -> list[float]:
    """Return each module's relative error as the loader will see it, from the file as written."""
    back = read_lora(written)
    found = {one.name: name for name, one in back.modules.items()}
    errors = []
    for module in modules:
        name = found.get(module.name) or found.get(module.name.replace(".", "_"))
        if name is None:
            raise UserError(f"{printable(module.name)}: the format has no way to write this name: not written")
        factor = gain.at_one(back.modules[name].alpha, back.modules[name].rank)
        errors.append(_difference(back.tensors(name), factor, module.old, module.scale))
    bound = max(_roundoff(module.new) for module in modules)
    if max(errors) > bound:
        raise UserError(f"the new file is off by {max(errors):.1e}, rounding explains {bound:.1e}: not written")
    return errors


def _difference(new: tuple[Tensor, Tensor], factor: float, old: tuple[Tensor, Tensor], scale: float) -> float:
    """Return ||factor * B' A' - scale * B A|| / ||scale * B A|| from matrices of rank size."""
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
    return 4 * max(float(torch.finfo(half.dtype).eps) for half in (weights.a, weights.b))


def _notes(adapter: LoraAdapter, gain: Gain, modules: list[RepairedModule], errors: list[float]) -> Iterator[str]:
    rounded = sum(error > 0 for error in errors)
    if rounded:
        dtype = str(modules[0].new.b.dtype).removeprefix("torch.")
        yield f"B was rounded to {dtype} in {count(rounded, 'module')}, the effect is off by {max(errors):.1e} at most"
    if adapter.unused_keys:
        yield f"{count(len(adapter.unused_keys), 'key')} that belong to no pair were left out"
    others = [module for module in modules if module.gain != 1.0]
    if others:
        yield f"folded for this loader: readers that use alpha / rank are {1 / others[0].gain:.4g} times as strong"
    yield from gain.notes


def names_from(path: Path) -> list[str]:
    """Return module names: one per line of a text file, or the layers of a checkpoint (file, folder or index).

    Raises:
        UserError: the file cannot be read or names nothing.
    """
    if path.is_dir() or path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
        return list(Checkpoint.open(path).layers)
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no list of names can be read ({printable(error, 80)})") from None
    if not any(names):
        raise UserError(f"{path}: names no module")
    return [name for name in names if name]
