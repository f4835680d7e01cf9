"""A path in, a `LoraAdapter` out: the folder or file, its validated header, and the configuration beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import LoraFileError
from harness.files.adapter import LoraAdapter, LoraModule, Problem
from harness.files.alpha import find_alphas
from harness.files.detect import Sorted, detect, sort_keys
from harness.files.format import CONFIG_NAME, MLX_WEIGHTS_NAME, WEIGHTS_NAME, Format, Place, Source
from harness.files.formats import FORMATS
from harness.files.gguf_file import is_gguf, read_gguf
from harness.files.peft_folder import add_peft_parts
from harness.files.safetensors_file import read_header
from harness.files.shapes import Signature, measure, turned
from harness.files.tensor_file import os_problem
from harness.text import count, is_printable, parse_json, printable

_MAX_CONFIG_BYTES = 8_000_000
_PICKLED = "adapter_model.bin"
_NAMED = (WEIGHTS_NAME, MLX_WEIGHTS_NAME)  # the names that have a configuration beside them
_STEP = re.compile(r"\d+_adapters\.safetensors")
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
_SUFFIXES = (".safetensors", ".gguf")


def open_source(path: Path | str) -> Source:
    """Open a LoRA file, or a folder that holds one.

    The configuration is read when the weights are `adapter_model.safetensors` (PEFT) or `adapters.safetensors`
    (mlx-lm); `Source.path` is then the folder.

    Raises:
        LoraFileError: one sentence saying what is missing or malformed.
    """
    path = Path(path)
    try:
        weights = _weights_in(path) if path.is_dir() else path
        file = read_gguf(weights) if is_gguf(weights) else read_header(weights)
        config = _config(weights.parent / CONFIG_NAME) if _is_named(weights) else None
    except OSError as error:
        raise LoraFileError(path, os_problem(error)) from error
    return Source(weights.parent if config is not None and weights.name in _NAMED else weights, file, config)


def _is_named(weights: Path) -> bool:
    """Tell whether a configuration beside the weights is theirs: by name, as a step of mlx-lm, or as the only file."""
    if weights.name in _NAMED or _STEP.fullmatch(weights.name):
        return True
    return (weights.parent / CONFIG_NAME).exists() and len(_candidates(weights.parent)) == 1


def _candidates(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.suffix in _SUFFIXES)


def _weights_in(folder: Path) -> Path:
    if named := next((folder / name for name in _NAMED if (folder / name).exists()), None):
        return named
    found = _candidates(folder)
    if len(found) == 1:
        return folder / found[0]
    if found and all(map(_SHARD.search, found)):
        what = f"holds one LoRA in {len(found)} shards: PEFT and diffusers open a single file, join them first"
        raise LoraFileError(folder, what)
    if found:
        shown = ", ".join(printable(name, 60) for name in found[:4])
        raise LoraFileError(folder, f"a folder with {len(found)} safetensors files ({shown}, …): name one of them")
    if (folder / _PICKLED).exists():
        raise LoraFileError(folder / _PICKLED, "is a pickle, which can run code when opened: save it as safetensors")
    inside = sorted(one.name for one in folder.iterdir() if any((one / name).is_file() for name in _NAMED))
    shown = ", ".join(printable(name, 60) for name in inside[:4]) + (", …" if len(inside) > 4 else "")
    more = f"; it has folders with one ({shown}): name one of them" if inside else ""
    raise LoraFileError(folder, f"a folder without {WEIGHTS_NAME} or any other safetensors file{more}")


def _config(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    if not path.is_file() or path.stat().st_size > _MAX_CONFIG_BYTES:
        raise LoraFileError(path, f"is not a regular file of at most {_MAX_CONFIG_BYTES:,} bytes")
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise LoraFileError(path, str(error)) from error
    if not isinstance(value, dict):
        raise LoraFileError(path, f"holds a JSON {type(value).__name__}, an object is needed")
    return value


def detect_format(path: Path | str) -> str:
    """Return the name of the format of a LoRA file or folder.

    Raises:
        LoraFileError: no format fits, the keys mix formats, or the file cannot be read.
    """
    return detect(open_source(path)).name


def read_lora(path: Path | str, *, format: str | None = None, strict: bool = True) -> LoraAdapter:
    """Read a LoRA file or PEFT folder; only its header and its alphas are read, tensors when asked for.

    With `strict=False` everything that is wrong with single keys is collected in `adapter.problems`, and the modules
    that can be interpreted are returned.

    Raises:
        LoraFileError: the file cannot be read or its format is unknown, or (strict) a module cannot be interpreted.
        ValueError: `format` names no format.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown, known are {', '.join(FORMATS)}")
    source = open_source(path)
    row = FORMATS[format] if format else detect(source)
    adapter = interpret(source, row)
    fatal = [problem for problem in adapter.problems if problem.fatal]
    if strict and fatal:
        more = f" (and {count(len(fatal) - 1, 'more problem')})" if len(fatal) > 1 else ""
        raise LoraFileError(source.file.path, fatal[0].what + more, key=fatal[0].key or None)
    if not adapter.modules and not fatal:
        raise LoraFileError(source.file.path, f"holds no module in the format {row.name} ({row.example})")
    return adapter


