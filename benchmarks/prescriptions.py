"""Hold every number that `diagnose` gives against the tool itself: `python -m benchmarks.prescriptions`.

Writes `docs/prescriptions.md`: for each (file, tool) the answer is asked for, the number is passed to the tool's own
loader, and the scale on B @ A is measured in every layer; where no number is given, the loader must do what was said.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from benchmarks.lora_file import MIXED, UNIFORM, File, Reader, Shape, make_file, outcome
from benchmarks.peft_folders import READERS, folders
from benchmarks.reads import BENCHES, FAITHFUL, LIVE, bench_shapes, diffusers_reader, live_reader
from benchmarks.zoo import Parts, zoo
from harness.doctor.answer import Answer, Question
from harness.doctor.answers import answer
from harness.doctor.traits import Traits
from harness.errors import LoaderSpecError
from harness.files import read_lora
from harness.law.known import Tool
from harness.law.known import tools as known_tools
from harness.law.reads import in_part, pattern_of

PAGE = Path(__file__).parents[1] / "docs" / "prescriptions.md"
NEGATIVE = ((4, -2.0),)
NUMBERS = {"alpha / rank 0.5": UNIFORM, "alpha / rank differs": MIXED, "negative alpha": NEGATIVE}
# architecture, whose names, spelling of the keys, alphas, the alpha of the training where the file has none
FILES: Sequence[tuple[str, str, str, str, float | None]] = (
    ("qwen-image", "own", "bare.default.none", "alpha / rank 0.5", 4.0),
    ("qwen-image", "own", "bare.default.tensor", "alpha / rank 0.5", None),
    ("qwen-image", "own", "bare.default.tensor", "alpha / rank differs", None),
    ("qwen-image", "own", "diffusion_model.A.tensor", "alpha / rank 0.5", None),
    ("qwen-image", "own", "diffusion_model.A.tensor", "alpha / rank differs", None),
    ("qwen-image", "own", "diffusion_model.A.none", "alpha / rank 0.5", 4.0),
    ("qwen-image", "own", "transformer.A.header", "alpha / rank 0.5", None),
    ("qwen-image", "own", "transformer.A.header", "alpha / rank differs", None),
    ("qwen-image", "own", "transformer.A.none", "alpha / rank 0.5", 4.0),
    ("qwen-image", "own", "transformer.A.tensor", "alpha / rank 0.5", None),
    ("qwen-image", "own", "transformer.down.tensor", "alpha / rank 0.5", None),
    ("qwen-image", "own", "lora_unet.down.tensor", "alpha / rank 0.5", None),
    ("qwen-image", "own", "lora_unet.down.tensor", "alpha / rank differs", None),
    ("qwen-image", "own", "lora_unet.down.none", "alpha / rank 0.5", 4.0),
    ("qwen-image", "own", "lora_unet.down.tensor", "negative alpha", None),
    ("qwen-image", "own", "lora_unet__.down.tensor", "alpha / rank 0.5", None),
    ("flux", "own", "transformer.A.header", "alpha / rank differs", None),
    ("flux", "own", "transformer.down.tensor", "alpha / rank 0.5", None),
    ("flux", "own", "transformer.down.tensor", "alpha / rank differs", None),
    ("flux", "original", "lora_unet.down.tensor", "alpha / rank 0.5", None),
    ("flux", "original", "lora_unet.down.tensor", "alpha / rank differs", None),
    ("flux", "original", "diffusion_model.A.tensor", "alpha / rank differs", None),
    ("sd-unet", "own", "lora_unet.down.tensor", "alpha / rank 0.5", None),
    ("sd-unet", "own", "lora_unet.down.tensor", "alpha / rank differs", None),
    ("sd-unet", "own", "lora_unet.down.none", "alpha / rank 0.5", 4.0),
    ("sd-unet", "sgm", "lora_unet.down.tensor", "alpha / rank 0.5", None),
    ("sd-unet", "sgm", "lora_unet.down.tensor", "alpha / rank differs", None),
    ("sdxl-unet", "sgm", "lora_unet.down.tensor", "alpha / rank 0.5", None),
    ("sdxl-unet", "sgm", "lora_unet.down.tensor", "alpha / rank differs", None),
    ("sd-unet", "own", "transformer.A.header", "alpha / rank differs", None),
    ("sd-unet", "own", "transformer.lora.down.none", "alpha / rank 0.5", 4.0),
    ("wan21-t2v", "original", "diffusion_model.A.tensor", "alpha / rank differs", None),
    ("wan21-t2v", "original", "lora_unet.down.tensor", "alpha / rank differs", None),
    ("z-image", "own", "diffusion_model.A.tensor", "alpha / rank differs", None),
)  # fmt: skip


_HEAD = """# Every number, held against the tool

Measured on {today} by `python -m benchmarks.prescriptions` with the tools' own code: {judged} pairs of file and tool
judged, {wrong} wrong; {unknown} answered *not known*. A number counts when every layer got its trained scale within
0.5 %; where there is none, the tool must do what was said.{absent}

