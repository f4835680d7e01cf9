"""`inspect --html`: one page with everything that is known of each file, and nothing of it taken for markup."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from fixtures.build_malformed import CASES, build
from harness.commands.inspect import command
from harness.doctor import inspect_file
from harness.errors import UserError
from harness.files import LoraWeights, write_lora
from harness.report.energy_map import energy_maps
from harness.report.lora_page import render_lora_page, write_lora_page
from harness.verdict.blocks import by_block
from harness.verdict.file_record import FileRecord, ModuleEnergy

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J\x1b]0;t\x07{{7*7}}\u202egnp \"' onload=x"


class Page(HTMLParser):
    """The tags, ids, links, attributes and visible words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, name: str) -> list[str]:
        return [value or "" for key, value in self.attributes if key == name]


def pair(size: float, alpha: float | None = 8.0) -> LoraWeights:
    return LoraWeights(torch.randn(4, 16) / 4, size * torch.randn(24, 4) / 2, alpha)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    names = [f"blocks.{i}.{kind}" for i in range(12) for kind in ("attn.to_q", "mlp.up")] + ["proj_out"]
    return write_lora(tmp_path / "lora", "diffsynth", {name: pair(0.01) for name in names})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    weights = {f"blocks.{i}.{kind}.weight": torch.randn(24, 16) for i in range(12) for kind in ("attn.to_q", "mlp.up")}
    save_file(weights, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def page_of(*records: FileRecord) -> Page:
    return Page(render_lora_page(records))


def test_the_page_has_facts_verdict_scales_and_strengths(lora: Path, base: Path) -> None:
    text = page_of(inspect_file(lora, base=base)).text
    for part in (
        "subtle", "||ΔW|| / ||W|| is", "train longer", "format diffsynth", "25 (lora; F32)",
        "alpha 8; from the file's own tensors", "trained scale 2", "alpha / sqrt(rank) 4",
        "diffsynth-2.0.4 alpha = 2", "raw alpha strength = 0.25",
        "no layer in the base for a part", "‖ΔW‖ / ‖W‖",
    ):  # fmt: skip
        assert part in text, part


def test_every_module_is_a_tile_with_its_name_and_a_row_in_a_table(lora: Path) -> None:
    record = inspect_file(lora, energy=True)
    assert record.energies is not None
    html = render_lora_page([record])
    titles = re.findall(r"<title>([^<]*)</title></rect>", html)
    assert {title.partition(":")[0] for title in titles} == set(record.energies)
    for name, energy in record.energies.items():
        assert f"{name}: {energy.norm:.3g}" in titles
        assert f'<th scope="row">{name}</th><td class="num">{energy.norm:.3g}</td>' in html
    for block in by_block(record.energies):
        assert f'<th scope="row">{block.name}</th><td class="num">{block.modules}</td>' in html


def test_a_fuller_colour_is_a_larger_update(lora: Path) -> None:
    record = inspect_file(lora, energy=True)
    assert record.energies is not None
    tiles = {tile.title.partition(":")[0]: tile.opacity for one in energy_maps(record.energies) for tile in one.tiles}
    order = sorted(record.energies, key=lambda name: record.energies[name].norm)
    assert [tiles[name] for name in order] == sorted(tiles[name] or 0.0 for name in order)
    assert tiles[order[-1]] == 1.0


def test_broken_zero_and_baseless_modules_look_different(tmp_path: Path, base: Path) -> None:
    modules = {f"blocks.{i}.attn.to_q": pair(0.01) for i in range(4)} | {"proj_out": pair(0.01)}
    modules["blocks.1.attn.to_q"].b[0, 0] = math.nan
    modules["blocks.2.attn.to_q"].b.zero_()
    html = render_lora_page([inspect_file(write_lora(tmp_path / "x", "diffsynth", modules), base=base)])
    looks = {
        "broken": "blocks.1.attn.to_q: NaN",
        "zero": "blocks.2.attn.to_q: 0, changes",
        "unknown": "proj_out: no such",
    }
    for look, title in looks.items():
        assert f'class="{look}"><title>{title}' in html
    assert "1 with NaN or infinity" in Page(html).text
    assert page_of(inspect_file(tmp_path / "x.safetensors", energy=True)).text.count("broken")


def test_hostile_names_and_metadata_stay_text(tmp_path: Path) -> None:
    stems = "blocks.0.to_q", HOSTILE.replace(".", "_"), f"blocks.1.{HOSTILE.replace('.', '_')}"
    tensors = {f"diffusion_model.{stem}.lora_A.weight": torch.ones(2, 4) for stem in stems}
    tensors |= {f"diffusion_model.{stem}.lora_B.weight": torch.ones(3, 2) for stem in stems}
    path = tmp_path / "\u202e<b>\x1b[31m.safetensors".replace("/", "")
    save_file(
        {**tensors, HOSTILE: torch.ones(1)}, tmp_path / "x.safetensors", {"ss_output_name": HOSTILE, HOSTILE: "v"}
    )
    record = inspect_file((tmp_path / "x.safetensors").rename(path), energy=True)
    html = render_lora_page([record], command=f"lora-harness inspect '{path}'")
    page = Page(html)
    assert page.tags["script"] == 1
    assert (page.tags["img"], page.tags["b"]) == (0, html.count("<b>"))
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert all(char.isprintable() or char in "\n\t" for char in html)
    assert "<script>alert(1)</script>" in page.text
    assert "49" not in page.text.replace("{{7*7}}", "")


def test_the_page_asks_for_nothing_and_runs_only_its_own_script(lora: Path) -> None:
    html = render_lora_page([inspect_file(lora, energy=True)])
    page = Page(html)
    assert page.values("href") == [value for value in page.values("href") if value.startswith(("#", "data:"))]
    assert (page.values("src"), page.values("style")) == ([], [])
    policy = page.values("content")[0]
    for tag in ("script", "style"):
        content = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.S)
        assert len(content) == 1
        digest = base64.b64encode(hashlib.sha256(content[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_it_can_be_read_and_walked_without_eyes_or_mouse(lora: Path, tmp_path: Path) -> None:
    other = write_lora(tmp_path / "other", "kohya", {"x": pair(1.0, None)})
    page = page_of(inspect_file(lora, energy=True), inspect_file(other, energy=True))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.values("href") if link.startswith("#")} <= set(ids)
    assert page.tags["h1"] == 1
    maps = [label for label in page.values("aria-label") if "by module: " in label]
    assert len(maps) == 3
    assert all("tables below have the numbers" in label for label in maps)
    scrolled = [value for value in page.values("class") if value.split()[:1] == ["scroll"]]
    assert page.values("role").count("region") == page.values("tabindex").count("0") == len(scrolled) > 4
    assert set(page.values("scope")) == {"col", "row"}


def test_several_files_are_sections_and_a_bad_one_is_a_sentence(lora: Path, tmp_path: Path) -> None:
    bad = build(next(case for case in CASES if case.name == "truncated_data"), tmp_path)
    wrong = build(next(case for case in CASES if case.name == "alpha_negative"), tmp_path)
    page = page_of(*(inspect_file(path, energy=True) for path in (lora, bad, wrong)))
    assert "3 LoRA files: " in page.text
    assert "1 unreadable" in page.text
    assert "not a valid safetensors file" in page.text
    assert "LH705" in page.text
    assert page.tags["section"] == 4


def test_a_file_without_energies_and_one_with_too_many_modules_have_pages() -> None:
    energy = ModuleEnergy(norm=1.0, spectral=1.0, singular=(1.0,), effective_rank=1.0)
    many = {f"blocks.{i}.q": energy for i in range(3100)}
    assert energy_maps(many) == []
    assert "Every module (the first 3000 of 3100)" in page_of(FileRecord(path="x", format="kohya", energies=many)).text
    assert "Energy by module" not in page_of(FileRecord(path="x", format="kohya")).text


def test_the_command_writes_the_page_and_keeps_its_exit_code(lora: Path, tmp_path: Path) -> None:
    bad = build(next(case for case in CASES if case.name == "zero_bytes"), tmp_path)
    page = tmp_path / "new" / "page.html"
    done = CliRunner().invoke(command, [str(lora), str(bad), "--html", str(page)])
    assert done.exit_code == 2
    assert f"page: {page}" in done.output
    assert "0 bytes" in page.read_text(encoding="utf-8")
    assert list(page.parent.iterdir()) == [page]


def test_no_lora_is_overwritten_by_a_page(lora: Path) -> None:
    before = lora.read_bytes()
    done = CliRunner().invoke(command, [str(lora), "--html", str(lora)])
    assert isinstance(done.exception, UserError)
    assert "ends in .html" in str(done.exception)
    assert lora.read_bytes() == before


def test_a_page_that_cannot_be_written_is_a_user_error(lora: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_lora_page([inspect_file(lora)], tmp_path / "file" / "page.html")


def test_the_terminal_shows_a_table_by_block(lora: Path) -> None:
    record = inspect_file(lora, energy=True)
    assert record.energies is not None
    done = CliRunner().invoke(command, [str(lora), "--energy"])
    rows = [line.split() for line in done.output.splitlines()]
    assert ["block", "modules", "||ΔW||", "largest", "σ", "effective", "rank"] in rows
    for block in by_block(record.energies):
        cells = (block.modules, f"{block.norm:.3g}", f"{block.spectral:.3g}", f"{block.effective_rank:.3g}")
        assert [*block.name.split(), *map(str, cells)] in rows
