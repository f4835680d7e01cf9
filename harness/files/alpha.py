"""Where alpha is: a tensor per module, adapter_config.json, the safetensors header, or nowhere."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.errors import LoraFileError
from harness.files.adapter import LoraModule, Problem
from harness.files.config import LORA_METHODS, PAIRED, AdapterConfig, Budget, ConfigError, method_of, pattern_problems
from harness.files.format import CONFIG_NAME, HEADER_KEY, Format, Source
from harness.files.gguf_file import ALPHA_KEY
from harness.files.keys import OTHER_VARIANTS
from harness.files.peft_folder import experts
from harness.files.tensor_file import scalar_problem
from harness.text import parse_json, printable

Modules = dict[tuple[str, str], LoraModule]
MLX = "lora_parameters"
_WITHOUT_ALPHA = frozenset({"diff", "norm", "set", "tokens", "copy"})
_SPLIT = re.compile(r'"split_qkv":\s*"?true', re.IGNORECASE)
_DIGITS = 10  # of a rank, at most
_LARGEST = 1e300  # a JSON integer may be longer than any float


@dataclass
class Alphas:
    """The modules with their alpha filled in, where it came from, and the configuration as far as there is one."""

    modules: Modules
    source: str = "none"
    config: Mapping[str, Any] = field(default_factory=dict)


def find_alphas(source: Source, row: Format, modules: Modules, problems: list[Problem]) -> Alphas:
    """Fill in alpha from the first place the format knows that has one."""
    found = Alphas(modules)
    for home, fill in (("scale", _from_scale), ("releases", _from_releases), ("kv", _from_kv)):
        if home in row.alpha:
            found = fill(source, modules, problems)
    if configs := _configs(source, row, modules):
        inside = "config" not in row.alpha and HEADER_KEY in source.file.metadata
        home, place = ("header", HEADER_KEY) if inside else ("config", CONFIG_NAME)
        config = next(iter(configs.values())) if len(configs) == 1 or not inside else configs
        found = Alphas(_from_configs(modules, configs, place, problems), home, config)
    if "tensor" in row.alpha:
        found = _from_tensors(source, found, problems)
    if row.alpha[0] == "none" or _is_toolkit(source, row) or _is_extracted(row, found):
        found.modules = {at: m.changed(unscaled=m.alpha is None and m.rank > 0) for at, m in found.modules.items()}
    if row.alpha[0] == "tensor" and _SPLIT.search(source.file.metadata.get("ss_network_args", "")):
        found.modules = dict(_split(source, found.modules))
    return _refuse_non_finite(found, problems)


def _split(source: Source, modules: Modules) -> Iterator[tuple[tuple[str, str], LoraModule]]:
    """Yield the modules, those that sd-scripts trained as several and stacked when it saved them as such.

    With `split_qkv` q, k, v and the rest of a merged layer have a LoRA each; the file has their ranks added up and the
    alpha of one (sd-scripts `LoRANetwork.state_dict`). Converters that multiply alpha are told by it.
    """
    number, alpha = (source.file.metadata.get(f"ss_network_{name}", "") for name in ("dim", "alpha"))
    dim = int(number) if number.isdecimal() and len(number) < _DIGITS else 0
    for place, module in modules.items():
        times = module.rank // dim if dim and module.rank % dim == 0 else 1
        alone = times > 1 and module.alpha is not None and _same(module.alpha, alpha)
        yield place, module.changed(stacked=times) if alone else module


def _same(alpha: float, said: str) -> bool:
    try:
        return math.isclose(alpha, float(said), rel_tol=1e-2)
    except ValueError:
        return False


def _is_toolkit(source: Source, row: Format) -> bool:
    """Tell whether ai-toolkit wrote the file: it sets alpha = rank and saves none."""
    return "software" in source.file.metadata and row.dialect(source.file) == "ai-toolkit"


def _is_extracted(row: Format, found: Alphas) -> bool:
    """Tell whether the pairs were extracted from the difference of two models: whole differences of the rest beside."""
    if row.name != "comfyui" or found.source != "none":
        return False
    ends = {key.rpartition(".")[2] for module in found.modules.values() for key in module.keys.values()}
    halves = [module.keys["A"] for module in found.modules.values() if "A" in module.keys]
    return bool({"diff", "diff_b"} & ends) and all(key.endswith(".lora_down.weight") for key in halves)


def _from_scale(source: Source, modules: Modules, problems: list[Problem]) -> Alphas:
    """Fill in alpha = scale * rank, so that alpha / rank is the factor that mlx-lm multiplies with."""
    if source.config is None:
        return Alphas(modules)
    raw = source.config.get(MLX)
    parameters = raw if isinstance(raw, dict) else {}
    scale, rank = parameters.get("scale"), parameters.get("rank")
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        what = f"is {printable(repr(scale), 60)}, a number is needed: mlx-lm has no default when it loads"
        problems.append(Problem("LH705", f"{CONFIG_NAME}: {MLX}.scale", what, fatal=True))
        return Alphas(modules, config=source.config)
    _refuse_other_ranks(modules, rank, problems)
    factor = float(min(scale, _LARGEST))
    return Alphas(_each(modules, lambda module: factor * module.rank), "config", source.config)


def _from_releases(source: Source, modules: Modules, problems: list[Problem]) -> Alphas:
    """Fill in alpha where all releases of mlx-vlm multiply by the same: alpha is alpha / rank of rank 1."""
    if source.config is None:
        return Alphas(modules)
    alpha, rank = source.config.get("alpha"), source.config.get("rank")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        what = f"is {printable(repr(alpha), 60)}, a number is needed"
        problems.append(Problem("LH705", f"{CONFIG_NAME}: alpha", what, fatal=True))
        return Alphas(modules, config=source.config)
    _refuse_other_ranks(modules, rank, problems)
    alone = rank == 1
    number = float(min(alpha, _LARGEST))
    return Alphas(_each(modules, lambda module: number) if alone else modules, "config", source.config)


def _refuse_other_ranks(modules: Modules, rank: object, problems: list[Problem]) -> None:
    for module in modules.values():
        if module.rank not in (0, rank):
            what = f"the configuration says rank {printable(repr(rank), 40)}, the tensors have rank {module.rank}"
            problems.append(Problem("LH706", printable(module.name), what, fatal=True))


def _from_kv(source: Source, modules: Modules, problems: list[Problem]) -> Alphas:
    """Fill in the alpha of a GGUF header; 0 is llama.cpp's word for none."""
    text = source.file.metadata.get(ALPHA_KEY, "0")
    try:
        alpha = float(text)
    except ValueError:
        problems.append(Problem("LH705", ALPHA_KEY, f"is {printable(text, 60)}, a number is needed", fatal=True))
        return Alphas(modules)
    return Alphas(_each(modules, lambda module: alpha), "header") if alpha else Alphas(modules)


