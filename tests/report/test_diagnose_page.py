"""The page that diagnoses a file in the browser: a real Chromium, a server on this machine, nothing else to ask."""

from __future__ import annotations

import functools
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import chromium_browser
import pytest
import wasm_python
from axe import serious_faults
from click.testing import CliRunner
from report_samples import HOSTILE, passed, run_of

from harness.commands.site import command
from harness.doctor.in_browser import answer
from harness.report.site.in_browser import Parts
from harness.report.site.pages import write_site

ROOT = Path(__file__).parents[2]
LORAS = ROOT / "fixtures" / "loras"
SAID = "return [...document.querySelectorAll('#said dt')].map((e) => [e.textContent, e.nextSibling.textContent])"
SET = "const e = document.getElementById(arguments[0]); e.value = arguments[1]"
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}


def stand_ins(folder: Path) -> Path:
    """Write files with the names of pyodide's and of the wheels."""
    (folder / "pyodide").mkdir(parents=True)
    for name in ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip", "pyodide-lock.json"):
        (folder / "pyodide" / name).write_text(name)
    for name in ("pydantic-2", "pydantic_core-2", "typing_extensions-4", "typing_inspection-0", "annotated_types-0"):
        (folder / f"{name}-py3-none-any.whl").write_text(name)
    return folder


def test_what_is_missing_is_named_and_what_is_there_lies_beside_the_page(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"has no pyodide\.mjs"):
        Parts.within(tmp_path)
    folder = stand_ins(tmp_path / "in")
    assert write_site([run_of(passed())], tmp_path / "site", python=Parts.within(folder)) > 140
    assert (tmp_path / "site" / "diagnose" / "pyodide" / "pyodide.asm.wasm").read_text() == "pyodide.asm.wasm"
    assert 'href="diagnose.html"' in (tmp_path / "site" / "index.html").read_text()
    (folder / "pydantic_core-2-py3-none-any.whl").unlink()
    (folder / "pyodide" / "python_stdlib.zip").unlink()
    with pytest.raises(Exception, match=r"has no python_stdlib\.zip, pydantic_core-\*\.whl; it takes `npm pack"):
        Parts.within(folder)


def test_a_site_without_it_has_no_page_and_no_way_to_one(tmp_path: Path) -> None:
    write_site([run_of(passed())], tmp_path / "site")
    assert "diagnose.html" not in (tmp_path / "site" / "index.html").read_text()
    assert not (tmp_path / "site" / "diagnose.html").exists()


def test_the_command_names_a_folder_that_has_not_what_it_takes(tmp_path: Path) -> None:
    from report_samples import write_run

    write_run(tmp_path, [passed()])
    words = [str(tmp_path / "run.jsonl"), "--out", str(tmp_path / "site"), "--with-diagnose", str(tmp_path)]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 1
    assert "has no pyodide.mjs" in str(done.exception)
    assert not (tmp_path / "site").exists()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """Serve a site with the page; yield its address and what was asked for."""
    if reason := chromium_browser.missing():
        pytest.skip(reason)
    folder = wasm_python.fetched(tmp_path_factory.mktemp("python"))
    if folder is None:
        pytest.skip("pyodide and its wheels cannot be fetched: no npm, no pip, or no registry")
    site = tmp_path_factory.mktemp("site")
    write_site([run_of(passed())], site, python=Parts.within(folder))
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            asked.append(str(args[0]))

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", asked
        server.shutdown()


