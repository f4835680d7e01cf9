"""What the README says exists: commands, options, codes, files; and its failure is what is printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_args

import click
import pytest
from click.testing import CliRunner

from harness.benches import bench_names
from harness.cli import COMMANDS, main
from harness.loaders.protocol import CORE_BENCHES
from harness.verdict.codes import CODES, Check

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "nightly.md", ROOT / "examples" / "README.md"]
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXT["README.md"]


def commands(text: str) -> list[str]:
    """Return every `lora-harness …` line or inline code of a page that names a command."""
    lines = [line.strip() for block in re.findall(r"```\w*\n(.*?)```", text, re.S) for line in block.splitlines()]
    inline = re.findall(r"`(lora-harness [^`]+)`", text)
    found = [line for line in lines + inline if line.startswith("lora-harness ")]
    return [line.partition(" >")[0].removesuffix("\\").strip() for line in found]


EVERY = [(page, line) for page, text in TEXT.items() for line in commands(text)]


@pytest.mark.parametrize(("page", "line"), EVERY)
def test_every_command_in_the_docs_exists_with_its_options(page: str, line: str) -> None:
    name, *args = shlex.split(line)[1:]
    assert name in COMMANDS
    command = main.get_command(click.Context(main), name)
    assert command is not None
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    used = {arg.partition("=")[0] for arg in args if arg.startswith("--")}
    assert used <= known


def test_the_readme_names_every_command() -> None:
    named = {shlex.split(line)[1] for line in commands(README)}
    assert named >= set(COMMANDS)


def test_the_pytest_options_in_the_docs_exist() -> None:
    plugin = (ROOT / "harness" / "plugin.py").read_text(encoding="utf-8")
    for text in TEXT.values():
        for option in re.findall(r"--lora-[a-z-]+", text):
            assert f'"{option}"' in plugin


def test_the_two_commands_stand_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)$", README, re.M):
        assert f"\n{target}:" in makefile


def test_codes_and_links_in_the_docs_exist() -> None:
    for page, text in TEXT.items():
        assert set(re.findall(r"LH\d{3}", text)) <= set(CODES)
        for link in re.findall(r"\]\((?!https?://)([^)#]+)", text):
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"


def test_the_failure_in_the_readme_is_what_is_printed() -> None:
    block = next(b for b in re.findall(r"```\n(LH201.*?)```", README, re.S))
    command = re.search(r"reproduce +(lora-harness .*)", block)
    assert command is not None
    printed = CliRunner().invoke(main, [*shlex.split(command[1])[1:], "-j", "1"]).output
    lines = printed.splitlines()
    start = lines.index(block.splitlines()[0])
    assert lines[start : start + len(block.splitlines())] == block.splitlines()


def test_the_readme_names_every_bench_and_variant_that_a_loader_may_declare() -> None:
    pytest.importorskip("torch", reason="the variants compute with it")
    from harness.variants import VARIANTS

    told = re.search(r"\*\*benches\*\* (.*?); \*\*variants\*\* (.*?)\.\n", README, re.S)
    assert told
    benches, variants = (re.findall(r"`([^`]+)`", names) for names in told.groups())
    assert (*CORE_BENCHES, *benches) == bench_names()
    assert ["lora", *variants] == list(VARIANTS)


def spans(text: str) -> set[str]:
    """Return the codes that a text lists, `LH201 to LH209` with all that lie between."""
    ends = re.findall(r"(LH\d{3})(?: to (LH\d{3}))?", text)
    return {code for low, high in ends for code in CODES if low <= code <= (high or low)}


def test_the_readme_lists_the_codes_that_each_check_emits() -> None:
    rows = dict(re.findall(r"^\| ([a-z ]+) \| [^|]* \((LH[^)]*)\) \|", README, re.M))
    rows["verify"], rows["inspect"] = re.findall(r"\(`verify`\)(.*?);.*?`audit`\)(.*?)\n\n", README, re.S)[0]
    listed = {check.replace(" ", "_"): spans(codes) for check, codes in rows.items()}
    assert set(listed) == set(get_args(Check))
    for check, codes in listed.items():
        assert codes == {code for code, about in CODES.items() if check in about.checks}, check
