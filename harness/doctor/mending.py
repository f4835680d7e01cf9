"""The repair that makes a file right for a tool: planned for this very file, its result asked about like any other."""

from __future__ import annotations

import shlex
from pathlib import Path

from harness.doctor.answer import Effect, Question
from harness.doctor.answers import is_left_for_names, unmended
from harness.doctor.repair.naming import layers_from
from harness.doctor.repair.preview import is_plain, preview, with_scale
from harness.doctor.traits import Traits
from harness.errors import LoraFileError, UserError
from harness.files import LoraAdapter, read_lora, with_alpha
from harness.law.known import Tool
from harness.text import printable

_OWN = {"gguf": "llama.cpp", "kohya": "comfyui"}  # the tool to ask about a format that has none of its name
_UNREAD: tuple[Effect, ...] = ("nothing", "drops", "raises")
_WRITTEN = ("diffusers", "kohya", "comfyui", "diffsynth", "peft")  # for any names, ranks and alphas


def repaired_to(tool: Tool, traits: Traits, asked: Question) -> str | None:
    """Return the format to which `repair` can bring this file so that `tool` reads it as trained, None without one.

    Each is planned (`preview`), and what it gives is asked about.
    """
    if traits.words["declares"]:
        return None  # which a repair keeps, and only PEFT does
    return next((form for form in _formats(tool, traits) if _is_read(tool, traits, asked, form)), None)


def wants_a_base(tool: Tool, traits: Traits, asked: Question) -> bool:
    """Tell whether a repair may be possible once the names of the model's layers are known."""
    if asked.base is not None or not traits.adapter.flattened or not _of_known_scale(traits.adapter, asked):
        return False
    return any(form != "kohya" for form in _formats(tool, traits))


def command(path: Path, traits: Traits, asked: Question, to: str) -> str:
    """Return the repair of `repaired_to` as it is typed."""
    words = ["lora-harness", "repair", printable(path, 500), "--to", to, "--out", f"{path.stem}-{to}{_suffix(to)}"]
    words += options(traits, asked)
    if asked.base is not None:
        words += ["--base", printable(asked.base, 500)]
    return shlex.join(words)


def options(traits: Traits, asked: Question) -> list[str]:
    """Return what a repair must be told of the scale, which the file does not say."""
    if not traits.alphas & {"none", "zero", "some-missing"}:
        return []
    if asked.as_rank:
        return ["--scale", "1"]
    return [] if asked.lora_alpha is None else ["--lora-alpha", f"{asked.lora_alpha:.15g}"]


def not_read(path: Path, to: str, *, named: bool = False) -> str:
    """Say that the tool of a format, or all that read it, do not take a repaired file; empty where one may.

    `named`: the model's own layers were known.
    """
    from harness.doctor.answers import answers

    found = answers(Traits(read_lora(path, strict=False)), mended=False)
    bad = [each for each in found.values() if each.effect in _UNREAD]
    own = [each for each in bad if each.tool.name == _OWN.get(to, to)]
    if not own and (not bad or any(each.effect in ("law", "factor") for each in found.values())):
        return ""
    given = (own or bad)[0]
    base = "repair it with --base MODEL, whose layers have the names that it looks for"
    do = given.tool.convert or ("choose another format" if named else base)
    return f"{given.tool.title} {given.says}: {do}"


def _suffix(to: str) -> str:
    return "" if to == "peft" else ".safetensors"


def _formats(tool: Tool, traits: Traits) -> list[str]:
    """Return the formats to try, the file's own first unless it would say the same."""
    own = traits.adapter.format
    first = () if is_left_for_names(tool, traits) and traits.is_written else (own,)
    return [form for form in (*first, *(form for form in _WRITTEN if form != own)) if form in _taken(tool)]


def _taken(tool: Tool) -> tuple[str, ...]:
    return (*tool.formats, "peft") if tool.convert else tool.formats


def _is_read(tool: Tool, traits: Traits, asked: Question, form: str) -> bool:
    if (new := _planned(traits, asked, form)) is None:
        return False
    found = unmended(tool, new, Question(asked.version))
    if not (new.is_language or new.is_placed):
        return False  # how the tool calls the layers of such a model is not known
    return found.effect in ("law", "cannot") and found.strength is not None and abs(found.strength - 1) < 1e-6


def _planned(traits: Traits, asked: Question, form: str) -> Traits | None:
    """Return the traits of what `repair --to form` writes, None where it refuses."""
    key = (form, asked.lora_alpha, asked.as_rank, asked.base)
    if key not in traits.plans:
        given = _of_known_scale(traits.adapter, asked)
        traits.plans[key] = _previewed(given, form, asked.base) if given else None
    return traits.plans[key]


def _previewed(given: LoraAdapter, form: str, base: Path | None) -> Traits | None:
    try:
        return Traits(preview(given, form, layers_from(base) if base else None))
    except (LoraFileError, UserError):
        return None


def _of_known_scale(adapter: LoraAdapter, asked: Question) -> LoraAdapter | None:
    """Return the adapter with the alphas that the repair will be given, None where they, or it, will not do."""
    given = with_alpha(adapter, asked.lora_alpha)
    if asked.as_rank and all(module.alpha is None for module in given.modules.values()):
        given = with_scale(given)
    known = all(module.alpha or module.unscaled for module in given.modules.values())
    return given if known and is_plain(given) else None
