"""One LoRA file in, everything that can be said of it out: from the header alone, energies only when asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from harness.doctor.answer import Question
from harness.doctor.answers import answers, why_not
from harness.doctor.inspect.hazards import hazards
from harness.doctor.inspect.weights import Weighed, weigh
from harness.doctor.on_base import Held, held_against, on_base
from harness.doctor.trainers import about_alpha, trainer_of
from harness.doctor.traits import Traits
from harness.errors import LoraFileError, NoLoraError
from harness.files import LoraAdapter, LoraModule, read_lora, with_alpha
from harness.files.keys import OTHER_NAMES, cut
from harness.law.known import conventions, distinct, tools
from harness.text import count, first_of, printable
from harness.verdict.file_record import FileRecord, Hazard

_UNUSED_SHOWN = 50
_SHOWN_VALUES = 24
_SHOWN_CHARACTERS = 200
_FIRST = (
    "ss_output_name", "ss_base_model_version", "ss_sd_model_name", "ss_network_module", "ss_network_dim",
    "ss_network_alpha", "ss_network_args", "ss_learning_rate", "ss_num_epochs", "ss_epoch", "ss_steps",
    "modelspec.architecture", "base_model_name_or_path", "modelspec.title", "modelspec.implementation", "software",
    "training_info", "name", "version",
)  # fmt: skip


def inspect_file(
    path: Path | str,
    *,
    energy: bool = False,
    base: Path | str | None = None,
    lora_alpha: float | None = None,
    headers_only: bool = False,
) -> FileRecord:
    """Return what is in a LoRA file or PEFT folder.

    A file that cannot be read is a record with hazard LH799, an intact file that is no LoRA one with LH797. The weights
    are looked at once, for what is not finite or all zero, unless `headers_only`; torch is imported for `energy` alone.
    `base` is a safetensors file or a folder of them with the base weights, and implies `energy`. `lora_alpha` is the
    alpha of the training, for files that carry none.

    Raises:
        LoraFileError: `base` cannot be read.
    """
    return read_record(path, energy=energy, base=base, lora_alpha=lora_alpha, headers_only=headers_only)[0]


def read_record(
    path: Path | str,
    *,
    energy: bool = False,
    base: Path | str | None = None,
    lora_alpha: float | None = None,
    headers_only: bool = False,
    reasons: bool = True,
) -> tuple[FileRecord, LoraAdapter | None]:
    """Return what `inspect_file` does, and the parsed file (None when it cannot be read).

    Without `reasons` it does not say why there is no strength: a repair for every tool is planned for that.
    """
    try:
        adapter = read_lora(path, strict=False)
        weighed = Weighed() if headers_only else weigh(adapter)
    except LoraFileError as error:
        code = "LH797" if isinstance(error, NoLoraError) else "LH799"
        return unreadable(path, _without_path(error, Path(path)), code), None
    held = held_against(Traits(adapter), Path(base)) if base is not None else None
    record = _described(adapter, shown_path(path), lora_alpha, weighed, held, reasons=reasons)
    if energy or base is not None:
        from harness.doctor.inspect.energy import with_energy

        return with_energy(record, with_alpha(adapter, lora_alpha), held), adapter
    return record, adapter


def unreadable(path: Path | str, what: str, code: str = "LH799") -> FileRecord:
    """Return the record of a file that could not be read, or is no LoRA."""
    return FileRecord(path=shown_path(path), hazards=(Hazard(code=code, what=printable(what, 400)),))


def not_judged(path: Path | str, what: str) -> FileRecord:
    """Return the record of a file that nobody could read for a reason which is not the file's, with hazard LH798."""
    return FileRecord(path=shown_path(path), hazards=(Hazard(code="LH798", what=printable(what, 400)),))


def describe(
    adapter: LoraAdapter,
    *,
    path: str | None = None,
    lora_alpha: float | None = None,
    weighed: Weighed | None = None,
    reasons: bool = True,
) -> FileRecord:
    """Return the record of a parsed file; `weighed` is what its weights say, where they were looked at."""
    return _described(adapter, path or shown_path(adapter.path), lora_alpha, weighed or Weighed(), reasons=reasons)


def _described(
    adapter: LoraAdapter,
    path: str,
    lora_alpha: float | None,
    weighed: Weighed,
    held: Held | None = None,
    *,
    reasons: bool,
) -> FileRecord:
    traits = Traits(adapter)
    total, adapter = len(adapter.file.keys), with_alpha(adapter, lora_alpha)
    modules = list(adapter.modules.values())
    low_rank = [module for module in modules if module.rank or module.variant == "lokr"]
    different = [m for m in distinct(low_rank) if m.alpha is not None or m.unscaled or not m.rank]
    return FileRecord(
        path=path,
        format=adapter.format,
        size=adapter.file.size,
        modules=len(modules),
        ranks=_histogram(low_rank, "rank", lambda rank: str(rank or "full")),
        alphas=_histogram(
            [module for module in low_rank if module.rank],
            "alpha",
            lambda alpha: "none" if alpha is None else f"{alpha:.6g}",
        ),
        alpha_source=adapter.alpha_source,
        variants=_histogram(modules, "variant"),
        dtypes=_histogram(modules, "dtype"),
        components=_histogram(modules, "component"),
        trained=_range(module.trained_scale for module in different if module.rank),
        scales=_scales(different),
        hazards=tuple(sorted((*hazards(adapter), *weighed.hazards), key=lambda hazard: hazard.code)),
        notes=(*_notes(adapter), *_about_alpha(traits, lora_alpha), *weighed.notes),
        coverage=1 - len(adapter.unused_keys) / total if total else None,
        unused=tuple(printable(key) for key in adapter.unused_keys[:_UNUSED_SHOWN]),
        trainer=trainer_of(adapter.metadata),
        metadata=_shown({**_base_named(adapter), **adapter.metadata}),
        dialect=adapter.dialect,
        weights_read=weighed.read,
        **_for_tools(traits, Question(lora_alpha=lora_alpha), held, reasons=reasons),
    )


