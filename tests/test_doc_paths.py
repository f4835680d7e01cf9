"""Every file and module that a page, a workflow or the Makefile names exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(
        page
        for folder in ("docs", "examples", "fixtures", "tests", "benchmarks")
        for page in (ROOT / folder).rglob("*.md")
    ),
    *(ROOT / ".github").rglob("*.yml"),
    ROOT / "Makefile",
]
_FILE = re.compile(
    r"(?<![\w/.-])((?:harness|tests|benchmarks|fixtures|examples|docs)/[\w/.-]+\.(?:py|md|toml|sh|json))\b"
)
_MODULE = re.compile(r"-m (harness(?:\.\w+)+|benchmarks\.\w+)")
_MADE = ("NAME", "benchmarks/gpu.md", "examples/out")  # to be put in, or written by a command


def missing(text: str, folder: Path = ROOT) -> Iterator[str]:
    for name in _FILE.findall(text):
        here = (ROOT / name).exists() or (folder / name).exists()
        if not here and not any(made in name for made in _MADE):
            yield name
    for module in _MODULE.findall(text):
        path = ROOT / module.replace(".", "/")
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
            yield module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    assert list(missing(page.read_text(encoding="utf-8"), page.parent)) == []


def test_a_page_that_names_nothing_real_is_found() -> None:
    assert list(missing("`harness/no/such.py`, `python -m harness.nothing`")) == [
        "harness/no/such.py",
        "harness.nothing",
    ]
