"""Mutation testing of the harness's core with cosmic-ray: `python -m benchmarks.mutants [NAME...]`.

Every mutant is one change of one operator, number, condition, loop or decorator; its module's own fast tests must
fail. Work is done in a copy. benchmarks/mutants.toml says of each survivor why it is harmless; with no names given,
benchmarks/mutants.md is written. Exit 1: a module below 90 % (law/: 95 %) of the mutants that are not equivalent to
it, or a survivor that nobody has judged.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis  # noqa: F401  # imported before the forks, as the next three are: that is two fifths of a mutant's time
import pydantic  # noqa: F401
import pytest
import torch
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
REPORT, REASONS = ROOT / "benchmarks" / "mutants.md", ROOT / "benchmarks" / "mutants.toml"
WANTED, WANTED_OF_LAW = 0.9, 0.95
# `X | None` only stands in annotations, which are never evaluated here; bit operators on floats always raise, so
# counting them as killed would flatter the tests.
LEFT_OUT = ("core/ReplaceBinaryOperator_BitOr_.*", "core/ReplaceBinaryOperator_.*_(RShift|LShift|BitOr|BitAnd|BitXor)")
SUBJECTS = {
    "law/grammar": "law/test_grammar.py",
    "law/traits": "law/test_traits.py",
    "law/probe": "law/test_probes.py",
    "law/scale": "law/test_probes.py",
    "law/law": "law/test_law_text.py",
    "law/identify": "law/test_law_search.py",
    "law/diagnosis": "law/test_diagnosis.py law/test_parts.py law/test_law.py",
    "law/known": "law/test_prescribe.py",
    "law/findings": "law/test_findings.py law/test_findings_data.py",
    "law/reads": "law/test_reads.py law/test_findings_data.py",
    "measure/tolerance": "measure/test_tolerance.py",
    "measure/compare": "measure/test_fit.py",
    "measure/effective": "measure/test_reading.py measure/test_plain.py measure/test_dense.py",
    "reference/closed_form": "reference/test_closed_form.py reference/test_variants_by_hand.py",
    "verdict/verdict": "verdict/test_verdict.py",
}

INTRODUCTION = """\
# Mutants of the harness's core

`make mutants` (`python -m benchmarks.mutants`) changes one operator, number, condition, loop or decorator at a time
with [cosmic-ray](https://github.com/sixty-north/cosmic-ray) and runs the module's own fast tests; a mutant is killed
when a test fails or runs out of time. Every mutant of these modules is run, but for two kinds: `X | None` in
annotations, which nothing evaluates, and bit operators in place of arithmetic, which raise on floats and would only
flatter the number. The score is the share killed of those that are not equivalent to the module.
"""


Reasons = Mapping[tuple[str, str, str], str]  # by module, line before, line after


@dataclass(frozen=True)
class Survivor:
    """A mutant that no test noticed: the line before and after."""

    was: str
    becomes: str


@dataclass(frozen=True)
class Tally:
    """One module's mutants and those that were not noticed."""

    name: str
    mutants: int
    survivors: tuple[Survivor, ...]
    seconds: float

    @property
    def killed(self) -> int:
        """How many mutants a test noticed."""
        return self.mutants - len(self.survivors)

    def equivalent(self, reasons: Reasons) -> int:
        """How many of the survivors do what the module does."""
        return sum(reasons.get((self.name, s.was, s.becomes), "").startswith("equivalent") for s in self.survivors)

    def score(self, reasons: Reasons) -> float:
        """Return the share that a test noticed of the mutants that differ from the module at all."""
        return self.killed / (self.mutants - self.equivalent(reasons))

    def enough(self, reasons: Reasons) -> bool:
        """Whether tests noticed the wanted share."""
        return self.score(reasons) >= (WANTED_OF_LAW if self.name.startswith("law/") else WANTED)


def judged() -> Reasons:
    """Return the reason of each survivor that was judged."""
    entries = tomllib.loads(REASONS.read_text(encoding="utf-8"))["survivor"]
    return {(e["module"], e["was"], becomes): e["reason"] for e in entries for becomes in e["becomes"]}


def copy_of_the_checkout(folder: Path) -> None:
    """Copy what the tests need; mutants are written into this copy only."""
    names = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True).split("\n")
    for name in filter(None, names):
        if name.startswith(("harness/", "tests/", "conftest.py", "pyproject.toml")) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def mutants(source: str) -> Iterator[str]:
    """Yield the source with one change each, by every operator of cosmic-ray that needs no names to be given."""
    for name in operator_names():
        operator = get_operator(name)
        if any(re.fullmatch(pattern, name) for pattern in LEFT_OUT) or operator.arguments():
            continue
        changed = (mutate_code(source, operator(), occurrence) for occurrence in itertools.count())
        yield from itertools.takewhile(lambda code: code is not None, changed)