def interpret(source: Source, row: Format) -> LoraAdapter:
    """Return the adapter that `source` holds under the format `row`, with everything that is wrong with it."""
    keys = sort_keys(source, row)
    problems = [*_key_problems(source, keys)]
    _add_vectors(source, keys)
    _add_whole(source, row, keys)
    stacked = add_peft_parts(source, row, keys, problems) if row.name == "peft" else frozenset()
    method = source.method if row.name == "peft" else "lora"
    measured: dict[Place, LoraModule] = {}
    known: dict[Signature, LoraModule] = {}
    for place, roles in keys.modules.items():
        if len(roles) == 1 and "alpha" in roles:
            continue
        if module := measure(source.file, place, roles, problems, row.flips(place[1]), known=known, method=method):
            measured[place] = module.changed(variant="experts") if place in stacked else module
    problems += turned(measured.values())
    found = find_alphas(source, row, measured, problems)
    modules = _named(found.modules)
    return LoraAdapter(
        path=source.path if row.folder else source.file.path,
        format=row.name,
        modules=modules,
        metadata=source.file.metadata,
        unused_keys=tuple(key for key in _in_file_order(source, modules) if key not in row.marks),
        alpha_source=found.source,
        flattened=row.flattened,
        file=source.file,
        problems=tuple(problems),
        config=found.config,
    )


def _add_whole(source: Source, row: Format, found: Sorted) -> None:
    """Take what a file of a marked format replaces, and the norms of diffusers' control LoRAs."""
    taken = {key for roles in found.modules.values() for key in roles.values()}
    able = row.name == "diffusers" and ".attn.norm_" in source.file.text
    norms = map(_NORM.fullmatch, source.file.keys) if able else ()
    for norm in filter(None, norms):
        found.modules.setdefault((norm[1], norm[2]), {"set_weight": norm[0]})
    for key in (key for key in source.file.keys if row.marks and key not in taken):
        name, _, what = key.rpartition(".")
        if name and what in ("weight", "bias"):
            found.modules.setdefault(("", name), {}).setdefault(f"set_{what}", key)


_NORM = re.compile(r"(transformer)\.((?:single_)?transformer_blocks\.\d+\.attn\.norm_(?:added_)?[qk])\.weight")
_VECTORS = re.compile(r"<[^<>]+>|bundle_emb\..+")


def _add_vectors(source: Source, found: Sorted) -> None:
    """Take the textual inversions that cloneofsimo's trainer and OneTrainer save inside a LoRA."""
    text = source.file.text
    for key in filter(_VECTORS.fullmatch, source.file.keys) if "<" in text or "bundle_emb." in text else ():
        found.modules.setdefault(("", key), {"embedded_vectors": key})


def _named(measured: dict[Place, LoraModule]) -> dict[str, LoraModule]:
    """Key modules by name; every component after the first is named, so that equal paths stay apart."""
    first = next(iter(measured), ("", ""))[0]
    return {
        name
        if component == first or (not component and (first, name) not in measured)
        else f"{component}:{name}": module
        for (component, name), module in measured.items()
    }


def _key_problems(source: Source, keys: Sorted) -> list[Problem]:
    twice = [Problem("LH799", printable(key), "stands twice in the header", True) for key in source.file.duplicates]
    doubled = [Problem("LH708", printable(key), "a second tensor for the same half", True) for key in keys.doubled]
    return twice + doubled + list(_hostile(source.file.keys))


def _hostile(keys: Sequence[str]) -> Iterator[Problem]:
    if not "".join(keys).isprintable():
        for key in keys:
            if not is_printable(key):
                yield Problem("LH708", printable(key), "a name with control or invisible characters")


def _in_file_order(source: Source, modules: Mapping[str, LoraModule]) -> Iterator[str]:
    used = {key for module in modules.values() for key in module.keys.values()}
    return (key for key in source.file.keys if key not in used)
