"""Options that several commands share, and how a run is printed."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from harness.commands.pace import Pace
from harness.commands.screen import progress, say_to_the_runner
from harness.example import Patterns
from harness.loaders.protocol import COMMAND, FUNCTION
from harness.text import on_one_line

if TYPE_CHECKING:
    from harness.checks.cell import Cell
    from harness.checks.examine import Measured
    from harness.checks.plan import Plan
    from harness.report.gates import GateResult
    from harness.report.records import Run, RunWriter
    from harness.verdict.verdict import Verdict

PATH = click.Path(path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
DTYPE = click.Choice(["float32", "bfloat16", "float16"])
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON lines on stdout and nothing else.")
seed_option = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of all that is drawn."
)
name_option = click.option(
    "--name", "names", multiple=True, help="What reports call the loader; once for each LOADER, in their order."
)
examples_option = click.option(
    "--max-examples",
    type=click.IntRange(1),
    help=f"Random examples per format and bench.  [default: {FUNCTION.examples}; {COMMAND.examples} for cmd: loaders, "
    "which start a process each time]",
)
limit_option = click.option(
    "--time-limit",
    type=click.FloatRange(min=0.0, min_open=True),
    metavar="SECONDS",
    help=f"Limit for one call of a loader.  [default: {FUNCTION.seconds:g}; {COMMAND.seconds:g} for cmd: loaders]",
)
workers_option = click.option(
    "-j",
    "--workers",
    type=click.IntRange(0),
    default=None,
    help="Child processes at once (0: in this process; default: cores).",
)


install_option = click.option(
    "--install", is_flag=True, help="Fetch releases that are named (`peft==0.12.0`) and not here, with uv or pip."
)


def fetch(specs: Sequence[str], wanted: bool) -> None:
    """Fetch the releases that `specs` name and that are not here, where that is wanted; says first how large they are.

    Raises:
        UserError: the index cannot be reached, or has no such release.
    """
    if wanted:
        from harness.loaders.pinned import install_named

        install_named(specs, lambda line: click.echo(f"install: {line}", err=True))


def finite(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Return a number that was given as an option, unless it is NaN or infinite.

    Raises:
        BadParameter: it is.
    """
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no finite number", ctx, param)
    return value


lora_alpha_option = click.option(
    "--lora-alpha", type=float, callback=finite, help="The alpha of the training, for a file that carries none."
)


def named(loaders: Sequence[str], names: Sequence[str]) -> list[tuple[str, str | None]]:
    """Return each loader with what reports call it, None where nobody says.

    Raises:
        UserError: there are names, and not one for each loader.
    """
    from harness.errors import UserError

    if names and len(names) != len(loaders):
        raise UserError(
            f"--name is given {len(names)} times for {len(loaders)} loaders: give it once for each, or never"
        )
    return [(spec, names[number] if names else None) for number, spec in enumerate(loaders)]


def worker_count(given: int | None) -> int:
    """Return the number of child processes: as given, else one per core, at most four."""
    import os

    return given if given is not None else min(4, os.cpu_count() or 1)


