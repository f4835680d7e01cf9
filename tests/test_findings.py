"""Every page of `docs/findings` is run: its script must still print what the page shows.

One process per loader imports that loader once and forks for each page, because the import is nearly all of the time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

from harness.loaders.checkouts import Checkout
from harness.loaders.installing import parse_pin
from harness.loaders.live import live_loaders
from harness.loaders.releases import beside, find_releases, unpacked

FOLDER = Path(__file__).parents[1] / "docs" / "findings"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")

CHECKOUTS = {live.checkout.name: live.checkout for live in live_loaders().values() if live.checkout}
WARM_UP = {
    "adapters": "import adapters",
    "diffusers": "import diffusers.loaders.lora_pipeline, peft, transformers",
    "lycoris_lora": "import lycoris",
    "litgpt": "import litgpt.lora",
    "loralib": "import loralib",
    "mlx-lm": "import mlx_lm.tuner.utils",
    "peft": "import peft",
    "refiners": "import refiners.fluxion.adapters.lora",
    "transformers": "import peft, transformers.models.llama.modeling_llama",
    # `import diffsynth` needs torchvision; its LoRA modules do not
    "diffsynth": "import sys, types, torch; package = types.ModuleType('diffsynth'); "
    "package.__path__ = [{folder!r}]; sys.modules['diffsynth'] = package",
}
FORK_SERVER = """
import json, os, resource, runpy, sys, traceback
exec(sys.argv[1])
for line in sys.stdin:
    script, out = json.loads(line)
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        for stream, path in ((1, out), (2, out + ".err")):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
        code = 1
        try:
            runpy.run_path(script, run_name="__main__")
            code = 0
        except SystemExit as stopped:
            code = 1 if stopped.code else 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@dataclass(frozen=True)
class Page:
    """What a page says: the release, what else the script needs, the script and its output."""

    package: str
    version: str
    beside: tuple[tuple[str, str], ...]
    script: str
    output: str


def read_page(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    pins = re.findall(r"`([\w-]+)==([\w.]+)`", text.partition("**Version** ")[2].partition("\n")[0])
    script = re.search(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    output = re.search(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert pins, f"{path.name}: no line '**Version** `package==version`'"
    assert script, f"{path.name}: no python block"
    assert output, f"{path.name}: no text block"
    return Page(*pins[0], tuple(pins[1:]), script[1], output[1])


def warm_up(page: Page) -> str:
    """Return the statements that import the page's loader; skip where its release is not here."""
    if page.package == "diffsynth":
        found = [release for release in find_releases("diffsynth") if release.version == page.version]
        if not found:
            pytest.skip(f"diffsynth {page.version} is not unpacked (lora-harness install)")
        return WARM_UP["diffsynth"].format(folder=str(found[0].folder / "diffsynth"))
    if page.package in CHECKOUTS:
        return in_checkout(page, CHECKOUTS[page.package])
    if page.package == "invokeai":
        return in_invokeai(page)
    if found := unpacked_beside(page):
        return f"import sys; sys.path[:0] = {found!r}; {WARM_UP[page.package]}"
    for package, version in ((page.package, page.version), *page.beside):
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
        if installed != version:
            pytest.skip(f"the page is about {package} {version}; installed is {installed}")
    return WARM_UP[page.package]


def unpacked_beside(page: Page) -> list[str]:
    """Return the folders of the release and of what it needs beside it, where all are unpacked."""
    pins = [(page.package, page.version), *map(parse_pin, beside(page.package, page.version))]
    found = [next((r for r in unpacked(name) if r.version == version), None) for name, version in pins]
    return [str(release.folder) for release in found if release] if all(found) else []


def in_invokeai(page: Page) -> str:
    """Return the statements that let its files be imported as its live loader does; skip where it is not unpacked."""
    if page.version not in {release.version for release in find_releases("invokeai")}:
        pytest.skip(f"invokeai {page.version} is not unpacked (lora-harness install invokeai=={page.version})")
    return f"from harness.loaders.live.invokeai import PACKAGE, shipped; shipped(PACKAGE.release({page.version!r}))"


def in_checkout(page: Page, checkout: Checkout) -> str:
    """Return the statements that put the checkout first on the path; skip where it is not here."""
    if (version := checkout.version()) is None:
        pytest.skip(f"set {checkout.variable} to a checkout of {checkout.repository}")
    if version != page.version:
        pytest.skip(f"the page is about {page.package} {page.version}; {checkout.variable} names {version}")
    first = f"import sys, torch; sys.path.insert(0, {str(checkout.folder() / checkout.inside)!r})"
    live = live_loaders()[checkout.name]
    if not checkout.absent:
        return first
    return f"{first}; from {live.load.__module__} import shipped; shipped()"  # without libraries that load no LoRA


class Servers:
    """The running fork servers, one per loader."""

    def __init__(self) -> None:
        self._running: dict[str, subprocess.Popen[str]] = {}

    def run(self, statements: str, script: Path, out: Path) -> int:
        """Run `script` in a fork of the process that executed `statements`; return its wait status."""
        server = self._running.get(statements) or self._start(statements)
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps([str(script), str(out)]) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the loader could not be imported"
        return int(answer)

    def _start(self, statements: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-W", "ignore", "-c", FORK_SERVER, statements]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # fork needs one thread
        pipe = subprocess.PIPE
        server = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self._running[statements] = server
        return server

    def close(self) -> None:
        for server in self._running.values():
            server.communicate()


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    running = Servers()
    yield running
    running.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs the pages in forked processes")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_script_of_a_finding_prints_what_its_page_shows(path: Path, servers: Servers, tmp_path: Path) -> None:
    page = read_page(path)
    script, out = tmp_path / "finding.py", tmp_path / "out.txt"
    script.write_text(page.script, encoding="utf-8")
    status = servers.run(warm_up(page), script, out)
    assert status == 0, Path(f"{out}.err").read_text(encoding="utf-8")[-2000:]
    assert out.read_text(encoding="utf-8") == page.output


def test_the_index_has_every_page_and_no_other() -> None:
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    linked = re.findall(r"^\| \[[^]]+\]\(([\w.-]+\.md)\)", index, re.MULTILINE)
    assert sorted(linked) == [path.name for path in PAGES]


def test_there_are_findings_in_at_least_four_loaders() -> None:
    packages = [read_page(path).package for path in PAGES]
    assert len(packages) >= 14
    assert len(set(packages)) >= 4


def test_a_page_about_an_application_runs_where_its_variable_names_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, checkout = read_page(FOLDER / "comfyui-header-alpha-ignored.md"), CHECKOUTS["comfyui"]
    (tmp_path / "comfy").mkdir()
    (tmp_path / checkout.marker).touch()
    (tmp_path / "pyproject.toml").write_text(f'version = "{page.version}"', encoding="utf-8")
    monkeypatch.setenv(checkout.variable, str(tmp_path))
    assert str(tmp_path) in warm_up(page)
    (tmp_path / "pyproject.toml").write_text('version = "0.0.1"', encoding="utf-8")
    with pytest.raises(pytest.skip.Exception, match=r"names 0\.0\.1"):
        warm_up(page)
