"""What a row of the table of reads makes of a file, on a table small enough to be read here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.law import reads
from harness.law.reads import Reading, in_part, pattern_of, places_of, reading

TO_Q, TO_K, FF, PROJ = "blocks_#_attn_to_q", "blocks_#_attn_to_k", "blocks_#_ff", "proj_out"
MODEL = {TO_Q: 4, TO_K: 4, FF: 4, PROJ: 1}
BLOCKS = {TO_Q: 4, TO_K: 4, FF: 4}
ATTENTION = {TO_Q: 4, TO_K: 4}
NEVER_SET = "puts factors into the layers and never sets them: what they add is an error, or whatever memory holds"
Ask = Callable[..., Any]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """Ask what a tool whose row has these outcomes makes of a file."""
    caches = (reads._table, reads._rows, reads._layers)

    def asked(uniform: Any, counts: Mapping[str, int] = MODEL, *, mixed: Any = None, several: bool = False) -> Any:
        row = {"tool": "t", "release": "1.2", "family": "f", "names": "own", "scheme": "s", "uniform": uniform}
        row |= {"mixed": mixed} if mixed else {}
        layers = {"f": {"own": list(MODEL)}, "g": {"own": [PROJ], "original": ["out"]}}
        about = {"measured": "2026-11-01", "titles": {"f": "Family"}}
        path = tmp_path / "reads.json"
        path.write_text(json.dumps({"rows": [row], "layers": layers, **about}), encoding="utf-8")
        monkeypatch.setattr(reads, "TABLE", path)
        for cached in caches:
            cached.cache_clear()
        return reading("t", ("f", "own"), "s", counts, mixed=several)

    yield asked
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("outcome", "effect", "what"),
    [
        ("ok", "law", ""),
        ("nothing", "nothing", "loads none of its modules, without an error"),
        ("alpha ignored", "factor", "ignores alpha: every module is applied at scale 1"),
        ({"raises": "KeyError"}, "raises", "raises, on a small model: KeyError"),
        ({"hangs": "after 20 s"}, "hangs", "hangs, on a small model: after 20 s"),
        ({}, "law", ""),
        ({"dropped": [PROJ]}, "drops", "drops 1 of 13 modules, such as proj_out"),
        ({"dropped": ["elsewhere", TO_Q, PROJ]}, "drops", f"drops 5 of 13 modules, such as {TO_Q}"),
        ({"dropped": ["elsewhere"]}, "law", ""),
        ({"dropped": list(MODEL)}, "nothing", f"drops 13 of 13 modules, such as {TO_Q}"),
        ({"other": ["elsewhere", FF, PROJ]}, "wrong", f"puts something else than B @ A into {FF}"),
        ({"other": ["elsewhere"]}, "law", ""),
        ({"factor": {TO_Q: [2.0], "elsewhere": [9.0]}}, "factor", "applies modules 2 times as strong as trained"),
        (
            {"factor": {TO_Q: [2.0, 0.5], FF: [3.0]}},
            "factor",
            "applies modules 0.5 to 3 times as strong as trained",
        ),
        ({"factor": {"elsewhere": [9.0]}}, "law", ""),
        ("weights never set", "wrong", NEVER_SET),
        ({"unset": ["elsewhere", FF]}, "wrong", NEVER_SET),
        ({"unset": ["elsewhere"]}, "law", ""),
    ],
)
def test_an_outcome_is_told_of_the_modules_that_the_file_has(ask: Ask, outcome: Any, effect: str, what: str) -> None:
    found = ask(outcome)
    assert found == Reading(effect, what, alpha_ignored=outcome == "alpha ignored")  # type: ignore[arg-type]


def test_what_nobody_measured_has_no_reading(ask: Ask) -> None:
    assert ask("ok") == Reading("law")
    for tool, place, scheme in (("u", ("f", "own"), "s"), ("t", ("g", "own"), "s"), ("t", ("f", "own"), "z")):
        assert reading(tool, place, scheme, MODEL, mixed=False) is None


def test_files_of_several_ranks_have_an_outcome_of_their_own_where_it_differs(ask: Ask) -> None:
    assert ask("ok", several=True) == Reading("law")
    assert ask("ok", mixed={"dropped": [PROJ]}, several=False) == Reading("law")
    assert ask("ok", mixed={"dropped": [PROJ]}, several=True).effect == "drops"


PARTS = {"all": "ok", "blocks": {"dropped": [FF]}, "attention": {"raises": "A"}, "half": {"raises": "B"}}


@pytest.mark.parametrize(
    ("counts", "effect"),
    [
        (MODEL, "law"),
        (BLOCKS, "drops"),
        (ATTENTION, "raises"),
        ({TO_Q: 4}, "unknown"),
        ({PROJ: 1}, "unknown"),
        ({**MODEL, TO_K: 3}, "unknown"),
        ({**BLOCKS, TO_K: 3}, "unknown"),
    ],
)
def test_a_file_is_read_as_the_part_of_the_model_that_it_has_in_full(
    ask: Ask, counts: Mapping[str, int], effect: str
) -> None:
    found = ask(PARTS, counts)
    assert found is not None
    assert found.effect == effect
    if effect == "unknown":
        assert found.what.startswith("depends on which modules of the model a file has (all: as trained; blocks: ")


@pytest.mark.parametrize(
    ("counts", "agree"),
    [
        ({TO_Q: 4}, ("blocks", "attention", "half")),  # inside of the blocks: the whole model says nothing of it
        ({TO_Q: 4, TO_K: 3}, ("blocks", "attention", "half")),
        ({PROJ: 1}, ("all", "half")),
        ({**MODEL, TO_K: 3}, ("all", "half")),
    ],
)
def test_another_choice_of_layers_is_known_where_all_parts_that_tell_of_it_agree(
    ask: Ask, counts: Mapping[str, int], agree: tuple[str, ...]
) -> None:
    others = {part: "nothing" for part in ("all", "blocks", "attention", "half") if part not in agree}
    assert ask({"all": "ok", **others, **dict.fromkeys(agree, "ok")}, counts) == Reading("law")
    for part in agree:
        found = ask({"all": "ok", **others, **dict.fromkeys(agree, "ok"), part: "nothing"}, counts)
        assert found is not None
        assert found.effect == "unknown"


def test_parts_that_were_not_measured_are_not_heard(ask: Ask) -> None:
    assert ask({"all": "ok"}, BLOCKS) == Reading(
        "unknown", "depends on which modules of the model a file has (all: as trained)"
    )
    assert ask({"all": "nothing", "half": "ok"}, {TO_Q: 4}) == Reading("law")


def test_what_a_tool_does_with_other_modules_is_told_in_three_hundred_characters(ask: Ask) -> None:
    found = ask({"all": {"raises": "x" * 500}}, BLOCKS)
    assert found is not None
    assert len(found.what) == len("depends on which modules of the model a file has ()") + 300


@pytest.mark.parametrize(
    ("part", "layer", "inside"),
    [
        ("all", PROJ, True),
        ("all", TO_Q, True),
        ("blocks", TO_Q, True),
        ("blocks", FF, True),
        ("blocks", PROJ, False),
        ("attention", TO_Q, True),
        ("attention", FF, False),
        ("attention", "proj_att", False),
        ("half", FF, False),
        ("half", TO_Q, True),
    ],
)
def test_a_layer_is_in_the_parts_that_people_train(part: str, layer: str, inside: bool) -> None:
    assert in_part(part, layer) is inside


def test_a_pattern_is_a_name_without_dots_and_numbers() -> None:
    assert pattern_of("blocks.12.attn.to_out.0") == "blocks_#_attn_to_out_#"
    assert pattern_of("blocks_12_attn_to_out_0") == "blocks_#_attn_to_out_#"
    assert pattern_of("0.conv1x1") == "#_conv1x1"


def test_the_table_says_when_and_what_was_measured(ask: Ask) -> None:
    ask("ok")
    assert (reads.measured_on(), reads.release_of("t"), reads.release_of("u")) == ("2026-11-01", "1.2", None)
    assert (reads.title_of("f"), reads.title_of("g")) == ("Family", "g")
    assert (reads.has_other_names("f"), reads.has_other_names("g"), reads.has_other_names("h")) == (False, True, False)
    assert (reads.layers_of(("g", "original")), reads.layers_of(("h", "own"))) == ({"out"}, frozenset())
    assert reads.places_of([PROJ]) == (("f", "own"), ("g", "own"))
    assert reads.places_of(["out"]) == (("g", "original"),)
    assert reads.places_of(MODEL) == (("f", "own"),)
    assert (reads.places_of([]), reads.places_of([PROJ, "other"])) == ((), ())


def test_a_reading_cannot_be_changed_in_place() -> None:
    assert Reading("law") == Reading("law", "", None, False)
    with pytest.raises(AttributeError):
        Reading("law").effect = "nothing"  # type: ignore[misc]


def test_layers_that_are_dropped_whatever_is_beside_them_are_known_in_any_file(ask: Ask) -> None:
    parts = {"all": {"dropped": [PROJ]}, "blocks": "ok", "attention": "ok", "half": "ok"}
    assert ask(parts, {TO_Q: 4, PROJ: 1}).what == "drops 1 of 5 modules, such as proj_out"
    assert ask(parts, {TO_Q: 3}).effect == "law"
    parts = {"all": {"dropped": [PROJ, FF]}, "blocks": {"dropped": [FF]}, "attention": "ok", "half": {"dropped": [FF]}}
    assert ask(parts, {TO_Q: 4, FF: 3, PROJ: 1}).what == "drops 4 of 8 modules, such as proj_out"


def test_layers_that_are_dropped_for_what_is_beside_them_are_not(ask: Ask) -> None:
    parts = {"all": {"dropped": [FF]}, "blocks": "ok", "attention": "ok", "half": "ok"}
    assert ask(parts, {TO_Q: 4, FF: 3, PROJ: 1}).effect == "unknown"


def test_wan_is_known_by_its_layers_outside_the_blocks_too() -> None:
    patterns = ["blocks_#_self_attn_q", "text_embedding_#", "time_projection_#", "head_head"]
    assert ("wan21-t2v", "original") in places_of(patterns)