def _each(modules: Modules, alpha: Callable[[LoraModule], float]) -> Modules:
    return {at: module.changed(alpha=alpha(module)) if module.rank else module for at, module in modules.items()}


def _configs(source: Source, row: Format, modules: Modules) -> dict[str, Mapping[str, Any]]:
    """Return the raw configuration of each component that has one, from the place where the format keeps it."""
    if "config" in row.alpha:
        return {} if source.config is None else {"": source.config}
    if "header" not in row.alpha or HEADER_KEY not in source.file.metadata:
        components = {place[0] for place in modules}
        return dict.fromkeys(components, source.config) if "beside" in row.alpha and source.config else {}
    try:
        raw = parse_json(source.file.metadata[HEADER_KEY])
    except ValueError as error:
        raise LoraFileError(source.file.path, str(error), key=HEADER_KEY) from error
    if not isinstance(raw, dict):
        raise LoraFileError(source.file.path, "is not a JSON object", key=HEADER_KEY)
    found = {component: _of_component(raw, component) for component in {place[0] for place in modules}}
    return {component: part for component, part in found.items() if part}


def _of_component(raw: Mapping[str, Any], component: str) -> dict[str, Any]:
    if not component:
        return dict(raw)
    prefix = f"{component}."
    return {key[len(prefix) :]: value for key, value in raw.items() if key.startswith(prefix)}


