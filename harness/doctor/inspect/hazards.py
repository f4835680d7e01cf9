"""Split layers stacked into a merged one: B: [out, n * r] whose off-diagonal blocks are exactly zero."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import FileIO

from harness.doctor.inspect.in_peft import peft_hazards
from harness.files import LoraAdapter, LoraModule, TensorInfo
from harness.files.keys import NOT_LORA, cut
from harness.text import count, first_of, parse_json, printable
from harness.verdict.file_record import Hazard

_PREAD = hasattr(os, "pread")
_BLOCKS = (3, 4)  # q, k, v and, in FLUX's single blocks, the MLP


def block_diagonal(adapter: LoraAdapter) -> Iterator[tuple[str, int]]:
    """Yield (module, number of blocks) where the first and last rows of B say that it is block-diagonal.

    Reads one or two rows of each module from the file, as bytes: no torch. Blocks of rows may differ in height, blocks
    of columns may not.
    """
    able = [name for name, module in adapter.modules.items() if _divides(module)]
    if not able:
        return
    with adapter.file.path.open("rb", buffering=0) as stream:
        for name in able:
            info = adapter.file.tensors[adapter.modules[name].keys["B"]]
            if len(info.shape) == 2 and 0 not in info.shape and (blocks := _blocks(stream, info)):
                yield name, blocks


def _divides(module: LoraModule) -> bool:
    if module.kernel or "B" in module.flipped or "B" not in module.keys:
        return False
    return 0 in [module.rank % blocks for blocks in _BLOCKS]


def _blocks(stream: FileIO, info: TensorInfo) -> int | None:
    _, (rows, columns), start, end = info
    width = (end - start) // rows
    first = _row(stream, start, width)
    for blocks in _BLOCKS:
        if columns % blocks or not _only(first, 0, width // blocks):
            continue
        if _only(_row(stream, end - width, width), width - width // blocks, width):
            return blocks
    return None


def _row(stream: FileIO, start: int, width: int) -> bytes:
    if _PREAD:
        return os.pread(stream.fileno(), width, start)
    stream.seek(start)
    return stream.read(width)


def _only(row: bytes, start: int, end: int) -> bool:
    """Tell whether `row` is non-zero somewhere in [start, end) and zero everywhere else."""
    return not any(row[end:]) and not any(row[:start]) and any(row[start:end])


_WHOLE_UP_TO = {"BF16": 256, "F16": 2048, "F8_E4M3": 16, "F8_E5M2": 8}
_LEAST_ROUNDED = min(_WHOLE_UP_TO.values())
_KINDS = {**NOT_LORA, "alpha": "alpha that no module uses"}
_ODD: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("zero", "readers take it as 0, as 1 or as the rank", lambda alpha: alpha == 0),
    ("negative", "some readers hang or fail, the others invert the LoRA", lambda alpha: alpha < 0),
    ("enormous", "no trainer sets such a value", lambda alpha: 1e6 < alpha < math.inf),
)
_LONG = 200_000
_ALPHA_KEYS = ("ss_network_alpha", "lora_alpha", "network_alpha", "alpha")
_UNSAID = frozenset({"", "none", "null", "dynamic"})
_HALVES = re.compile(r"(final_layer[._]adaLN_modulation[._]1|norm_out[._]linear)$")


def hazards(adapter: LoraAdapter) -> tuple[Hazard, ...]:
    """Return everything about `adapter` that a reader may take differently, one entry per kind."""
    found = [hazard for check in CHECKS for hazard in check(adapter)]
    return tuple(sorted(found, key=lambda hazard: hazard.code))


def problems(adapter: LoraAdapter) -> Iterator[Hazard]:
    """Fold what was wrong while reading: one hazard per code and sentence, with the first key and how many more."""
    groups: dict[tuple[str, str], list[str]] = {}
    for problem in adapter.problems:
        groups.setdefault((problem.code, problem.what), []).append(problem.key)
    for (code, what), keys in groups.items():
        more = f" (and {count(len(keys) - 1, 'more key')})" if len(keys) > 1 else ""
        yield Hazard(code=code, what=(f"{keys[0]}: {what}" if keys[0] else what) + more)


def no_alpha(adapter: LoraAdapter) -> Iterator[Hazard]:
    """LH701 and LH702: the trained scale cannot be told where alpha is missing."""
    scaled = list(_scaled(adapter))
    without = [name for name, m in scaled if m.alpha is None and not m.unscaled and "alpha" not in m.keys]
    if 0 < len(without) < len(scaled):
        what = f"{len(without)} of {count(len(scaled), 'module')} carry no alpha ({first_of(without)})"
        yield Hazard(code="LH702", what=f"{what}: readers give them scale 1, or the alpha of the others")
    elif without and adapter.alpha_source == "none":
        yield Hazard(code="LH701", what=_lost_alpha(adapter))


def _lost_alpha(adapter: LoraAdapter) -> str:
    alone = "there is no alpha: adapter_config.json, which holds it, is missing"
    where = alone if adapter.format == "peft" else "no alpha in the file"
    declared = ", ".join(f"{key} = {value:g}" for key, value in _declared_alphas(adapter.metadata).items())
    hint = f"; the metadata say {declared}" if declared else ""
    ranks = {module.rank for _, module in _scaled(adapter)}
    mixed = "; the ranks differ, so one strength may not do" if len(ranks) > 1 else ""
    truth = "the trained scale is unknown: readers take 1, training may have used lora_alpha / rank; look it up in the "
    truth += "training configuration"
    return f"{where}; {truth}{hint}{mixed}"


def mixed_ratios(adapter: LoraAdapter) -> Iterator[Hazard]:
    """LH703: alpha / rank differs between modules, or alpha follows a rank that does."""
    modules = [module for _, module in _scaled(adapter) if module.alpha is not None]
    if len({(module.alpha, module.rank, module.rslora) for module in modules}) < 2:
        return
    ratios = Counter(f"{module.trained_scale:.4g}" for module in modules)
    alphas = Counter(f"{module.alpha:.4g}" for module in modules)
    if len(ratios) > 1:
        what = f"alpha / rank differs between modules ({_spread(ratios)})"
        yield Hazard(code="LH703", what=f"{what}: loaders that keep one number for the file are wrong")
    elif len(alphas) > 1:
        what = f"alpha / rank is {next(iter(ratios))} everywhere, but alpha follows the rank ({_spread(alphas)})"
        yield Hazard(code="LH703", what=f"{what}: loaders that keep one alpha for the file are wrong")


def fused_blocks(adapter: LoraAdapter) -> Iterator[Hazard]:
    """LH704: B of a merged layer is block-diagonal, so the stored rank is a multiple of the trained one."""
    found = list(block_diagonal(adapter))
    if not found:
        return
    name, blocks = found[0]
    rank = adapter.modules[name].rank
    what = f"B is block-diagonal in {count(len(found), 'module')} ({printable(name, 80)}: {blocks} blocks of rank "
    each, times = rank // blocks, adapter.modules[name].stacked
    if times > 1:
        trap = f"trained at alpha / {each} (split_qkv), while every tool divides by {rank}: 1/{times} of the effect"
    else:
        trap = f"an alpha that is still that of training belongs over {each}, and over {rank} is 1/{blocks} of the "
        trap += f"effect; one that a converter multiplied by {blocks} is right, and the file does not say which it is"
    yield Hazard(code="LH704", what=f"{what}{each}): {trap}")


def odd_alphas(adapter: LoraAdapter) -> Iterator[Hazard]:
    """LH705: zero, negative or huge alpha."""
    alphas = {module.alpha for _, module in _scaled(adapter) if module.alpha is not None}
    for kind, effect, is_odd in (row for row in _ODD if any(map(row[2], alphas))):
        names = [name for name, module in _scaled(adapter) if module.alpha is not None and is_odd(module.alpha)]
        if names:
            where = f"{count(len(names), 'module')} ({first_of(names)}: {adapter.modules[names[0]].alpha:g})"
            yield Hazard(code="LH705", what=f"{kind} alpha in {where}: {effect}")


def not_understood(adapter: LoraAdapter) -> Iterator[Hazard]:
    """LH708: keys that no module took, other than those of modules that are reported as broken."""
    broken = {parts[0] for problem in adapter.problems if problem.fatal and (parts := cut(problem.key))}
    kinds: dict[str, list[str]] = {}
    for key in adapter.unused_keys:
        stem, tail = cut(key) or (None, "")
        if stem not in broken:
            kinds.setdefault(_KINDS.get(tail, "unknown"), []).append(key)
    number, total = sum(map(len, kinds.values())), len(adapter.file.keys)
    if number:
        listed = "; ".join(f"{len(keys)} {kind} ({printable(keys[0], 80)})" for kind, keys in kinds.items())
        share = f"{number} of {count(total, 'key')} not understood ({number / total:.0%})"
        yield Hazard(code="LH708", what=f"{share}: {listed}")


def ambiguous_layouts(adapter: LoraAdapter) -> Iterator[Hazard]:
    """LH709: a DoRA magnitude whose axis readers take differently, or halves that tools store in either order."""
    names = [name for name, module in adapter.modules.items() if _odd_magnitude(adapter, module)]
    if names:
        what = f"dora_scale lies on the output axis in {count(len(names), 'module')} ({first_of(names)})"
        yield Hazard(code="LH709", what=f"{what}: readers differ in the axis and in which weight they normalise")
    able = (name for name in adapter.modules if "norm_out" in name or "final_layer" in name)
    swapped = [name for name in able if _HALVES.search(adapter.modules[name].name)]
    if swapped:
        what = "shift and scale are stored in the opposite order by diffusers and by the original models"
        yield Hazard(code="LH709", what=f"{first_of(swapped)}: {what}")


def rounded_alphas(adapter: LoraAdapter) -> Iterator[Hazard]:
    """LH710: alpha in half precision, above the whole numbers that type can hold."""
    found = [(name, dtype) for name, module in adapter.modules.items() if (dtype := _rounding_dtype(adapter, module))]
    if found:
        name, dtype = found[0]
        what = f"alpha {adapter.modules[name].alpha:g} in {count(len(found), 'module')} ({printable(name, 80)})"
        yield Hazard(code="LH710", what=f"{what} is {dtype}, which rounds whole numbers above {_WHOLE_UP_TO[dtype]}")


def _rounding_dtype(adapter: LoraAdapter, module: LoraModule) -> str | None:
    alpha = module.alpha if module.alpha is not None and math.isfinite(module.alpha) else 0.0
    if abs(alpha) < _LEAST_ROUNDED or not module.rank or "alpha" not in module.keys:
        return None
    dtype = adapter.file.tensors[module.keys["alpha"]].dtype
    return dtype if abs(alpha) >= _WHOLE_UP_TO.get(dtype, math.inf) else None


def disagreeing_metadata(adapter: LoraAdapter) -> Iterator[Hazard]:
    """LH711: the metadata name an alpha that no module has."""
    rooted = str(_object(adapter.metadata.get("ss_network_args", "")).get("rs_lora", "")).lower() == "true"
    alphas = {  # LyCORIS stores alpha * sqrt(rank) where it trained with alpha / sqrt(rank)
        module.alpha / math.sqrt(module.rank if rooted else 1)
        for _, module in _scaled(adapter)
        if module.alpha is not None and module.rank
    }
    for key, declared in _declared_alphas(adapter.metadata).items():
        if alphas and not any(abs(alpha - declared) <= 0.01 * abs(declared) for alpha in alphas):
            have = ", ".join(f"{alpha:g}" for alpha in sorted(alphas)[:4])
            yield Hazard(code="LH711", what=f"the metadata say {key} = {declared:g}, the modules have {have}")


def wrapped_names(adapter: LoraAdapter) -> Iterator[Hazard]:
    """LH712: words of torch.compile, FSDP or DDP in the names, which no loader looks for."""
    keys = adapter.file.keys
    for word, found in adapter.file.wrappers.items():
        what = f"{word} stands in {len(found)} of {count(len(keys), 'key')} ({printable(found[0], 100)})"
        yield Hazard(code="LH712", what=f"{what}: PEFT and diffusers load nothing of these")


_ORIGINAL = re.compile(r"(input|output)_blocks[._]\d|middle_block[._]|(double|single)_blocks[._]\d")
_DIFFUSERS = re.compile(r"(down|up)_blocks[._]\d|mid_block[._]|(single_)?transformer_blocks[._]\d")
_FUSED = re.compile(r"(.*?[._])?(?:to_)?(?:w?qkv|query_key_value|qkv_proj|qkv_mlp|added_qkv)$", re.IGNORECASE)
_SPLIT = re.compile(r"(.*?[._])?(?:to_q|q_proj|q|query|wq|q_lin)$", re.IGNORECASE)


def two_schemes(adapter: LoraAdapter) -> Iterator[Hazard]:
    """LH715: the layers of one model by names of two kinds, as the original authors and as diffusers call them."""
    names = [module.name for module in adapter.modules.values()]
    original, own = (list(filter(kind.match, names)) for kind in (_ORIGINAL, _DIFFUSERS))
    if original and own:
        what = f"{count(len(original), 'module')} in the original model's names ({first_of(original)}), {len(own)} in "
        yield Hazard(
            code="LH715", what=f"{what}diffusers' ({first_of(own)}): most readers of one kind leave out the other"
        )
    if "qkv" not in (text := "\n".join(names).lower()) and "query_key_value" not in text:
        return
    fused, split = ({hit[1] or "": name for name in names if (hit := kind.match(name))} for kind in (_FUSED, _SPLIT))
    if both := sorted(fused.keys() & split.keys()):
        what = f"{printable(fused[both[0]], 80)} (q, k and v in one) stands beside {printable(split[both[0]], 80)}"
        yield Hazard(
            code="LH715", what=f"{what}: they mean the same rows of one layer: a reader adds both, or leaves one out"
        )


def scale_of_versions(adapter: LoraAdapter) -> Iterator[Hazard]:
    """LH716: the files of mlx-lm and mlx-vlm of which one release trained with another factor than the next reads."""
    if adapter.alpha_by_release:
        whole, over = adapter.alpha_by_release
        old = f"mlx-vlm up to 0.4.4 trains and loads with alpha = {whole:.4g} as the whole factor, from 0.5.0 on with "
        what = f"{old}alpha / rank = {whole / over:.4g}, and the file does not say which of them trained it"
        yield Hazard(code="LH716", what=what)
    raw = adapter.config.get("lora_parameters") if adapter.format == "mlx" else None
    numbers = raw if isinstance(raw, dict) else {}
    alpha, scale, rank = (numbers.get(key) for key in ("alpha", "scale", "rank"))
    if all(isinstance(number, int | float) and number for number in (alpha, scale, rank)) and alpha != rank:
        old = f"before June 2024 mlx-lm trained with scale * alpha / rank = {scale * alpha / rank:.4g}"  # type: ignore[operator]
        yield Hazard(code="LH716", what=f"{old}, later versions load this file with scale = {scale:.4g}")


CHECKS: Sequence[Callable[[LoraAdapter], Iterable[Hazard]]] = (
    problems, no_alpha, mixed_ratios, fused_blocks, odd_alphas, not_understood, ambiguous_layouts, rounded_alphas,
    disagreeing_metadata, wrapped_names, two_schemes, scale_of_versions, peft_hazards,
)  # fmt: skip


def _scaled(adapter: LoraAdapter) -> Iterator[tuple[str, LoraModule]]:
    """Yield the modules whose scale alpha decides; a LoKr of two full factors has scale 1 whatever alpha says."""
    return ((name, module) for name, module in adapter.modules.items() if module.rank > 0)


def _odd_magnitude(adapter: LoraAdapter, module: LoraModule) -> bool:
    shape = adapter.file.tensors[module.keys["magnitude"]].shape if "magnitude" in module.keys else ()
    return len(shape) > 1 and shape[0] == module.out_features and shape[0] != 1


def _spread(counts: Counter[str]) -> str:
    listed = ", ".join(f"{value} in {times}" for value, times in counts.most_common(4))
    return listed + (f", and {len(counts) - 4} more" if len(counts) > 4 else "")


def _declared_alphas(metadata: Mapping[str, str]) -> dict[str, float]:
    """Return the finite alphas that the metadata names, by key; `conv_alpha` comes from the network arguments."""
    named = {key: metadata[key] for key in _ALPHA_KEYS if key in metadata}
    arguments = _object(metadata.get("ss_network_args", ""))
    if "conv_alpha" in arguments:
        named["ss_network_args conv_alpha"] = str(arguments["conv_alpha"])
    found = {key: _number(text) for key, text in named.items() if text.strip().lower() not in _UNSAID}
    return {key: value for key, value in found.items() if value is not None}


def _object(text: str) -> Mapping[str, object]:
    try:
        value = parse_json(text, limit=_LONG)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _number(text: str) -> float | None:
    if len(text) > 40:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
