"""Every file and module that a page, a workflow, the Makefile or a comment names exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.loaders.live import live_loaders

ROOT = Path(__file__).parents[1]
FOLDERS = ("harness", "tests", "benchmarks", "fixtures", "examples", "docs")
PAGES = [
    *(page for page in ROOT.glob("*.md") if page.name != "CHANGELOG.md"),  # it names what there was, too
    *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md")),
    *(ROOT / ".github").rglob("*.yml"),
    *(ROOT / name for name in ("Makefile", "pyproject.toml", ".pre-commit-hooks.yaml", ".ci/run")),
]
SOURCES = [source for folder in FOLDERS[:-1] for source in (ROOT / folder).rglob("*.py") if source != Path(__file__)]
_FILE = re.compile(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w/.-]+\.(?:py|md|toml|sh|json|jsonl|j2))\b")
_FOLDER = re.compile(rf"`((?:{'|'.join(FOLDERS)})/(?:[\w-]+/)*)`")
_SHORT = re.compile(r"`((?:[\w-]+/)+[\w-]+\.(?:py|md|toml|json))`")  # `law/scale.py` is below harness/
_MODULE = re.compile(r"(?<![\w./-])(harness(?:\.[a-zA-Z]\w*)+|benchmarks\.[a-z]\w*)(?![\w/-])")
_MADE = (
    "NAME", "examples/out", "harness/nightly.sh",  # to be put in, or written by a command
    "tests/test_acme_lora.py", "tests/test_x.py", "harness.checks.families.extra", "harness.py",  # of made-up projects
)  # fmt: skip


def exists(name: str, folder: Path) -> bool:
    return any((base / name).exists() for base in (ROOT, folder, ROOT / "harness"))


def imports(name: str) -> bool:
    """Whether a dotted name is a module, or its last part is a word of the module before it."""
    path = ROOT / name.replace(".", "/")
    if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
        return True
    homes = (path.parent.with_suffix(".py"), path.parent / "__init__.py")
    return any(home.exists() and re.search(rf"\b{path.name}\b", home.read_text(encoding="utf-8")) for home in homes)


def missing(text: str, folder: Path = ROOT, *, short: bool = True) -> Iterator[str]:
    files = dict.fromkeys([*_FILE.findall(text), *_FOLDER.findall(text), *(_SHORT.findall(text) if short else ())])
    yield from (name for name in files if not any(made in name for made in _MADE) and not exists(name, folder))
    yield from (name for name in _MODULE.findall(text) if name not in _MADE and not imports(name))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    about_others = "findings" in page.parts  # their short paths are those of other projects
    assert list(missing(page.read_text(encoding="utf-8"), page.parent, short=not about_others)) == []


def test_what_sources_name_exists() -> None:
    assert len(SOURCES) > 300
    found = {
        str(source.relative_to(ROOT)): names
        for source in SOURCES
        if (names := list(missing(source.read_text(encoding="utf-8"), source.parent, short=False)))
    }
    assert found == {}


def test_a_page_that_names_nothing_real_is_found() -> None:
    wrong = ["harness/no/such.py", "harness/none/", "law/none.py", "harness.nothing", "harness.law.scale.nothing"]
    assert list(missing(" ".join(f"`{name}`" for name in wrong))) == wrong
    assert list(missing("`harness/law/scale.py` `law/scale.py` `harness.law.scale.trained_scale`")) == []


def test_the_readme_names_the_project_of_every_live_loader() -> None:
    readme = re.sub(r"[^a-z0-9]", "", (ROOT / "README.md").read_text(encoding="utf-8").lower())
    projects = {loader.load.__module__.rpartition(".")[2] for loader in live_loaders().values()}
    assert [name for name in sorted(projects) if name.replace("_", "") not in readme] == []
