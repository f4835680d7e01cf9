"""The findings as data: every page has a row, every row that is about files hits its file and no other one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from harness.law.findings import Finding, findings, is_within, met
from harness.law.known import tools
from harness.law.reads import layers_of, measured_on, places_of, reading, title_of
from harness.verdict.codes import CODES

FOLDER = Path(__file__).parents[2] / "docs" / "findings"
PAGES = sorted(path.stem for path in FOLDER.glob("*.md") if path.name != "README.md")
EFFECTS = {"factor", "alpha ignored", "drops", "nothing", "raises", "hangs", "wrong", "rounds", "note", "call"}


def words(**traits: str | Sequence[str]) -> Mapping[str, frozenset[str]]:
    return {name: frozenset([value] if isinstance(value, str) else value) for name, value in traits.items()}


def test_every_page_has_a_row_and_every_row_a_page() -> None:
    assert sorted(findings()) == PAGES


@pytest.mark.parametrize("finding", findings().values(), ids=findings())
def test_a_row_says_what_its_page_says(finding: Finding) -> None:
    text = (FOLDER / f"{finding.page}.md").read_text(encoding="utf-8")
    pin = re.search(r"^\*\*Version\*\* `([\w-]+)==([\w.]+)`", text, re.MULTILINE)
    codes = re.search(r"^\*\*Codes\*\* (.+)$", text, re.MULTILINE)
    assert pin
    assert codes
    assert (finding.package, finding.measured) == pin.groups()
    assert set(finding.codes) == set(re.findall(r"LH\d{3}", codes[1]))
    assert set(finding.codes) <= set(CODES)
    assert finding.effect in EFFECTS
    assert finding.says
    assert bool(finding.file) == (finding.effect != "call")


def test_the_tools_of_a_finding_are_tools_or_libraries_that_nobody_asks_about() -> None:
    named = {tool for finding in findings().values() for tool in finding.tools}
    assert named - set(tools()) <= {"refiners", "loralib", "lightx2v", "adapters", "litgpt"}


@pytest.mark.parametrize(
    ("traits", "page", "hit"),
    [
        (
            words(alpha=["several", "several:unet"], scheme="lora_unet.down.tensor", layer="down_blocks_#_x"),
            "diffusers-unet-mixed-alphas-ignored",
            True,
        ),
        (
            words(alpha=["several", "several:te"], scheme="lora_unet.down.tensor", layer="down_blocks_#_x"),
            "diffusers-unet-mixed-alphas-ignored",
            False,
        ),
        (
            words(alpha=["tensor"], scheme="lora_unet.down.tensor", layer="down_blocks_#_x"),
            "diffusers-unet-mixed-alphas-ignored",
            False,
        ),
        (
            words(alpha=["several"], scheme="lora_unet.down.tensor", layer="blocks_#_x"),
            "diffusers-unet-mixed-alphas-ignored",
            False,
        ),
        (
            words(alpha="negative", scheme="lora_unet.down.tensor", layer="blocks_#_x"),
            "diffusers-negative-alpha-hang",
            True,
        ),
        (
            words(alpha="negative", scheme="lora_unet.down.tensor", layer="down_blocks_#_x"),
            "diffusers-negative-alpha-hang",
            False,
        ),
        (
            words(scheme="transformer.A.tensor", family=["qwen-image", "qwen-image-21"]),
            "diffusers-qwen-transformer-prefix-doubled",
            True,
        ),
        (
            words(scheme="transformer.A.tensor", family=["qwen-image", "sd3"]),
            "diffusers-qwen-transformer-prefix-doubled",
            False,
        ),
        (words(scheme="transformer.A.tensor", family=[]), "diffusers-qwen-transformer-prefix-doubled", False),
        (
            words(scheme="lora_te.down.tensor", text_encoder=["encoder_layers_#_self_attn_q_proj"]),
            "diffusers-text-encoder-without-out-proj",
            True,
        ),
        (
            words(
                scheme="lora_te.down.tensor",
                text_encoder=["encoder_layers_#_self_attn_q_proj", "encoder_layers_#_self_attn_out_proj"],
            ),
            "diffusers-text-encoder-without-out-proj",
            False,
        ),
        (words(scheme="base_model.A.none"), "diffsynth-dora-and-unknown-keys-silent", True),
        (words(variant="dora", format="diffsynth"), "diffsynth-dora-and-unknown-keys-silent", True),
        (
            words(alpha=["tensor", "inexact"], family="qwen-image", dtype="BF16"),
            "diffusers-qwen-half-precision-alpha",
            True,
        ),
        (words(alpha="tensor", family="qwen-image", dtype="BF16"), "diffusers-qwen-half-precision-alpha", False),
        (
            words(alpha=["tensor", "inexact"], family="qwen-image", dtype="F32"),
            "diffusers-qwen-half-precision-alpha",
            False,
        ),
        (words(variant="dora", format="peft"), "transformers-load-adapter-drops-dora-magnitude", True),
        (words(), "diffusers-fuse-scale-compounds", False),
        (
            words(
                family="flux",
                scheme="transformer.A.tensor",
                alpha=["several", "tensor"],
                layer=["proj_out", "single_transformer_blocks_#_proj_out"],
            ),
            "diffusers-flux-alpha-of-proj-out-goes-to-the-blocks",
            True,
        ),
        (
            words(family="flux", scheme="transformer.A.tensor", alpha=["several"], layer="proj_out"),
            "diffusers-flux-alpha-of-proj-out-goes-to-the-blocks",
            False,
        ),
        (
            words(
                family="wan21-t2v",
                scheme="lora_unet.down.tensor",
                layer=["blocks_#_self_attn_q", "blocks_#_cross_attn_q"],
            ),
            "diffusers-wan-musubi-subset-raises",
            True,
        ),
        (
            words(
                family="wan21-t2v",
                scheme="lora_unet.down.tensor",
                layer=["blocks_#_self_attn_q", "blocks_#_cross_attn_q", "blocks_#_ffn_#"],
            ),
            "diffusers-wan-musubi-subset-raises",
            False,
        ),
        (
            words(family="z-image", scheme="diffusion_model.A.none", layer="layers_#_attention_qkv"),
            "diffusers-zimage-fused-attention-dropped",
            True,
        ),
        (
            words(family="ltx", scheme="diffusion_model.A.none", layer="transformer_blocks_#_attn1_to_q"),
            "diffusers-ltx-outer-modules-dropped",
            False,
        ),
    ],
)
def test_a_predicate_hits_the_files_it_describes(traits: Mapping[str, frozenset[str]], page: str, hit: bool) -> None:
    assert (page in {finding.page for finding in met(traits)}) is hit


def test_a_finding_is_known_in_the_releases_that_it_names() -> None:
    finding = findings()["diffusers-unet-mixed-alphas-ignored"]
    assert finding.in_release(None)
    assert finding.in_release("0.42.1")
    assert finding.in_release("0.35.2")
    assert not finding.in_release("0.20.0")
    assert not findings()["diffusers-negative-alpha-hang"].in_release("0.41.0")
    assert not is_within("master", ">=1")


def test_the_table_of_reads_tells_an_architecture_by_all_of_its_layers() -> None:
    blocks = {"transformer_blocks_#_attn_to_q": 60, "transformer_blocks_#_img_mlp_net_#": 60}
    assert ("qwen-image", "own") in places_of({"transformer_blocks_#_img_mlp_net_#_proj": 60})
    assert not places_of({**blocks, "no_such_layer": 1})
    assert not places_of({})
    assert "transformer_blocks_#_attn_to_q" in layers_of(("flux", "own"))
    assert title_of("flux") == "FLUX.1"
    assert measured_on() >= "2026"


def test_a_reading_is_what_the_rows_say_of_these_layers() -> None:
    qwen = ("qwen-image", "own")
    counts = {"transformer_blocks_#_attn_to_q": 60}
    found = reading("diffusers", qwen, "bare.default.tensor", counts, mixed=True)
    assert found is not None
    assert found.effect == "law"
    nothing = reading("diffusers", qwen, "bare.A.none", counts, mixed=False)
    assert nothing is not None
    assert nothing.effect == "nothing"
    assert reading("no such tool", qwen, "bare.A.none", counts, mixed=False) is None
    dropped = reading("diffusers", ("sd-unet", "own"), "lora_unet.down.tensor", {"down_blocks_#_x": 1}, mixed=True)
    assert dropped is None or dropped.effect in ("law", "factor", "unknown")
