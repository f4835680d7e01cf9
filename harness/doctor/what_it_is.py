"""What a file is, in words: the model, the trainer, how many modules of which ranks and alphas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from harness.doctor.traits import Group, Traits
from harness.files.architectures import looks_like
from harness.law.reads import Place, title_of
from harness.text import count

_FEW = 3


def what_it_is(traits: Traits, trainer: str | None) -> str:
    """Return model, format, trainer, number of modules, rank and alpha in one line."""
    adapter = traits.adapter
    if not adapter.modules:
        return f"no module that can be read ({adapter.format} keys)"
    by = f", written by {trainer}" if trainer else ""
    ranks = [module.rank for module in adapter.modules.values() if module.rank]
    numbers = f"rank {_spread(ranks)}, alpha {_alphas(traits)}" if ranks else "no rank and no alpha"
    kinds = _spread(module.variant for module in adapter.modules.values())
    what = "LoRA" if kinds in ("lora", "conv") else f"{kinds} file"
    model, total = model_of(traits), count(len(adapter.modules), "module")
    return f"{model} {what} ({adapter.format} keys{by}): {total}, {numbers}"


def model_of(traits: Traits) -> str:
    """Return what models have these layers, as far as their names tell."""
    titles = _titles(place for group in _main(traits) for place in group.places)
    if 0 < len(titles) <= _FEW:
        return " or ".join(titles)
    modules = traits.adapter.modules.values()
    layers = {each.name: (each.out_features, each.in_features) for each in modules}
    if titles:
        return looks_like(layers, by_width=True) or listed(titles)
    if alike := _titles(place for group in _main(traits) for place in group.named):
        return f"unknown model (with layers named as in {listed(alike)}, of other sizes or depth)"
    return "language model" if traits.is_language else looks_like(layers) or "unknown model"


def _main(traits: Traits) -> tuple[Group, ...]:
    """Return the denoiser's groups, those of text encoders where there is none."""
    return tuple(group for group in traits.groups if not group.text_encoder) or traits.groups


def _titles(places: Iterable[Place]) -> list[str]:
    return list(dict.fromkeys(title_of(family) for family, _ in places))


def listed(names: Iterable[str]) -> str:
    """Return the first names of models in words, and how many more there are."""
    titles = list(names)
    return " or ".join(titles[:_FEW]) + (f" (or {len(titles) - _FEW} more)" if len(titles) > _FEW else "")


def _spread(values: Iterable[object]) -> str:
    counts = Counter(str(value) for value in values)
    shown = ", ".join(value for value, _ in counts.most_common(3))
    return shown + (f" and {len(counts) - 3} more" if len(counts) > 3 else "")


def _alphas(traits: Traits) -> str:
    if two := traits.adapter.alpha_by_release:
        return f"{two[0]:.6g} or {two[0] * two[1]:.6g} by release (in adapter_config.json)"
    values = ("none" if m.alpha is None else f"{m.alpha:.6g}" for m in traits.adapter.modules.values() if m.rank)
    where = {"tensor": "", "header": " (in the header)", "config": " (in adapter_config.json)"}
    return _spread(values) + where.get(traits.adapter.alpha_source, "")