def tests_pass(paths: str, timeout: float) -> bool:
    """Run the tests in a fork: torch is imported once, not once per mutant; out of time counts as failed."""
    child = os.fork()
    if not child:
        outcome = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            outcome = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{path}" for path in paths.split())])
        finally:
            os._exit(outcome)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def mutate(name: str) -> Tally:
    """Run every mutant of one module of the copy, one at a time."""
    module, tests, started = Path("harness", f"{name}.py"), SUBJECTS[name], time.monotonic()
    source = module.read_text(encoding="utf-8")
    if not tests_pass(tests, 600):
        raise SystemExit(f"{tests} fail on the unchanged {module}: mend them first")
    timeout = 5 + 5 * (time.monotonic() - started)
    module.write_text("raise ImportError", encoding="utf-8")
    if tests_pass(tests, timeout):
        raise SystemExit(f"{tests} do not import the copy of {module}")
    every, survivors = list(mutants(source)), []
    for changed in every:
        module.write_text(changed, encoding="utf-8")
        if tests_pass(tests, timeout):
            survivors.append(survivor(source, changed))
            print(name, survivors[-1], file=sys.stderr)
    module.write_text(source, encoding="utf-8")
    return Tally(name, len(every), tuple(survivors), time.monotonic() - started)


def survivor(source: str, changed: str) -> Survivor:
    """Name the lines that differ."""
    lines = list(difflib.ndiff(source.splitlines(), changed.splitlines()))
    was, becomes = (" ".join(line[2:].strip() for line in lines if line[:2] == sign) for sign in ("- ", "+ "))
    return Survivor(was, becomes)


def cell(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else "(removed)"


def survivors_of(tally: Tally, reasons: Reasons) -> Iterator[str]:
    for each in tally.survivors:
        reason = reasons.get((tally.name, each.was, each.becomes), "**not judged**")
        yield f"| {tally.name} | {cell(each.was)} | {cell(each.becomes)} | {reason} |"


def report(tallies: Sequence[Tally], reasons: Reasons) -> str:
    """Return the Markdown page."""
    total, killed = sum(t.mutants for t in tallies), sum(t.killed for t in tallies)
    same = sum(t.equivalent(reasons) for t in tallies)
    left_out = ", ".join(name for name in SUBJECTS if name not in {t.name for t in tallies})
    rows = [
        f"| {t.name} | {t.mutants} | {t.killed} | {t.equivalent(reasons)} | {t.score(reasons):.1%} "
        f"| {t.seconds / 60:.0f} min |"
        for t in tallies
    ]
    return "\n".join(
        [
            INTRODUCTION,
            "| module | mutants | killed | equivalent | score | time |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            *rows,
            f"| all | {total} | {killed} | {same} | {killed / (total - same):.1%} | |",
            "",
            *([f"Not run this time: {left_out}.", ""] if left_out else []),
            "## Survivors",
            "",
            "| module | line | mutant | why it is harmless |",
            "| --- | --- | --- | --- |",
            *(line for tally in tallies for line in survivors_of(tally, reasons)),
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", choices=[*SUBJECTS, []], help="modules; default: all, and the report")
    options = parser.parse_args(argv)
    sys.dont_write_bytecode = True  # two mutants within a second and of one size would share a cache file
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # plugins of other projects cost half a second per mutant
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy_of_the_checkout(Path(folder))
        os.chdir(folder)
        sys.path.insert(0, folder)
        tallies = [mutate(name) for name in options.names or SUBJECTS]
        os.chdir(ROOT)
    reasons = judged()
    text = report(tallies, reasons)
    print(text)
    if not options.names:
        REPORT.write_text(text, encoding="utf-8")
    unjudged = [s for t in tallies for s in t.survivors if (t.name, s.was, s.becomes) not in reasons]
    return 1 if unjudged or not all(t.enough(reasons) for t in tallies) else 0


if __name__ == "__main__":
    sys.exit(main())