| file | tool | answered | measured | |
| --- | --- | --- | --- | --- |"""


@dataclass(frozen=True)
class Pair:
    """One file and tool: what was answered, what was measured, and whether the two agree (None: not judged)."""

    file: str
    tool: str
    answered: str
    measured: str
    agrees: bool | None


def measured_with(tool: str, family: str, naming: str) -> tuple[Reader, Parts, Mapping[str, Shape]] | None:
    """Return what loads a file with the tool's own code, the file's names and shapes; None where it is not here."""
    animal = zoo()[family].of_width(naming)
    if (tool, family, naming) == ("diffusers", "sd-unet", "sgm"):
        return (
            None  # SDXL's names: the answer is about SDXL, and says itself that a Stable Diffusion 1.x UNet drops them
        )
    if tool == "diffusers":
        return diffusers_reader(animal), animal.names(naming), animal.layers
    engine = "diffsynth-flux" if (tool, family) == ("diffsynth", "flux") else tool
    if (family, naming) not in FAITHFUL.get(engine, ()):
        return None
    try:
        reader = live_reader(engine, BENCHES[family])
    except LoaderSpecError:
        return None
    shapes = bench_shapes(BENCHES[family])
    return reader, {name: parts for name, parts in animal.names(naming).items() if set(parts) <= set(shapes)}, shapes


def pairs(tools: Sequence[str] = (), families: Sequence[str] = ()) -> Iterator[Pair]:
    """Ask and measure every pair."""
    for family, naming, scheme, what, lora_alpha in FILES:
        if families and family not in families:
            continue
        title = zoo()[family].title
        shown = f"{title}, {naming} names, `{scheme}`, {what}" + (f", lora_alpha {lora_alpha:g}" if lora_alpha else "")
        for tool in known_tools().values():
            if (not tools or tool.name in tools) and (way := measured_with(tool.name, family, naming)):
                reader, names, shapes = way
                blocks = {name: parts for name, parts in names.items() if in_part("blocks", pattern_of(name))}
                file = make_file(blocks, shapes, scheme, NUMBERS[what], zoo()[family].component)
                if (given := _asked(file, tool, lora_alpha)) is not None:
                    yield _judge(shown, tool.name, given, reader, _trained_with(file, lora_alpha))


def folder_pairs() -> Iterator[Pair]:
    """Ask and measure PEFT's folders in PEFT and transformers."""
    with tempfile.TemporaryDirectory() as place:
        for what, folder, file in folders(Path(place) / "adapter"):
            for tool, reader in READERS.items():
                traits = Traits(read_lora(folder, strict=False))
                given = answer(known_tools()[tool], traits, Question())
                yield _judge(f"Llama, a PEFT folder, {what}", tool, given, reader(folder), file)


def _asked(file: File, tool: Tool, lora_alpha: float | None) -> Answer | None:
    """Return the tool's answer for the file, None where it does not read the format."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        save_file({k: t.contiguous() for k, t in file.tensors.items()}, path, metadata=dict(file.metadata) or None)
        traits = Traits(read_lora(path, strict=False))
        asked = Question(lora_alpha=lora_alpha)
        return answer(tool, traits, asked) if traits.adapter.format in tool.formats else None


def _trained_with(file: File, lora_alpha: float | None) -> File:
    if lora_alpha is None:
        return file
    rank = UNIFORM[0][0]
    expected = {layer: (product, lora_alpha / rank) for layer, (product, _) in file.expected.items()}
    return File(file.tensors, file.metadata, expected, file.where)


def _judge(shown: str, tool: str, given: Answer, reader: Reader, file: File) -> Pair:
    number = given.strength
    seen = outcome(reader, file, 1.0 if number is None else number)
    measured = seen if isinstance(seen, str) else next(iter(seen))
    answered = f"{given.tool.field} = {number:g}" if number is not None else f"no number: {given.effect}"
    if number is not None:
        return Pair(shown, tool, answered, "scale 1 in every layer" if seen == "ok" else _said(seen), seen == "ok")
    same = {
        "raises": measured in ("raises",), "hangs": measured == "hangs", "nothing": seen == "nothing",
        "drops": measured in ("dropped", "nothing"), "factor": measured in ("factor", "alpha ignored", "dropped"),
        "wrong": measured in ("other", "factor", "dropped"),
    }  # fmt: skip
    return Pair(shown, tool, answered, "as trained" if seen == "ok" else _said(seen), same.get(given.effect))


def _said(seen: Any) -> str:
    if isinstance(seen, str):
        return {"nothing": "loads nothing", "alpha ignored": "ignores alpha"}.get(seen, seen)
    kind, value = next(iter(seen.items()))
    said = re.sub(r"/\S+", "…", str(value))  # a temporary folder
    return f"{kind}: {said}"[:60] if kind in ("raises", "hangs") else f"{kind} in {len(value)} kinds of layers"


def absent() -> list[str]:
    """Return the tools whose own code is not here, a checkout or a release: none of their pairs is measured."""

    def is_here(tool: str) -> bool:
        try:
            live_reader(tool, BENCHES[FAITHFUL[tool][0][0]])
        except LoaderSpecError:
            return False
        return True

    return [tool for tool in LIVE if not is_here(tool)]


def page(found: Sequence[Pair], left_out: Sequence[str] = ()) -> str:
    """Return the table as Markdown; `left_out` are the tools that could not be measured."""
    judged = [pair for pair in found if pair.agrees is not None]
    wrong = sum(not pair.agrees for pair in judged)
    unknown = len(found) - len(judged)
    without = f" Left out, since their code was not there: {', '.join(left_out)}." if left_out else ""
    lines = [_HEAD.format(today=date.today(), judged=len(judged), wrong=wrong, unknown=unknown, absent=without)]
    mark = {True: "right", False: "**wrong**", None: "not judged"}
    lines += [
        f"| {p.file} | {p.tool} | {p.answered} | {p.measured.replace('|', '/')} | {mark[p.agrees]} |" for p in found
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every pair and write the page; exit 1 when one is wrong."""
    left_out = absent()
    if left_out:
        print(f"not here, and left out: {', '.join(left_out)} (`lora-harness loaders` says what each needs)")
    found = [*pairs(), *folder_pairs()]
    PAGE.write_text(page(found, left_out), encoding="utf-8")
    wrong = [pair for pair in found if pair.agrees is False]
    print(f"{len(found)} pairs, {len(wrong)} wrong", *wrong, sep="\n")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
