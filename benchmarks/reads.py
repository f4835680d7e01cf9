"""Measure what every tool reads: `python -m benchmarks.reads [--tool NAME]... [--family NAME]... [--scheme NAME]...`.

Writes `harness/law/reads.json`: tool x release x architecture x names x scheme of keys -> the scale on B @ A that each
layer got from the tool's own code, for one alpha / rank in the whole file (`uniform`) and for several (`mixed`), on all
layers of a tiny model, on those inside blocks, on attention alone and on a random half of them. What needs a checkout
(ComfyUI, sd-scripts) or a release (InvokeAI, DiffSynth) is kept as it was where that is missing; with `--tool`,
`--family` or `--scheme` only those rows are measured again.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from benchmarks.lora_file import MIXED, ROOT, UNIFORM, UNSET, Deltas, Low, Reader, Shape, Update, make_file, outcome
from benchmarks.magnitudes import Change
from benchmarks.zoo import Animal, Parts, zoo
from harness.law.reads import TABLE, block_of, in_part, pattern_of

SCHEMES = (
    "transformer.A.none", "transformer.A.header", "transformer.A.tensor", "transformer.down.none",
    "transformer.default.none", "transformer.down.tensor", "transformer.lora.down.none",
    "diffusion_model.A.none", "diffusion_model.A.tensor",
    "diffusion_model.down.none", "diffusion_model.down.tensor", "bare.A.none", "bare.A.tensor", "bare.default.none",
    "bare.default.tensor", "bare.down.tensor", "base_model.A.none", "lora_unet.down.none", "lora_unet.down.tensor",
    "lora_unet__.down.tensor", "lora_transformer.down.tensor", "lycoris.down.tensor",
)  # fmt: skip
PROCESSORS = ("attn-procs", "xlabs")
VARIANTS = tuple(
    f"{prefix}.{kind}.tensor"
    for prefix in ("transformer", "diffusion_model", "lora_unet", "lycoris")
    for kind in ("lokr", "loha")
)
# what a tool is measured on: only models that the live loader gives it under the names they have there
FAITHFUL: Mapping[str, Sequence[tuple[str, str]]] = {
    "comfyui": (
        ("qwen-image", "own"), ("sd-unet", "own"), ("sd-unet", "sgm"), ("flux", "own"), ("flux", "original"),
        ("clip-text", "own"),
    ),
    "sd-scripts": (("sd-unet", "own"), ("clip-text", "own")),
    "invokeai": (("qwen-image", "own"), ("sd-unet", "own"), ("clip-text", "own")),
    "lycoris": (("qwen-image", "own"), ("sd-unet", "own"), ("flux", "own"), ("clip-text", "own")),
    "diffsynth": (("qwen-image", "own"),),
    "diffsynth-2.0.4": (("qwen-image", "own"),),
    "diffsynth-flux": (("flux", "own"), ("flux", "original")),
    "diffusers": (("clip-text", "own"),),
}  # fmt: skip
BENCHES = {"qwen-image": "qwen-image", "sd-unet": "sd-unet", "flux": "flux", "clip-text": "clip-text"}
# DoRA, as PEFT and diffusers write it, as LyCORIS does for ComfyUI's and kohya's names, and as older LyCORIS did (+in)
DORA = (
    "transformer.A.none+vector", "transformer.A.header+vector", "transformer.A.tensor+out",
    "diffusion_model.A.none+vector", "diffusion_model.A.tensor+out", "bare.default.none+vector",
    "lora_unet.down.tensor+out", "lora_unet.down.tensor+in", "lycoris.down.tensor+out",
)  # fmt: skip
RSLORA = (f"transformer.A.header+{ROOT}",)
TEXT = ("lora_te.down.tensor", "lora_te.down.none", "transformer.A.none", "transformer.lora.down.none")
# diffusers' converters of these have the real model's width and number of blocks written into them: what becomes of a
# tiny model's file says nothing of a real one, and no row is written
SIZED = tuple(("diffusers", family, "base_model.A.none") for family in ("flux", "chroma", "bria-fibo")) + tuple(
    ("diffusers", "hunyuan-video", scheme)
    for scheme in ("transformer.A.none", "transformer.A.header", f"transformer.A.header+{ROOT}",
                   "transformer.lora.down.none", "diffusion_model.A.none", "bare.A.none")
)  # fmt: skip
# and of these nothing holds: a tiny pipeline of Wan 2.2 lacks what its converter asks for, and the factor of a LoKr is
# inferred from the sizes of layers
TINY = (
    ("diffusers", "wan22-low", "*"), ("diffusers", "flux2", "*.lokr.tensor"), ("diffusers", "z-image", "*.lokr.tensor"),
    ("lycoris", "*", "l*.lokr.tensor"),
)  # fmt: skip
# a live loader has no place for layers whose rows its tool turns by itself (ComfyUI: `swap_scale_shift`)
TURNED: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("comfyui", "flux"): ("norm_out_linear", "final_layer_adaLN_modulation_#"),
}
LIVE = tuple(tool for tool in FAITHFUL if tool != "diffusers")


def diffusers_reader(animal: Animal, *, whole: bool = False) -> Reader:
    """Return what loads a file with the pipeline mixin of `animal` and reads PEFT's own delta of each layer.

    With `whole` PEFT merges, and the weights before and after are what was read.
    """
    from diffusers.loaders import lora_pipeline

    def read(path: Path, strength: float) -> Deltas:
        model = animal.build()
        kind: Any = getattr(lora_pipeline, str(animal.mixin))
        parts = {**dict.fromkeys(kind._lora_loadable_modules), animal.component: model}
        pipeline = type("Pipeline", (kind,), {**parts, "components": parts, "hf_device_map": None})()
        pipeline.load_lora_weights(str(path), adapter_name="a")
        if strength != 1:
            pipeline.set_adapters("a", adapter_weights=strength)  # raises where nothing was loaded
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
        change = _merged if whole else _delta
        return {name: UNSET if _is_unset(layer) else change(layer) for name, layer in layers.items()}

    return read


def _is_unset(layer: Any) -> bool:
    """Tell whether factors of a layer were left without memory: a merge of them looks like none, a product raises."""
    return any(part.is_meta for part in layer.parameters())


def _merged(layer: Any) -> Change:
    before = layer.get_base_layer().weight.detach().clone()
    layer.merge(adapter_names=["a"])
    return Change(before, layer.get_base_layer().weight.detach())


def _delta(layer: Any) -> Update:
    """Return what PEFT's layer adds to the weight."""
    if "a" not in getattr(layer, "lora_A", ()) or type(layer).__name__ not in ("Linear", "Conv2d"):
        delta: torch.Tensor = layer.get_delta_weight("a")
        return delta.detach()
    a, b = layer.lora_A["a"].weight.detach(), layer.lora_B["a"].weight.detach()
    return Low(b.flatten(1) * layer.scaling["a"], a.flatten(1))