def _from_configs(
    modules: Modules, configs: Mapping[str, Mapping[str, Any]], place: str, problems: list[Problem]
) -> Modules:
    if method_of(next(iter(configs.values()))) not in PAIRED | LORA_METHODS:
        return modules
    budget = Budget()
    try:
        parsed = {component: AdapterConfig.parse(raw, budget) for component, raw in configs.items()}
        return {
            at: _configured(module, parsed[at[0]], problems) if at[0] in parsed else module
            for at, module in modules.items()
        }
    except ConfigError as error:
        problems.append(Problem(error.code, f"{place}: {error.key}", printable(error), fatal=True))
    finally:
        names, budget = [module.name for module in modules.values()], Budget()
        found = (error for raw in configs.values() for error in pattern_problems(raw, names, budget))
        problems += (Problem(error.code, f"{place}: {error.key}", printable(error)) for error in found)
    return modules


def _configured(module: LoraModule, config: AdapterConfig, problems: list[Problem]) -> LoraModule:
    if module.variant in _WITHOUT_ALPHA:
        return module
    if module.variant == "adalora":  # its rank_pattern tells which of the ranks are left; the tensors have those only
        return module.changed(alpha=config.alpha if config.alpha > 0 else float(module.rank))
    rank, alpha = config.of(module.name)
    if module.variant == "experts" and module.flipped:  # AutoModel may give experts a rank of their own
        return module.changed(alpha=alpha, rslora=config.rslora)
    if module.variant == "experts":
        if found := experts(module, rank):
            return found.changed(alpha=alpha, rslora=config.rslora)
        what = f"the tensors hold {module.rank} rows, which are no experts of the configured rank {rank}"
        problems.append(Problem("LH706", printable(module.name), what, fatal=True))
        return module
    if module.variant == "lokr":  # PEFT divides by the configured rank even where both factors are full
        return module.changed(rank=rank, alpha=alpha, rslora=config.rslora)
    if rank != module.rank:
        what = f"the configuration says rank {rank}, the tensors have rank {module.rank}"
        problems.append(Problem("LH706", printable(module.name), what, fatal=True))
    return module.changed(alpha=alpha, rslora=config.rslora)


def _from_tensors(source: Source, found: Alphas, problems: list[Problem]) -> Alphas:
    """Take alpha from tensors where no configuration gave one; where one did, the tensor is left as unused."""
    readable = _readable(source, found.modules, problems)
    values = source.file.numbers(readable)
    modules = dict(found.modules)
    for place, module in found.modules.items():
        key = "" if module.variant in OTHER_VARIANTS else module.keys.get("alpha", "")  # OFT's is a constraint
        if module.alpha is None and key in values:
            modules[place] = module.changed(alpha=values[key])
        elif module.alpha is not None and key:
            modules[place] = module.changed(keys={role: k for role, k in module.keys.items() if role != "alpha"})
            if key in values and not math.isclose(module.alpha, values[key], rel_tol=1e-2):
                what = f"the tensor says alpha {values[key]:g}, the {found.source} says {module.alpha:g}"
                problems.append(Problem("LH711", printable(key), what))
    home = "tensor" if found.source == "none" and values else found.source
    return Alphas(modules, home, found.config)


def _readable(source: Source, modules: Modules, problems: list[Problem]) -> list[str]:
    keys = []
    for module in modules.values():
        if (key := module.keys.get("alpha")) and module.variant not in OTHER_VARIANTS:
            info = source.file.tensors[key]
            if problem := scalar_problem(info.dtype, info.elements):
                problems.append(Problem("LH705", printable(key), f"alpha {problem}", fatal=True))
            else:
                keys.append(key)
    return keys


def _refuse_non_finite(found: Alphas, problems: list[Problem]) -> Alphas:
    for place, module in found.modules.items():
        if module.alpha is None or math.isfinite(module.alpha):
            continue
        if not module.rank:  # of two full factors it means nothing; ai-toolkit's 1e10 is infinite in float16
            found.modules[place] = module.changed(alpha=None)
        else:
            key = module.keys.get("alpha") or module.name
            problems.append(Problem("LH705", printable(key), f"alpha is {module.alpha}", fatal=True))
    return found
