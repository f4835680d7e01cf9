"""`lora-harness inspect`: what is in a LoRA file."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from harness.commands import options as shared
from harness.commands.screen import grid, stdout_console
from harness.text import printable

if TYPE_CHECKING:
    from rich.table import Table

    from harness.verdict.file_record import FileRecord, ModuleEnergy

_ENERGIES_SHOWN = 3
_BLOCKS_SHOWN = 16
_NAMED_TOOLS = ("loralib", "torchtune")  # what only their own names tell


@click.command(
    epilog="\b\nExamples:\n"
    "  lora-harness inspect my_lora.safetensors\n"
    "  lora-harness inspect first.safetensors second.safetensors --html page.html\n"
    "  lora-harness inspect my_peft_folder --base model.safetensors --loader diffsynth-2.0.4\n"
    "  lora-harness inspect my_peft_folder --for vllm --max-lora-rank 64"
)
@click.argument("files", nargs=-1, required=True, type=shared.PATH, metavar="LORA...")
@click.option("--base", type=shared.PATH, help="Base checkpoint: adds the strength relative to its weights.")
@click.option("--energy", is_flag=True, help="Norm, spectral norm and effective rank of each module's update.")
@click.option("--headers-only", is_flag=True, help="Do not read the weights: quicker, and blind to NaN and zeros.")
@click.option("--loader", "loaders", multiple=True, metavar="LOADER", help="Measure this loader and prescribe for it.")
@click.option("--for", "engine", metavar="ENGINE", help="What vllm or sglang would do with it, by their own rules.")
@click.option("--max-lora-rank", type=click.IntRange(1), help="The limit that the engine of --for was started with.")
@shared.lora_alpha_option
@click.option("--strict", is_flag=True, help="Exit 1 for every hazard, not only for broken files.")
@click.option("--sarif", "sarif_file", type=shared.FILE, help="Write SARIF 2.1.0 here too.")
@click.option(
    "--html",
    type=shared.FILE,
    help="Write one page about all files here too, with the energies by module and block.",
)
@shared.json_option
def command(
    files: tuple[Path, ...],
    base: Path | None,
    energy: bool,
    headers_only: bool,
    loaders: tuple[str, ...],
    engine: str | None,
    max_lora_rank: int | None,
    lora_alpha: float | None,
    strict: bool,
    sarif_file: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Say what each LORA file holds: format, rank, alpha, scale under each convention, hazards, strength to pass."""
    from harness.doctor.inspect.describe import inspect_file

    if html:
        from harness.report.lora_page import checked_target

        checked_target(html)
    worst, records = 0, []
    for path in files:
        record = inspect_file(
            path, energy=energy or html is not None, base=base, lora_alpha=lora_alpha, headers_only=headers_only
        )
        if engine:
            record = _with_engine(record, path, engine, max_lora_rank)
        if loaders:
            record = _with_loaders(record, path, loaders, lora_alpha)
        worst = max(worst, _exit_code(record, strict))
        records.append(record)
        if as_json:
            click.echo(record.model_dump_json())
        else:
            _print(record)
    if sarif_file:
        _write_sarif(records, sarif_file, worst)
    if html:
        _write_page(records, html, quiet=as_json)
    sys.exit(worst)


def _write_page(records: Sequence[FileRecord], path: Path, *, quiet: bool) -> None:
    from harness.report.lora_page import write_lora_page

    page = write_lora_page(records, path, command=shlex.join(["lora-harness", *sys.argv[1:]]))
    if not quiet:
        click.echo(f"page: {page}")


def _write_sarif(records: Iterable[FileRecord], path: Path, exit_code: int) -> None:
    from harness.report.ci import write_sarif
    from harness.report.environment import new_header
    from harness.report.models import Footer
    from harness.report.records import Run

    write_sarif(Run(new_header(), tuple(records), Footer(counts={}, seconds=0.0, exit_code=exit_code)), path)


def _exit_code(record: FileRecord, strict: bool) -> int:
    exits = {None: 0, "warning": int(strict), "error": 1, "fatal": 2}
    return exits[record.severity]


def _with_engine(record: FileRecord, path: Path, engine: str, max_lora_rank: int | None) -> FileRecord:
    from harness.doctor.inspect.engines import engine_hazards
    from harness.files import read_lora

    if record.format is None:
        return record
    found = tuple(engine_hazards(read_lora(path, strict=False), engine, max_lora_rank))
    return record.model_copy(update={"hazards": (*record.hazards, *found)})


def _with_loaders(record: FileRecord, path: Path, loaders: Iterable[str], lora_alpha: float | None) -> FileRecord:
    from harness.doctor.loader_law import known_obstacle, measured_prescription, own_bench
    from harness.doctor.traits import Traits
    from harness.files import read_lora

    if record.format is None:
        return record
    traits, found = Traits(read_lora(path, strict=False)), dict[str, float | None]()
    reasons, notes = {}, []
    for name in loaders:
        if why := known_obstacle(name, traits, lora_alpha=lora_alpha):
            found[name], reasons[name] = None, why
            continue
        found[name], bench = measured_prescription(name, traits, lora_alpha=lora_alpha), own_bench(name, traits)
        notes.append(
            f"{name} was measured on {bench}" if bench else f"{name} was not measured on this file's architecture"
        )
    return record.model_copy(update={"prescription": found, "unprescribed": reasons, "notes": (*record.notes, *notes)})