def live_reader(tool: str, bench_name: str, *, whole: bool = False) -> Reader:
    """Return what loads a file with the live loader `tool` and reads the effective weight of each layer.

    It is read as what was added, or with `whole` as the weights before and after.
    """
    from harness.benches import get_bench
    from harness.loaders.registry import resolve
    from harness.measure.effective import effective_weights

    bench, subject = get_bench(bench_name), resolve(tool)
    subject.prepare()
    layers = {name: layer for name, layer in bench.layers.items() if layer.kind in ("linear", "conv")}
    before = effective_weights(bench.base(), layers)

    def read(path: Path, strength: float) -> Deltas:
        model = bench.build()
        model = subject.load(model, path, strength=strength) or model
        found = effective_weights(model, layers)
        return {n: Change(before[n], weight) if whole else weight - before[n] for n, weight in found.items()}

    return read


def subsets(names: Parts) -> dict[str, Parts]:
    """Return the parts of a model that people train: all of it, its blocks, attention alone; and a random half."""
    found = {
        part: {n: p for n, p in names.items() if in_part(part, pattern_of(n))}
        for part in ("all", "blocks", "attention")
    }
    blocks = found["blocks"]
    chosen = random.Random(3).sample(sorted(blocks), (len(blocks) + 1) // 2)
    found["half"] = {name: names[name] for name in names if name in chosen}
    return {name: part for name, part in found.items() if part}


def row(reader: Reader, names: Parts, shapes: Mapping[str, Shape], scheme: str, component: str) -> dict[str, Any]:
    """Measure one scheme of keys; nothing where it can spell none of the names."""
    found: dict[str, Any] = {}
    for kind, numbers in (("uniform", UNIFORM), ("mixed", MIXED)):
        files = {part: make_file(some, shapes, scheme, numbers, component) for part, some in subsets(names).items()}
        every = {part: outcome(reader, file) for part, file in files.items() if file.tensors}
        if not every:
            return {}
        found[kind] = _folded(every if "all" in every else {"all": next(iter(every.values())), **every})
    return found if found["uniform"] != found["mixed"] else {"uniform": found["uniform"]}


def _folded(every: Any) -> Any:
    """Return one outcome for all parts of a model where it is the same; an error is, whichever keys it names."""
    if not isinstance(every, dict) or "all" not in every:
        return every
    same = {json.dumps(each, sort_keys=True) for each in every.values()}
    failed = all(isinstance(each, dict) and "raises" in each for each in every.values())
    return next(iter(every.values())) if len(same) == 1 or failed else every


def namings(animal: Animal) -> list[str]:
    return [
        "own",
        *(["original"] if animal.original else []),
        *(["sgm"] if animal.class_name == "UNet2DConditionModel" else []),
    ]


def measure_diffusers(families: Sequence[str], schemes: Sequence[str]) -> Iterator[dict[str, Any]]:
    import diffusers

    for family, animal in zoo().items():
        if (families and family not in families) or animal.mixin is None:
            continue
        for naming in namings(animal):
            meant = animal.of_width(naming)
            reader, names, shapes = diffusers_reader(meant), meant.names(naming), meant.layers
            whole = diffusers_reader(meant, whole=True)
            for scheme in chosen(
                schemes, *SCHEMES, *PROCESSORS, *RSLORA, *(() if meant.is_wide else (*VARIANTS, *DORA))
            ):
                place = {"tool": "diffusers", "release": diffusers.__version__, "family": family, "names": naming}
                if found := row(whole if _is_dora(scheme) else reader, names, shapes, scheme, animal.component):
                    yield {**place, "scheme": scheme, **found}


def _is_dora(scheme: str) -> bool:
    return "+" in scheme and not scheme.endswith(ROOT)


def chosen(schemes: Sequence[str], *every: str) -> list[str]:
    """Return the spellings to measure: those asked for (patterns such as `*+out`), or all."""
    return [each for each in every if not schemes or any(fnmatchcase(each, scheme) for scheme in schemes)]


def bench_shapes(bench_name: str) -> dict[str, Shape]:
    """Return the shape of the weight of every linear layer and convolution of a bench."""
    from harness.benches import get_bench

    layers = {n: layer for n, layer in get_bench(bench_name).layers.items() if layer.kind in ("linear", "conv")}
    return {name: (layer.rows, layer.channels, *layer.kernel) for name, layer in layers.items()}


def measure_live(tool: str, families: Sequence[str], schemes: Sequence[str]) -> Iterator[dict[str, Any]]:
    from harness.benches import get_bench
    from harness.loaders.registry import resolve

    release = resolve(tool).version
    for family, bench_name in BENCHES.items():
        if families and family not in families:
            continue
        bench, animal = get_bench(bench_name), zoo().get(family)
        shapes = bench_shapes(bench_name)
        reader, whole = live_reader(tool, bench_name), live_reader(tool, bench_name, whole=True)
        for naming in (names for there, names in FAITHFUL[tool] if there == family):
            own = {name: [name] for name in shapes}
            names = animal.names(naming) if animal and naming != "own" else own
            names = {name: parts for name, parts in names.items() if set(parts) <= set(shapes)}
            for scheme in chosen(schemes, *((*SCHEMES, *PROCESSORS, *RSLORA, *VARIANTS, *DORA) if animal else TEXT)):
                place = {"tool": tool, "release": release, "family": family, "names": naming}
                if found := row(whole if _is_dora(scheme) else reader, names, shapes, scheme, bench.component):
                    yield {**place, "scheme": scheme, **found}


def layer_patterns() -> dict[str, dict[str, list[str]]]:
    """Return, per architecture and naming, what its layers are called, with `#` for numbers: how a file is told."""
    from harness.benches import get_bench

    every = {
        family: {naming: sorted({pattern_of(name) for name in animal.names(naming)}) for naming in namings(animal)}
        for family, animal in zoo().items()
    }
    text = {pattern_of(name) for name in get_bench("clip-text").lora_layers}
    bare = {name.removeprefix("text_model_") for name in text}
    return {**every, "clip-text": {"own": sorted(bare | {f"text_model_{name}" for name in bare})}}


_SEQUENCE = re.compile(r"[^#]+#[^#]+_#")


def several() -> dict[str, dict[str, dict[str, int]]]:
    """Return the patterns that fit several layers of a block, such as `ffn.0` and `ffn.2`, with their number."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for family, animal in zoo().items():
        for naming in namings(animal):
            blocks: dict[str, list[str]] = {}
            for name in animal.names(naming):
                blocks.setdefault(pattern_of(name), []).append(block_of(name))
            numbers = {pattern: {every.count(one) for one in every} for pattern, every in blocks.items()}
            more = {
                pattern: each.pop()
                for pattern, each in sorted(numbers.items())
                if len(each) == 1 and _SEQUENCE.fullmatch(pattern)
            }
            more = {pattern: number for pattern, number in more.items() if number > 1}
            if more:
                found.setdefault(family, {})[naming] = more
    return found


def measure(tool: str, families: Sequence[str], schemes: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Measure one tool on the architectures it can be run on here."""
    from harness.errors import LoaderSpecError

    if tool == "diffusers":
        yield from measure_diffusers(families, schemes)
        families = [family for family in families or ["clip-text"] if family == "clip-text"]
    try:
        yield from () if tool == "diffusers" and not families else measure_live(tool, families, schemes)
    except LoaderSpecError as error:
        print(f"{tool}: {error}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tool", action="append", default=[], choices=("diffusers", *LIVE))
    options.add_argument("--family", action="append", default=[], choices={*zoo(), *BENCHES})
    options.add_argument("--scheme", action="append", default=[])
    given = options.parse_args(argv)
    table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {"rows": []}
    rows = {tuple(r[k] for k in ("tool", "family", "names", "scheme")): r for r in table["rows"]}
    for tool in given.tool or ("diffusers", *LIVE):
        for each in measure(tool, given.family, given.scheme):
            rows[each["tool"], each["family"], each["names"], each["scheme"]] = each
            print(json.dumps(each)[:200], flush=True)
        write(list(rows.values()))


def write(rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the table, one row a line so that a change can be read."""
    head = {"measured": str(date.today()), "by": "python -m benchmarks.reads", "several": several()}
    head["titles"] = {**{family: animal.title for family, animal in zoo().items()}, "clip-text": "CLIP text encoder"}
    said = [_without_turned(each) for each in rows if not _is_sized(each)]
    rows = [{**each, **{kind: _folded(each[kind]) for kind in ("uniform", "mixed") if kind in each}} for each in said]
    lines = [json.dumps(head)[:-1] + ',\n"layers": {']
    lines.append(",\n".join(f"{json.dumps(f)}: {json.dumps(names)}" for f, names in layer_patterns().items()))
    lines.append('},\n"rows": [\n' + ",\n".join(json.dumps(each) for each in rows) + "\n]}\n")
    TABLE.write_text("".join(lines), encoding="utf-8")


def _is_sized(row: Mapping[str, Any]) -> bool:
    """Tell whether what the tool did was the tiny model's doing."""
    place = (row["tool"], row["family"], row["scheme"])
    tiny = any(all(map(fnmatchcase, place, globs)) for globs in TINY)
    return tiny or (place in SIZED and "raises" in json.dumps(row["uniform"]))


def _without_turned(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row that does not call layers dropped that the live loader has no place for."""
    turned = TURNED.get((row["tool"], row["family"]), ())
    return {name: _kept(value, turned) if name in ("uniform", "mixed") else value for name, value in row.items()}


def _kept(outcome: Any, turned: Sequence[str]) -> Any:
    if not isinstance(outcome, dict):
        return outcome
    if "all" in outcome:
        return {part: _kept(each, turned) for part, each in outcome.items()}
    dropped = [layer for layer in outcome.get("dropped", ()) if layer not in turned]
    rest = {name: value for name, value in outcome.items() if name != "dropped"}
    return rest | ({"dropped": dropped} if dropped else {}) or "ok"


if __name__ == "__main__":
    main()
