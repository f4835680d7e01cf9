"""A new LoRA file whose scale readers agree on: alpha = rank, the trained scale folded into B, keys of one format."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from harness.doctor.loader_law import Gain, gain_of
from harness.doctor.repair.folding import RepairedModule
from harness.doctor.repair.naming import Layers, homes, notes_on, refuse_what_would_change
from harness.doctor.repair.plan import RepairPlan, notes_of, plan_repair
from harness.doctor.repair.proof import proved
from harness.errors import UserError
from harness.files import FORMATS, LoraAdapter, LoraWeights, read_lora, with_alpha
from harness.files.alpha import MLX
from harness.files.configuration import configuration
from harness.files.format import HEADER_KEY
from harness.files.write import Content, compose, save, stem_of
from harness.text import count
from harness.verdict.verdict import Record

_WRAPPER = "text_model."


class RepairReport(Record):
    """What `repair_file` wrote.

    `modules` are those whose scale was folded, `carried` tensors went over bit for bit. `error` is the largest relative
    error ||gain * B' A' - scale * B A|| / ||scale * B A|| over the modules, read back from the new file; `rounded`
    counts the modules whose factors changed by rounding (0: lossless). `law` is the law of `loader`, `measured` says
    that it was measured here and now.
    """

    kind: Literal["repair"] = "repair"
    path: str
    format: str
    modules: int
    carried: int = 0
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
    are the model's layers (or these with their shapes), needed to undo flattened (kohya) names and to split or stack
    what the model has as several layers or as one. `dtype` converts the factors (`float32`, `bfloat16`, `float16`);
    without it they keep theirs. `force` replaces a file that is there.
    """

    scale: float | None = None
    lora_alpha: float | None = None
    loader: str | None = None
    model_names: Iterable[str] | None = None
    dtype: str | None = None
    force: bool = False


def repair_file(
    lora: Path | str, to: str, out: Path | str, options: RepairOptions | None = None, **fields: Any
) -> RepairReport:
    """Write `lora` in the format `to` as the new file (or folder) `out`, so that strength 1.0 gives the trained effect.

    alpha becomes the rank and the trained scale is folded into B: readers that use alpha / rank and readers that
    ignore alpha then agree. The fields of `options` may be given by keyword.

    Raises:
        UserError: the file cannot be read or repaired, the loader has no known law, both `scale` and `lora_alpha` are
            given, `out` exists (without `force`) or is `lora` itself, or the written file does not give the trained
            effect; nothing is left behind then.
    """
    from harness.doctor.mending import not_read
    from harness.doctor.trainers import unused_alpha

    options = dataclasses.replace(options or RepairOptions(), **fields)
    if options.scale is not None and options.lora_alpha is not None:
        raise UserError("scale and lora_alpha say the same in two ways: give one of them")
    read = read_lora(lora)
    adapter = with_alpha(read, options.lora_alpha)
    target = _target(adapter, to, Path(out), options.force)
    layers = _layers(options.model_names)
    gain = gain_of(options.loader, to) if options.loader else Gain()
    places = homes(adapter, to, layers)
    plan = plan_repair(adapter, to, places, gain, scale=options.scale, dtype=options.dtype)
    with _beside(target) as folder:
        written = _written(folder / target.name, to, _content(adapter, to, plan))
        errors = proved(adapter, written, plan, gain)
        _moved(written, target)
    more = filter(None, (not_read(target, to, named=layers is not None), unused_alpha(read, options.lora_alpha)))
    scales = [scale for module in plan.modules for scale in module.scales.values()] or [1.0]
    return RepairReport(
        path=str(target),
        format=to,
        modules=len(plan.modules),
        carried=len(plan.carried),
        scales=(min(scales), max(scales)),
        loader=options.loader,
        law=gain.formula,
        measured=gain.measured,
        rounded=sum(error > 0 for error in errors),
        error=max(errors, default=0.0),
        notes=(*_notes(gain, plan, errors), *notes_on(adapter, layers), *more),
    )


def _layers(names: Iterable[str] | None) -> Layers | None:
    return names if names is None or isinstance(names, Mapping) else dict.fromkeys(names)


def _target(adapter: LoraAdapter, to: str, out: Path, force: bool) -> Path:
    """Return where the file goes, refusing what must not be written."""
    if to not in FORMATS:
        raise UserError(f"format={to!r} is unknown, known are {', '.join(FORMATS)}")
    refuse_what_would_change(adapter, to)
    if not FORMATS[to].folder and out.suffix != FORMATS[to].suffix:
        out = out.with_name(out.name + FORMATS[to].suffix)
    if out.exists() and (out.samefile(adapter.path) or out.samefile(adapter.file.path)):
        raise UserError(f"{out}: is the file itself; write a new one")
    if os.path.lexists(out) and not force:
        raise UserError(f"{out}: exists already; --force replaces it")
    return out


