"""What a user would pick instead, on the same files: who is right, and what the answer costs on one thread.

    python -m benchmarks.peers [--quick]

The peers are those of the extra `bench`, in an environment of their own (`make .venv-bench/.ready`) that sees the
packages of this one and can replace none. LORA_INSPECTOR and SD_SCRIPTS name checkouts of rockerBOO/lora-inspector and
kohya-ss/sd-scripts; without them those are left out. Every run is a process; the model is drawn at random.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from benchmarks.tools import one_thread, table

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-bench" / "bin" / "python"
CHECKOUTS = {"LORA_INSPECTOR": ("lora-inspector.py", "-w"), "SD_SCRIPTS": ("networks/check_lora_weights.py",)}
CLOSE = 1e-3
QUESTIONS = ("is the merge right?", "norms of all updates", "is the file in order?")
Norms = Mapping[str, float]


@dataclass(frozen=True)
class Case:
    """One question about files: what they are, where they lie, and the true answer."""

    what: str
    paths: Mapping[str, Path]
    right: bool | Norms


@dataclass(frozen=True)
class Ran:
    """One process: its exit code and output, seconds of the clock and in user mode, and the most memory, MB."""

    code: int
    text: str
    wall: float
    user: float
    peak: float


@dataclass(frozen=True)
class Tool:
    """How a tool is asked, and its answer in what came of it: as the case's, None where it says nothing."""

    name: str
    command: Callable[[Mapping[str, Path]], Sequence[str]]
    answer: Callable[[Ran], bool | Norms | None]


def ran(command: Sequence[str], output: Path) -> Ran:
    """Run one tool alone."""
    with output.open("wb") as stream:
        began = time.perf_counter()
        environment = {**one_thread(), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "RAYON_NUM_THREADS": "1"}
        pid = os.posix_spawn(
            command[0], list(command), environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, stream.fileno(), 1), (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)
            ],
        )  # fmt: skip
        _, status, used = os.wait4(pid, 0)
    wall, text = time.perf_counter() - began, output.read_text(encoding="utf-8", errors="replace")
    return Ran(os.waitstatus_to_exitcode(status), text, wall, used.ru_utime, used.ru_maxrss / 1024)


def ours(*words: str) -> list[str]:
    return [sys.executable, "-m", "harness", *words]


