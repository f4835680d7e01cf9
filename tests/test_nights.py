"""Two nights with a loader changed in between: history, page and gate tell of it, in both directions."""

from __future__ import annotations

import html
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from harness.cli import main
from harness.report.records import read_run

LOADER = """
import torch
from harness import loader
from harness.files import match_modules, read_lora

@loader(formats={"kohya"}, benches={"qwen-image"})
@torch.no_grad()
def load(model, lora, *, strength=1.0):
    adapter, layers = read_lora(lora), dict(model.named_modules())
    names, left = match_modules(adapter, layers)
    if left or adapter.unused_keys or any(m.keys.keys() - {"A", "B", "alpha"} for m in adapter.modules.values()):
        raise NotImplementedError("only A and B of layers that the model has are supported")
    for name, target in names.items():
        a, b = adapter.tensors(name)
        module, weight = adapter.modules[name], layers[target].weight
        delta = strength * SCALE * (b.double() @ a.double())
        weight.copy_(weight.double() + delta)
"""
RIGHT, IGNORES_ALPHA = "module.trained_scale", "1.0"
KNOWN = """
[[failure]]
id = "acme-ignores-alpha"
loader = "{loader}"
code = "LH202"
reason = "version 1 never read alpha"
link = "https://example.org/acme/issues/1"
"""


@dataclass(frozen=True)
class Nights:
    """The nights of one loader file: a folder each, and one history that is handed on."""

    root: Path

    @property
    def loader(self) -> str:
        return f"{self.root / 'acme.py'}:load"

    def record(self, number: int) -> Path:
        return self.root / f"night{number}" / "run.jsonl"

    def history(self, number: int) -> str:
        shown = CliRunner().invoke(main, ["history", str(self.record(number).with_name("history.jsonl"))])
        assert shown.exit_code == 0, shown.output
        return shown.output

    def page(self, number: int) -> str:
        return self.record(number).with_name("index.html").read_text(encoding="utf-8")

    def run(self, number: int, scale: str, *options: str) -> Result:
        (self.root / "acme.py").write_text(LOADER.replace("SCALE", scale), encoding="utf-8")
        out = self.record(number).parent
        out.mkdir()
        if number > 1:
            shutil.copy(self.record(number - 1).with_name("history.jsonl"), out)
        args = ["run", "--loader", self.loader, "--no-images", "--max-examples", "5", "-j", "1", "--out", str(out)]
        return CliRunner().invoke(main, [*args, *options])


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Nights, list[Result]]:
    """Return four nights: wrong, repaired, broken again, and broken with the failure on record."""
    found = Nights(tmp_path_factory.mktemp("nights"))
    known = found.root / "known.toml"
    known.write_text(KNOWN.format(loader=found.loader), encoding="utf-8")
    repaired = ("--baseline", str(found.record(2)))
    results = [
        found.run(1, IGNORES_ALPHA),
        found.run(2, RIGHT, "--baseline", str(found.record(1))),
        found.run(3, IGNORES_ALPHA, *repaired),
        found.run(4, IGNORES_ALPHA, *repaired, "--known-failures", str(known)),
    ]
    return found, results


def words(page: str) -> str:
    """Return the words of a page: no tags, no escapes."""
    return html.unescape(re.sub(r"<[^>]+>", "", page))


def flips(text: str) -> list[str]:
    """Return the lines of the changes in what `lora-harness history` prints, the newest first."""
    _, _, changed = text.partition("changes, the newest first\n")
    return [line.strip() for line in changed.splitlines()]


def test_the_exit_codes_tell_what_got_worse(nights: tuple[Nights, list[Result]]) -> None:
    assert [result.exit_code for result in nights[1]] == [1, 0, 1, 0], [result.output for result in nights[1]]


def test_a_repaired_loader_is_a_flip_of_its_law(nights: tuple[Nights, list[Result]]) -> None:
    (line,) = flips(nights[0].history(2))
    assert "law `strength` -> `strength * alpha / rank`" in line
    assert "kohya/qwen-image" in line


def test_a_loader_that_got_worse_is_the_newest_flip(nights: tuple[Nights, list[Result]]) -> None:
    newest, older = flips(nights[0].history(3))
    assert "law `strength * alpha / rank` -> `strength`" in newest
    assert "law `strength` -> `strength * alpha / rank`" in older


def test_the_page_shows_both_laws_of_the_flip(nights: tuple[Nights, list[Result]]) -> None:
    text = words(nights[0].page(3))
    assert "worse" in text
    assert "law `strength * alpha / rank` -> `strength`" in text
    assert "law `strength` -> `strength * alpha / rank`" in text
    assert "law `" not in words(nights[0].page(1))


def test_the_gate_names_the_new_violation(nights: tuple[Nights, list[Result]]) -> None:
    found = "new violation: .*kohya.*alpha ignored"
    assert re.search(f"gate: {found}", nights[1][2].output)
    assert "gate: " not in nights[1][3].output


def test_a_recorded_failure_is_expected_and_keeps_its_reason(nights: tuple[Nights, list[Result]]) -> None:
    run = read_run(nights[0].record(4))
    assert {v.code for v in run.verdicts if v.outcome == "xfailed"} == {"LH202"}
    assert all(v.ok for v in run.verdicts)
    assert "version 1 never read alpha" in " ".join(v.reason or "" for v in run.verdicts)
