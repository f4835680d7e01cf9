"""`lora-harness benches`: the models that loaders are checked on, what is measured of one, what files for it hold."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.commands import options as shared
from harness.text import count, on_one_line, printable

if TYPE_CHECKING:
    from harness.checks.cell import Cell
    from harness.checks.plan import Pins

_MERGED = "qkv-merged"


@click.command(
    epilog="\b\nExamples:\n  lora-harness benches\n  lora-harness benches --bench my_model.py:my_phi3\n"
    "  lora-harness benches --bench flux --format kohya --out flux-kohya"
)
@shared.bench_options
@click.option("--format", "form", metavar="FORMAT", help="List what is in a file of this format for the bench.")
@click.option("--variant", default="lora", show_default=True, help="The variant of LoRA in that file.")
@shared.pin_options
@shared.seed_option
@click.option("--out", type=shared.FOLDER, help="Keep that file in this folder.")
@shared.json_option
def command(
    benches: tuple[str, ...],
    form: str | None,
    variant: str,
    pins: Pins | None,
    seed: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """List the benches by name; of those that are named, say what is measured and what is not.

    With --format, say what loaders get there: the file that `check` writes under the same options, so those of a
    reproduce line can be pasted.
    """
    if form:
        for name in _named(benches):
            _tell_file(name, form, variant, pins, out, as_json=as_json)
    elif out or pins:
        raise click.UsageError("--out, --rank and the other options of a file need --format")
    elif benches:
        _tell(benches, as_json=as_json)
    else:
        _list(as_json=as_json)


def _named(benches: tuple[str, ...]) -> tuple[str, ...]:
    if not benches:
        raise click.UsageError("--format lists what is in a file for a bench: say which with --bench or --model")
    return benches


def _list(*, as_json: bool) -> None:
    for fields in _every():
        if as_json:
            click.echo(json.dumps({"kind": "bench", **fields}))
            continue
        loaded = fields["mixin"] or "-"
        click.echo(printable(f"{fields['name']:<20} {fields['class'] or '-':<54} {loaded}"))


def _every() -> list[dict[str, Any]]:
    from harness.benches import bench_names, more_benches
    from harness.benches.table import rows
    from harness.loaders.benches import installed_benches

    known = rows()
    names = dict.fromkeys((*bench_names(), *more_benches(), *installed_benches()))
    return [
        {
            "name": name,
            "title": known[name].title if name in known else None,
            "class": known[name].kind if name in known else None,
            "mixin": known[name].mixin if name in known else None,
            "core": name in bench_names(),
        }
        for name in names
    ]


def _tell(names: tuple[str, ...], *, as_json: bool) -> None:
    from harness.benches import get_bench
    from harness.loaders.benches import bench_name
    from harness.measure.bench_summary import summary
    from harness.measure.self_check import known_facts

    for bench in (get_bench(bench_name(name)) for name in names):
        told = list(bench.measures(bench.view.lora_layers)) or list(summary(known_facts(bench), {}))
        if as_json:
            click.echo(json.dumps({"kind": "bench", "name": bench.name, "layers": bench.lora_layers, "told": told}))
            continue
        number = count(len(bench.lora_layers), "layer")
        click.echo(f"{printable(bench.name)}: {number} with a LoRA")
        for line in told:
            click.echo(on_one_line(f"  {line}"))


def _tell_file(name: str, form: str, variant: str, pins: Pins | None, out: Path | None, *, as_json: bool) -> None:
    from harness.checks.plan import smoke_example
    from harness.checks.trial_files import sample_file
    from harness.files.read import open_source

    cell = _cell_of_anyone(name, form, variant)
    example = pins.example(cell) if pins else smoke_example(cell, cell.targets)
    with tempfile.TemporaryDirectory(prefix="lora-harness-") as scratch:
        path = sample_file(cell, example, out or Path(scratch))
        source = open_source(path)
    config = {"configuration": source.config, "metadata": dict(source.file.metadata) or None}
    said = {title: fields for title, fields in config.items() if fields}
    tensors = {key: {"dtype": info.dtype, "shape": info.shape} for key, info in source.file.tensors.items()}
    if as_json:
        place = {"bench": cell.bench_name, "format": form, "variant": variant}
        click.echo(
            json.dumps({"kind": "file", **place, "path": str(path) if out else None, "tensors": tensors, **said})
        )
        return
    for line in _file_lines(cell, tensors, said, path if out else None):
        click.echo(on_one_line(line))


def _file_lines(
    cell: Cell, tensors: dict[str, dict[str, Any]], said: dict[str, Any], path: Path | None
) -> Iterator[str]:
    kept = f", kept as {path}" if path else ""
    yield f"{cell.bench_name}, {cell.variant_name} as {cell.format}: {count(len(tensors), 'tensor')}{kept}"
    for key, info in tensors.items():
        yield f"  {info['dtype']:<5} {list(info['shape'])!s:<14} {key}"
    for title, fields in said.items():
        yield f"  {title}: {json.dumps(fields)}"
    if cell.variant_name == "lora" and replace(cell, variant_name=_MERGED).possible:
        yield f"  with q, k and v as one layer, or by the names of the model's authors: --variant {_MERGED}"


def _cell_of_anyone(name: str, form: str, variant: str) -> Cell:
    """Return the cell of a loader that declares nothing, for the file that it would get.

    Raises:
        UserError: there is no such format, bench or variant, or no such file.
    """
    from harness.checks.cell import cells_of
    from harness.loaders.protocol import Subject

    anyone = Subject("anyone's loader", lambda model, lora, strength=1.0: None)
    (cell, *_), _ = cells_of(anyone, [form], [name], [variant])
    return cell