def _print(record: FileRecord) -> None:
    from rich.text import Text

    from harness.verdict.codes import CODES

    console = stdout_console()
    console.print(Text(printable(record.path, 500), style="bold"))
    if record.format is not None:
        console.print(Text(f"  {record.headline}"))
        console.print(grid((f"  {label}", value) for label, value in _facts(record)))
    for hazard in record.hazards:
        head = f"{hazard.code} {CODES[hazard.code].title}: "
        console.print(Text("  ").append(head, style="yellow").append(printable(hazard.what, 400)))
    if record.advice:
        console.print(Text(f"  {record.advice.outlook}: {printable(record.advice.reason, 400)}", style="bold"))
        for line in record.advice.advice:
            console.print(Text(f"    - {printable(line, 400)}"))
    if record.prescription and record.modules:
        if rows := list(_prescriptions(record)):
            console.print(grid(rows))
        for line in _shared_reasons(record):
            console.print(Text(line))
    if record.energies:
        console.print(_blocks(record.energies))


def _facts(record: FileRecord) -> Iterator[tuple[str, str]]:
    if record.fit:
        yield "base", record.fit.said
    dialect = f" (names of {record.dialect})" if record.dialect in _NAMED_TOOLS else ""
    yield "format", f"{record.format}{dialect}; alpha from {record.alpha_source}"
    if record.modules:
        yield "modules", f"{record.modules} ({_counts(record.variants)}; {_counts(record.dtypes)})"
        yield "rank", _counts(record.ranks) or "-"
        yield "alpha", _counts(record.alphas) or "-"
    else:
        yield "modules", "none that can be read"
    for name, (low, high) in record.scales.items():
        yield f"scale {name}", f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    if "none" in record.alphas and not record.scales:
        yield "scale", "unknown, as alpha is" + (": readers take 1" if record.alpha_source == "none" else "")
    yield "understood", "-" if record.coverage is None else f"{record.coverage:.0%} of the keys"
    if record.trainer:
        yield "trainer", record.trainer
    if record.energy:
        yield "energy", _energies(record.energy)
    for note in record.notes:
        yield "note", note


def _prescriptions(record: FileRecord) -> Iterator[tuple[str, str, str]]:
    from harness.law.known import tools

    alone = {names[0]: why for why, names in record.without_number.items() if len(names) == 1}
    for loader, strength in record.prescription.items():
        if strength is not None:
            tool = tools().get(loader)
            said = tool.passing(strength, record.components) if tool else f"strength {strength:g}"
            yield "  pass", printable(loader, 120), said
        elif loader in alone:
            yield "  pass", printable(loader, 120), f"no number: {printable(alone[loader], 400)}"


def _shared_reasons(record: FileRecord) -> Iterator[str]:
    for why, names in record.without_number.items():
        if len(names) > 1:
            yield f"  pass  no number to {printable(', '.join(names), 400)}: {printable(why, 400)}"


def _blocks(energies: Mapping[str, ModuleEnergy]) -> Table:
    """Return the energies by block; of many blocks those with the largest, in the order of the model."""
    from rich.table import Table
    from rich.text import Text

    from harness.verdict.blocks import by_block

    blocks = by_block(energies)
    strongest = sorted(blocks, key=lambda block: -(block.energy or 0.0))[:_BLOCKS_SHOWN]
    what = "||ΔW|| / ||W||" if any(block.relative is not None for block in blocks) else "||ΔW||"
    table = Table(box=None, pad_edge=False, padding=(0, 2), caption_justify="left")
    table.add_column("  block", overflow="fold")
    for column in ("modules", what, "largest σ", "effective rank"):
        table.add_column(column, justify="right")
    for block in (block for block in blocks if block in strongest):
        energy = "-" if block.energy is None else f"{block.energy:.3g}"
        cells = (f"{block.modules}", energy, f"{block.spectral:.3g}", f"{block.effective_rank:.3g}")
        table.add_row(Text(f"  {printable(block.name, 80)}"), *cells)
    if len(blocks) > len(strongest):
        table.caption = f"  and {len(blocks) - len(strongest)} weaker blocks (all of them with --html)"
    return table


def _energies(energy: Mapping[str, float]) -> str:
    """Return the largest energies by module, in words short enough for a terminal."""
    from harness.report.summary import listed

    found = sorted(energy.items(), key=lambda item: -item[1])
    return listed([f"{name} {value:.3g}" for name, value in found], _ENERGIES_SHOWN)


def _counts(values: dict[str, int]) -> str:
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ({times}x)" for value, times in list(values.items())[:8])