@pytest.fixture(scope="module")
def page(served: tuple[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    browser = chromium_browser.start(tmp_path_factory.mktemp("chromium"), served=True)
    browser.get(f"{served[0]}diagnose.html")
    yield browser
    complaints = browser.get_log("browser")
    browser.quit()
    assert complaints == []


def told(page: Any, *paths: Path) -> list[list[str]]:
    """Return what the page says of files: labels and sentences."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    page.execute_script("document.getElementById('said').replaceChildren(); document.getElementById('file').value = ''")
    page.find_element(By.ID, "file").send_keys("\n".join(map(str, paths)))
    WebDriverWait(page, 240, 0.1).until(lambda b: b.execute_script(SAID) and b.execute_script(SAID)[0][0] != "reading")
    found: list[list[str]] = page.execute_script(SAID)
    return found


def here(folder: Path, names: Sequence[str], **asked: Any) -> list[list[str]]:
    """Return what the same code says here."""
    found = json.loads(answer(str(folder), names, **asked))
    if "error" in found:
        return [["error", found["error"]]]
    lines = (line.split(": ", 1) for line in found["lines"])
    return [*([label.strip(), text] for label, text in lines), ["not judged", found["unseen"]]]


def test_the_page_says_what_the_command_says(page: Any, served: tuple[str, list[str]], tmp_path: Path) -> None:
    files = [path for path in sorted(LORAS.rglob("*.safetensors")) if path.parent.name != "peft"][:6]
    for path in files:
        assert told(page, path) == here(path.parent, [path.name])
    folder = LORAS / "r8_a16" / "peft"
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert told(page, *(folder / name for name in names)) == here(folder, names)
    ((*_, (label, unseen)),) = [told(page, folder / names[1])]
    assert label == "not judged"
    assert unseen.endswith("and adapter_config.json, which has alpha and the rank: drop it with the file")
    assert {line.split()[1].split("/")[1] for line in served[1]} <= {"diagnose.html", "diagnose", "favicon.ico"}


def test_what_is_asked_is_answered(page: Any) -> None:
    path = LORAS / "r8_a16" / "diffsynth.safetensors"
    for tool, saw in (("diffsynth-2.0.4", ""), ("comfyui", "noise")):
        page.execute_script(SET, "tool", tool)
        page.execute_script(SET, "saw", saw)
        assert told(page, path) == here(path.parent, [path.name], tool=tool, saw=saw or None)
    page.execute_script(SET, "tool", "")
    page.execute_script(SET, "saw", "")


def test_bad_files_are_one_sentence(page: Any, tmp_path: Path) -> None:
    whole = (LORAS / "r8_a16" / "diffsynth.safetensors").read_bytes()
    written = {
        "cut.safetensors": whole[:-7], "empty.safetensors": b"", "web.safetensors": b"<!DOCTYPE html><html>",
        "pickle.pt": b"\x80\x02}q\x00.", "notes.json": b"{}", "half.safetensors": whole[:400],
    }  # fmt: skip
    for name, content in written.items():
        (tmp_path / name).write_bytes(content)
        ((label, sentence),) = told(page, tmp_path / name)
        assert label == "error"
        ((_, wanted),) = here(tmp_path, [name])
        assert sentence.partition(" (")[0] == wanted.partition(" (")[0]  # in brackets is what safetensors itself says
    assert told(page, tmp_path / "cut.safetensors", tmp_path / "web.safetensors")[0][1].startswith("one file at a time")


def test_hostile_names_stay_text(page: Any, tmp_path: Path) -> None:
    for number, text in enumerate(HOSTILE):
        name = f"{number}{text[:60].replace('/', '_')}.safetensors".replace("\n", "_").replace("\0", "_")
        shutil.copyfile(LORAS / "r8_a16" / "diffsynth.safetensors", tmp_path / name)
        assert told(page, tmp_path / name)[-1][0] == "not judged"
    assert page.execute_script("return document.querySelectorAll('#said img, #said script, #said svg').length") == 0


def test_a_large_file_is_not_read_but_for_its_header(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    rows = 1 << 15
    header = {
        f"lora_unet_blocks_0_self_attn_q.lora_{half}.weight": {
            "dtype": "F32", "shape": [16, rows] if half == "down" else [rows, 16],
            "data_offsets": [number * 64 * rows * 400, (number + 1) * 64 * rows * 400],
        }
        for number, half in enumerate(("down", "up"))
    }  # fmt: skip
    for row in header.values():
        row["shape"] = [size * 400 if size == rows else size for size in row["shape"]]
    raw = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + 2 * 64 * rows * 400)  # 1.7 GB, and none of it on the disk
    assert told(page, path) == here(tmp_path, [path.name])


def test_axe_finds_no_serious_fault_and_nothing_is_wider_than_a_phone(page: Any) -> None:
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    over = page.execute_script("return document.documentElement.scrollWidth - innerWidth")
    found = serious_faults(page)
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert (over <= 0, found) == (True, [])