class ModulePin(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """`NAME=RANK:ALPHA`, alpha may be `none`."""

    name = "NAME=RANK:ALPHA"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the target that `value` describes."""
        from harness.example import Target

        name, _, shape = str(value).rpartition("=")
        rank, _, alpha = shape.partition(":")
        try:
            number = None if alpha.lower() == "none" else float(alpha)
            if not name or int(rank) < 1:
                raise ValueError(value)
            return Target(name, int(rank), number)
        except ValueError:
            self.fail(f"{value!r}: write NAME=RANK:ALPHA, for example transformer_blocks.0.attn.to_q=4:8", param, ctx)


_PINS = (
    click.option(
        "--module", "modules", type=ModulePin(), multiple=True, help="One module of the LoRA; repeat for more."
    ),
    click.option("--rank", type=click.IntRange(1), help="Rank of every target module."),
    click.option("--alpha", type=float, help="Alpha of every target module."),
    click.option("--strength", type=float, help="Strength passed to the loader.  [default: 1]"),
    click.option("--dtype", type=DTYPE, help="Dtype of the model.  [default: float32]"),
    click.option("--file-dtype", type=DTYPE, help="Dtype of the LoRA file.  [default: that of the model]"),
    click.option("--key-seed", type=click.IntRange(0), help="Permutation of the file's keys (0: their own order)."),
    click.option(
        "--patterns",
        type=click.Choice(get_args(Patterns)),
        help="How the LoRA's configuration names modules of another rank or alpha.  [default: names]",
    ),
)
_PINNED = ("modules", "rank", "alpha", "strength", "dtype", "file_dtype", "key_seed", "patterns")


def pin_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that fix one example instead of searching; `command` gets `pins`, None when none is given."""

    @functools.wraps(command)
    def folded(**options: Any) -> None:
        from harness.checks.plan import Pins

        given = {name: value for name in _PINNED if (value := options.pop(name)) not in (None, ())}
        command(**options, pins=Pins(**given, value_seed=options["seed"]) if given else None)

    for option in _PINS:
        folded = option(folded)
    return folded


_BENCHES = (
    click.option(
        "--bench",
        "benches",
        multiple=True,
        metavar="BENCH",
        help="Only this bench, by name or as FILE.py:FUNCTION under @bench; repeat for more.",
    ),
    click.option(
        "--model",
        "models",
        multiple=True,
        metavar="FILE.py:FUNCTION",
        help="Only the model that this function builds, every layer of it; repeat for more.",
    ),
)


_QUANTISE = click.option(
    "--quantise",
    metavar="SCHEME",
    help="The linear layers of these benches as codes: nf4, fp4, int8, torchao-int8, torchao-fp8, quanto-int8, "
    "quanto-fp8, gguf-q8_0, gguf-q4_0, fp8-scaled.",
)


def bench_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say which benches; `command` gets the names as `benches`."""

    @functools.wraps(command)
    def folded(**options: Any) -> None:
        from harness.loaders.benches import bench_name

        scheme, models = options.pop("quantise"), options.pop("models")
        if scheme and not (models or options["benches"]):
            raise click.UsageError("--quantise rounds the layers of a bench: say which with --bench or --model")
        named = [bench_name(spec, model=True, quantise=scheme) for spec in models]
        if scheme:
            options["benches"] = [bench_name(spec, quantise=scheme) for spec in options["benches"]]
        command(**{**options, "benches": (*options["benches"], *named)})

    for option in (*_BENCHES, _QUANTISE):
        folded = option(folded)
    return folded


def say_what_is_measured(cells: Sequence[Cell], *, as_json: bool) -> None:
    """Say on stderr, of each bench of the user's own, which of its layers are measured and what is not."""
    tried: dict[str, set[str]] = {}
    for cell in cells:
        tried.setdefault(cell.bench_name, set()).update(cell.targets)
    for bench in {cell.bench_name: cell.bench for cell in cells}.values():
        for line in bench.measures(tried[bench.name]) if not as_json else ():
            click.echo(on_one_line(f"{bench.name}: {line}"), err=True)


@contextmanager
def cell_progress(cells: Sequence[Cell], plan: Plan, workers: int, *, quiet: bool, silent: bool) -> Iterator[Pace]:
    """Show on stderr how far the cells are, a line a minute where nothing is redrawn; `silent`: nothing at all."""
    with progress("checking", quiet=quiet, bar=False) as line:
        yield Pace(cells, plan, workers, line, None if silent else line.say)


def ask_reference(writer: RunWriter, cells: Sequence[Cell], workers: int) -> list[Verdict]:
    """Hold PEFT's own merge against the closed form wherever `cells` are, note it, and return what disagrees."""
    from harness.checks.reference import ask_peft

    reference = ask_peft(cells, workers=workers)
    writer.reference = str(reference)
    writer.write(*reference.verdicts)
    return reference.verdicts


def probe_writer(writer: RunWriter) -> Callable[[Cell, Measured], None]:
    """Return what records the probes of a cell, for the scale plots of the report."""
    from harness.report.models import probe_record

    def write(cell: Cell, measured: Measured) -> None:
        if measured.probes:
            place = cell.subject.title, cell.format, cell.bench_name
            writer.write(probe_record(*place, measured.law, measured.probes, variant=cell.variant_name))

    return write


def quiet_on(as_json: bool) -> bool:
    """Whether to leave out progress: JSON was asked for, or stderr is no terminal."""
    return as_json or not sys.stderr.isatty()


@dataclass(frozen=True)
class Baseline:
    """An earlier run, read before anything is written, and the rules under which a later one is worse."""

    run: Run
    rules: Sequence[str]

    @classmethod
    def read(cls, path: Path | None, rules: Sequence[str], out: Path) -> Baseline | None:
        """Return the baseline at `path`, None where none is wanted.

        Raises:
            UserError: it cannot be read or is not whole, a rule is none, or it is the file that this run will write.
        """
        from harness.errors import UserError
        from harness.report.gates import parse_rule, require_whole
        from harness.report.records import read_run

        for rule in rules:
            parse_rule(rule)
        if path is None:
            return None
        target = out / "run.jsonl"
        if target.exists() and path.exists() and target.samefile(path):
            raise UserError(
                f"--baseline {path} is the file that this run writes: copy it elsewhere, or choose another --out"
            )
        return cls(require_whole(read_run(path)), rules)

    def compare(self, run: Run) -> list[GateResult]:
        """Return what is worse in `run`."""
        from harness.report.gates import compare

        return compare(self.run, run, self.rules)

    def lines(self, run: Run) -> list[str]:
        """Return what is worse in `run`, a line each."""
        return [result.text() for result in self.compare(run)]


def finish(out: Path, *, baseline: Baseline | None, as_json: bool) -> int:
    """Write the report of OUT/run.jsonl, add it to OUT/history.jsonl and return the exit code.

    With a `baseline` only what got worse counts; without one, every violation and every planned part that was not
    measured.
    """
    from harness.report.ci import github_annotations, write_step_summary
    from harness.report.history import append_history, read_history
    from harness.report.records import read_run

    run = read_run(out / "run.jsonl")
    if not run.carried:  # a night counts what it measured
        append_history(out / "history.jsonl", run)
    gate = baseline.compare(run) if baseline else None
    write_step_summary(run, gate or ())
    past = read_history(out / "history.jsonl") if (out / "history.jsonl").exists() else []
    show(out, as_json=as_json, history=past, gate=gate)
    if not as_json:
        for line in github_annotations(run, gate or ()):
            say_to_the_runner(line)
        for result in gate or ():
            click.echo(f"gate: {result.text()}")
    code = run.footer.exit_code if run.footer else 1
    return code if gate is not None else code or int(run.status != "passed")


def show(out: Path, *, as_json: bool, history: Sequence[Any] = (), gate: Sequence[Any] | None = None) -> None:
    """Write OUT/index.html from OUT/run.jsonl and print the run."""
    from harness.report.html import write_report
    from harness.report.records import read_run
    from harness.report.terminal import print_run

    run = read_run(out / "run.jsonl")
    page = write_report([run], out, history=history, gate=gate)
    if not as_json:
        print_run(run)
        click.echo(f"report: {page}")