def _for_tools(traits: Traits, asked: Question, held: Held | None, *, reasons: bool) -> dict[str, Any]:
    """Return what each tool needs for the file, or why no number is right there, and the findings that it meets."""
    found = on_base(answers(traits, asked, mended=reasons), held, traits)
    without = {name: each for name, each in found.items() if each.strength is None} if reasons else {}
    return {
        "prescription": {name: each.strength for name, each in found.items()},
        "unprescribed": {name: why_not(each, traits, asked) for name, each in without.items()},
        "findings": tuple(finding.page for finding in traits.findings),
    }


def _about_alpha(traits: Traits, lora_alpha: float | None) -> Iterator[str]:
    if not all(module.unscaled for module in traits.modules):
        yield from (f"alpha: {line}" for line in about_alpha(traits, lora_alpha))


def _scales(modules: list[LoraModule]) -> dict[str, tuple[float, float]]:
    ranges = {name: _range(law.at_one(module) for module in modules) for name, law in conventions().items()}
    return {name: found for name, found in ranges.items() if found}


def _notes(adapter: LoraAdapter) -> Iterator[str]:
    modules = list(adapter.modules.values())
    if any(module.rslora for module in modules):
        root = max(module.rank for module in modules) ** 0.5
        yield f"rank-stabilised: readers that know only alpha / rank are up to sqrt(rank) = {root:.3g} times too weak"
    if any(module.unscaled for module in modules):
        yield "no alpha by construction: what wrote this file trains at scale 1"
    yield from _untouched_targets(adapter)
    yield from _parts(adapter)


def _untouched_targets(adapter: LoraAdapter) -> Iterator[str]:
    """Say which targets of a PEFT configuration have no tensor: of a model that has such layers they are missing."""
    wanted = adapter.config.get("target_modules") if adapter.format == "peft" and adapter.kind == "lora" else None
    if isinstance(wanted, list) and adapter.modules:
        keys = "\n".join(f".{key}" for key in adapter.file.keys)
        left = adapter.config.get("exclude_modules")
        given = [word for word in wanted if not isinstance(left, list) or word not in left]
        without = [word for word in given if isinstance(word, str) and word and f".{word}." not in keys]
        if without:
            shown = first_of([printable(word, 60) for word in without])
            yield f"target_modules names {shown}, of which the file has no tensor: --base says whether the model has it"


_PARTS = (
    ("set", "replaced weights", "they are copied over the base's, whatever the strength"),
    ("tokens", "trained token rows", "they replace rows of the embedding, whatever the strength"),
    ("copy", "copies of base weights", "PEFT copies them over the base's"),
    ("diff", "whole differences", "readers of low-rank pairs leave them out"),
    ("lora_diff", "whole differences beside pairs", "readers of low-rank pairs leave them out"),
    ("norm", "norm differences or replaced norm scales", "readers of low-rank pairs leave them out"),
    *((kind, what, "readers of low-rank pairs leave it out") for kind, what in OTHER_NAMES.items()),
)


def _parts(adapter: LoraAdapter) -> Iterator[str]:
    """Name what the file holds beside low-rank pairs, and who leaves it out."""
    by_variant: dict[str, list[str]] = {}
    for name, module in adapter.modules.items():
        by_variant.setdefault(module.variant, []).append(name)
    for variant, what, effect in _PARTS:
        if names := by_variant.get(variant):
            yield f"{what} in {count(len(names), 'module')} ({first_of(names)}): {effect}"
    if magnitudes := [module.keys["magnitude"] for module in adapter.modules.values() if "magnitude" in module.keys]:
        tail = (cut(magnitudes[0]) or ("", "magnitude"))[1].replace(".*", "")
        kind = "dora_scale" if tail == "dora_scale" else "magnitude"
        able = [each for each in tools().values() if adapter.format in each.formats]
        told = "; ".join(f"{each.title} {why}" for each in able if (why := each.without("dora", kind)))
        head = f"DoRA magnitudes ({tail}) in {count(len(magnitudes), 'module')}"
        yield f"{head}: {told}" if told else head


def _range(values: Iterable[float]) -> tuple[float, float] | None:
    found = list(values)
    return (min(found), max(found)) if found else None


def _histogram(modules: list[LoraModule], field: str, shown: Callable[[Any], str] = str) -> dict[str, int]:
    found: Counter[str] = Counter()
    for value, times in Counter(map(attrgetter(field), modules)).items():
        found[shown(value)] += times
    return dict(found.most_common())


def shown_path(path: Path | str) -> str:
    """Return a path as text that JSON can hold, whatever bytes the file name has."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _without_path(error: LoraFileError, path: Path) -> str:
    file = "" if error.path == path else printable(error.path.name, 80)
    return ": ".join(part for part in (file, error.key, error.problem) if part)


def _base_named(adapter: LoraAdapter) -> dict[str, str]:
    named = adapter.config.get("base_model_name_or_path")
    return {"base_model_name_or_path": named} if isinstance(named, str) and named else {}


def _shown(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata worth showing, the best known keys first, every value cut and without control characters."""
    known = [key for key in _FIRST if key in metadata]
    others = sorted(key for key in metadata if key not in known and len(metadata[key]) <= _SHOWN_CHARACTERS)
    keys = (known + others)[:_SHOWN_VALUES]
    return {printable(key, 60): printable(metadata[key], _SHOWN_CHARACTERS) for key in keys}