def rival(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.rivals", *map(str, words)]


def theirs(module: str, *words: str | Path) -> list[str]:
    return [str(PYTHON), "-m", module, *map(str, words)]


def by_code(found: Ran) -> bool | None:
    """Read an exit code: 0 right, 1 wrong, others no answer."""
    return {0: True, 1: False}.get(found.code)


def deltalint(at: Mapping[str, Path]) -> list[str]:
    return theirs("deltalint.cli", "check", "--base", at["base"], "--merged", at["merged"], "--adapter", at["lora"])


def sentry(*options: str) -> Callable[[Mapping[str, Path]], list[str]]:
    return lambda at: theirs("adaptersentry", "scan", *options, weights(at))


MERGES = (
    Tool("`verify`", lambda at: ours("verify", *words(at)), by_code),
    Tool("`verify --full`", lambda at: ours("verify", "--full", *words(at)), by_code),
    Tool("deltalint", deltalint, by_code),
    Tool("PEFT's merge, compared", lambda at: rival("merged", at["base"], at["merged"], at["lora"]), by_code),
)


def words(at: Mapping[str, Path]) -> list[str]:
    return ["--base", str(at["base"]), "--merged", str(at["merged"]), "--lora", str(at["lora"])]


def our_norms(found: Ran) -> Norms | None:
    energies = json.loads(found.text)["energies"]
    return {name.removeprefix("base_model.model."): energy["norm"] for name, energy in energies.items()}


def sentrys_norms(found: Ran) -> Norms | None:
    """Return those of adaptersentry, which tells the logarithm of the root mean square of an update's elements."""
    norms = {}
    for module in json.loads(found.text)["modules"]:
        size = module["shape_b"][0] * module["shape_a"][1]
        place = "self_attn" if module["kind"] == "attention" else "mlp"
        norm = math.exp(module["features"]["log_rms"]) * math.sqrt(size)
        norms[f"model.layers.{module['layer']}.{place}.{module['module']}"] = norm
    return norms


def weights(at: Mapping[str, Path]) -> Path:
    return at["lora"] / "adapter_model.safetensors"


def nothing(found: Ran) -> None:
    """Return the answer of tools that give none: they read, or print means of the halves."""


def norm_tools() -> Iterator[Tool]:
    yield Tool("`inspect --energy`", lambda at: ours("inspect", str(at["lora"]), "--energy", "--json"), our_norms)
    yield Tool("adaptersentry", sentry("--format", "full-json"), sentrys_norms)
    yield Tool("PEFT's dense update", lambda at: rival("norms", at["base"], at["lora"]), lambda f: json.loads(f.text))
    yield Tool("safetensors, reads only", lambda at: rival("read", weights(at)), nothing)
    for variable, (script, *options) in CHECKOUTS.items():
        if folder := os.environ.get(variable):
            start = [str(PYTHON), str(Path(folder) / script), *options]
            yield Tool(Path(script).name, lambda at, start=start: [*start, str(weights(at))], nothing)  # type: ignore[misc]


HEALTH = (
    Tool("`inspect`", lambda at: ours("inspect", str(at["lora"])), lambda found: found.code == 0),
    Tool("adaptersentry", sentry("--fail-on", "review"), lambda found: found.code == 0),
    Tool("safetensors, reads only", lambda at: rival("read", weights(at)), lambda found: found.code == 0),
)


def asked(question: str, tools: Sequence[Tool], cases: Sequence[Case], folder: Path) -> Iterator[list[str]]:
    """Yield the row of every tool."""
    for tool in tools:
        command = [tool.command(case.paths) for case in cases]
        if not Path(command[0][0]).exists():
            yield [question, tool.name, "not installed here", "", "", "", "", ""]
            continue
        found = [ran(words, folder / "out") for words in command]
        grades = [graded(tool, one, case) for one, case in zip(found, cases, strict=True)]
        false = ", ".join(case.what for case, grade in zip(cases, grades, strict=True) if grade is False)
        costs = [[one.user for one in found], [one.wall for one in found]]
        yield [
            question, tool.name, f"{grades.count(True)} of {len(cases)}", false, str(grades.count(None)),
            *(f"{statistics.median(each):.1f}" for each in costs), f"{max(one.peak for one in found):.0f}",
        ]  # fmt: skip


def graded(tool: Tool, found: Ran, case: Case) -> bool | None:
    """Return whether the answer is the true one, None without any."""
    try:
        answer = tool.answer(found)
    except (ValueError, KeyError, TypeError):
        return None
    if answer is None or isinstance(case.right, bool) or isinstance(answer, bool):
        return None if answer is None else answer == case.right
    same = answer.keys() == case.right.keys()
    return same and all(abs(answer[name] / norm - 1) <= CLOSE for name, norm in case.right.items())


def written(folder: Path, *, quick: bool) -> list[list[Case]]:
    """Write the files of every question."""
    from benchmarks.peer_files import broken_files, merges, scaled_files

    return [merges(folder, random.Random(0), quick=quick), scaled_files(folder), broken_files(folder)]


def main(argv: Sequence[str] = ()) -> list[str]:
    """Measure and return the lines of a Markdown section."""
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(1) as apart:
        # another process writes the files: a child's peak is at least what its parent has when it starts
        cases = apart.submit(written, Path(name), quick="--quick" in argv).result()
        sets = list(zip(QUESTIONS, (MERGES, list(norm_tools()), HEALTH), cases, strict=True))
        rows = [row for one in sets for row in asked(*one, Path(name))]
        told = "; ".join(f"{question} {', '.join(case.what for case in cases)}" for question, _, cases in sets)
    head = ["question", "tool", "right", "wrong about", "no answer", "user, s", "wall, s", "peak, MB"]
    said = (
        f"Cases: {told}. Norms count as right within {CLOSE:g}. Median of the cases, a process each, one thread; peers "
    )
    return ["## Peers on the same files", "", f"{said}{versions()}.", "", *table(head, rows)]


def versions() -> str:
    """Return which peers there are."""
    path = str(next(PYTHON.parents[1].glob("lib/python*/site-packages"), "")) if PYTHON.exists() else ""
    found = {d.name: d.version for d in distributions(path=[path])} if path else {}
    names = [f"{name} {found[name]}" for name in ("deltalint", "adaptersentry") if name in found]
    return ", ".join(names) or "are not installed: `make .venv-bench/.ready`"


if __name__ == "__main__":
    print("\n".join(main(sys.argv[1:])))