def _content(adapter: LoraAdapter, to: str, plan: RepairPlan) -> Content:
    """Return what goes into the new file."""
    by_prefix: dict[str, list[RepairedModule]] = {}
    for module in plan.modules:
        by_prefix.setdefault(module.home.prefix, []).append(module)
    tensors = {new: adapter.file.tensor(key) for new, key in plan.carried.items()}
    config: dict[str, Any] = {}
    for prefix, modules in by_prefix.items():
        part = _of_component(adapter, to, prefix, modules)
        tensors |= part.tensors
        config |= part.config
    alphas = {module.alpha for module in plan.modules}
    if FORMATS[to].alpha[0] == "kv" and len(alphas) > 1:
        raise UserError(f"cannot be written as {to}: one alpha for all modules, these have ranks that differ")
    return Content(dict(sorted(tensors.items())), _metadata(adapter, to), config, next(iter(alphas), None))


def _of_component(adapter: LoraAdapter, to: str, prefix: str, modules: list[RepairedModule]) -> Content:
    """Return the tensors and the configuration of one component."""
    row, plain = FORMATS[to], [module for module in modules if module.plain]
    try:
        tensors = _plain_tensors(to, prefix, plain)
        generated = _generated(to, modules)
    except ValueError as error:
        raise UserError(f"cannot be written as {to}: {error}") from None
    for module in modules:
        if not module.plain:
            tensors |= {part.key: part.new for part in module.parts.values()}
            if row.alpha[0] == "tensor" and module.alpha is not None:
                stem = prefix + stem_of(row, module.home.name)
                tensors[f"{stem}.alpha"] = torch.tensor(module.alpha, dtype=torch.float32)
    config = _config(adapter, to, modules, generated)
    if row.alpha[0] == "header":
        config = {f"{prefix}{key}": value for key, value in config.items()}
    return Content(tensors, {}, config)


def _generated(to: str, modules: list[RepairedModule]) -> dict[str, Any]:
    """Return the configuration of one component; names in a text encoder go without the `text_model.` that it may lack.

    transformers 5 has no such module: diffusers takes the word out of the keys, and leaves the names in the header.
    """
    start = _WRAPPER if modules[0].home.prefix.startswith("text_encoder") else ""
    config = configuration(FORMATS[to], {module.home.name.removeprefix(start): module for module in modules})
    if config and any("magnitude" in module.module.keys for module in modules):
        config["use_dora"] = True
    for name in ("rank_pattern", "alpha_pattern") if start else ():
        if name in config:
            config[name] = {pattern.removeprefix("^"): value for pattern, value in config[name].items()}
    return config


def _plain_tensors(to: str, prefix: str, plain: list[RepairedModule]) -> dict[str, Tensor]:
    weights = {m.home.name: LoraWeights(m.parts["A"].new, m.parts["B"].new, m.alpha) for m in plain}
    if len(weights) < len(plain):
        raise ValueError("two modules would get one name")
    return dict(compose(to, weights, prefix=prefix).tensors) if weights else {}


def _config(
    adapter: LoraAdapter, to: str, modules: list[RepairedModule], generated: dict[str, Any]
) -> Mapping[str, Any]:
    """Return the configuration of one component: the source's own within its format, which says alpha = rank."""
    component = modules[0].module.component
    source = adapter.config.get(component, adapter.config)
    if to != adapter.format or not generated or not source:
        return generated
    if FORMATS[to].alpha[0] == "scale":
        return {**source, MLX: {**source[MLX], "scale": generated[MLX]["scale"]}}
    renamed = any(module.home.name != module.module.name for module in modules)
    names = [module.home.name for module in modules if module.module.variant != "experts"]
    return _config_with(source, generated, renamed=renamed, names=names)


def _config_with(
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


def _metadata(adapter: LoraAdapter, to: str) -> dict[str, str]:
    """Return the header's metadata: within one format the source's, without what is no longer true of the tensors."""
    if to != adapter.format:
        return dict(FORMATS[to].metadata)
    stale = (HEADER_KEY, "ss_network_alpha", "sshs_")
    kept = {key: value for key, value in adapter.metadata.items() if not key.startswith(stale)}
    return {**kept, **FORMATS[to].metadata}


def _written(path: Path, to: str, content: Content) -> Path:
    try:
        return save(path, to, content)
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


def _notes(gain: Gain, plan: RepairPlan, errors: list[float]) -> Iterator[str]:
    rounded = sum(error > 0 for error in errors)
    if rounded:
        parts = [part for module in plan.modules for part in module.parts.values()]
        dtype = str(parts[-1].new.dtype).removeprefix("torch.")
        yield f"B was rounded to {dtype} in {count(rounded, 'module')}, the effect is off by {max(errors):.1e} at most"
    yield from notes_of(plan)
    others = [module for module in plan.modules if module.gain != 1.0]
    if others:
        yield f"folded for this loader: readers that use alpha / rank are {1 / others[0].gain:.4g} times as strong"
    yield from gain.notes
