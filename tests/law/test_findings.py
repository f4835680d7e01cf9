"""When a file meets a finding: the words of its predicate, one by one, and the releases it is known in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from harness.law import findings as module
from harness.law.findings import Finding, finding_of, findings, is_within, met


def of(*files: Mapping[str, Sequence[str]], **fields: object) -> Finding:
    return finding_of({"effect": "drops", "says": "drops it", "file": list(files), **fields})


@pytest.mark.parametrize(
    ("globs", "values", "hit"),
    [
        (["lora"], ["lora"], True),
        (["lora"], ["dora"], False),
        (["lora"], [], False),
        (["lo*", "x"], ["dora", "loha"], True),
        (["x", "lo*"], ["dora", "loha"], True),
        (["!dora"], [], True),
        (["!dora"], ["lora"], True),
        (["!dora"], ["lora", "dora"], False),
        (["!x", "!dora"], ["dora"], False),
        (["=lora"], ["lora"], True),
        (["=lora"], ["lora", "dora"], False),
        (["=lora"], [], False),
        (["=lora", "=dora"], ["lora", "dora"], True),
        (["lora", "!dora"], ["lora"], True),
        (["lora", "!dora"], ["loha"], False),
        (["=l*", "lora"], ["loha"], False),
        (["=l*", "lora"], ["loha", "lora"], True),
        ([], ["lora"], True),
    ],
)
def test_a_word_is_met_by_some_value_by_all_or_by_none(globs: list[str], values: list[str], hit: bool) -> None:
    assert of({"variant": globs}).hits({"variant": frozenset(values)}) is hit


def test_every_trait_of_one_description_must_fit_and_any_description_will_do() -> None:
    both = {"variant": ["lora"], "alpha": ["tensor"]}
    words = {"variant": frozenset(["lora"]), "alpha": frozenset(["config"])}
    assert not of(both).hits(words)
    assert of(both, {"alpha": ["config"]}).hits(words)
    assert not of().hits(words)
    assert not of({"missing": ["x"]}).hits(words)


def test_a_trait_can_be_asked_for_twice() -> None:
    twice = of({"layer": ["to_q"], "layer.2": ["to_k"]})
    assert twice.hits({"layer": frozenset(["to_q", "to_k"])})
    assert not twice.hits({"layer": frozenset(["to_q"])})


def test_a_description_alone_stands_without_a_list() -> None:
    alone = finding_of({"effect": "drops", "says": "", "file": {"variant": ["lora"]}, "tools": ["a"], "codes": ["c"]})
    assert (alone.file, alone.tools, alone.codes) == (({"variant": ("lora",)},), ("a",), ("c",))
    assert finding_of({"effect": "drops", "says": ""}).file == ()


@pytest.mark.parametrize(
    ("effect", "blocks"),
    [("drops", True), ("factor", True), ("hangs", True), ("rounds", False), ("note", False), ("call", False)],
)
def test_what_changes_the_effect_of_a_file_leaves_no_naive_strength(effect: str, blocks: bool) -> None:
    assert Finding(effect, "").blocks is blocks


def test_a_finding_is_known_in_its_own_release_and_in_the_range_it_names() -> None:
    found = of(measured="1.2", versions=">=1.4,<2", page="some-page")
    assert [found.in_release(v) for v in (None, "1.2", "1.3", "1.4", "2.0", "main")] == [
        True, True, False, True, False, False,
    ]  # fmt: skip
    assert not of(measured="1.2").in_release("1.3")
    assert found.link == "/".join(("docs", "findings", "some-page.md"))
    assert (is_within(None, ">=1"), is_within("2.0rc1", ">=1"), is_within("1", ">1")) == (False, True, False)


def test_the_findings_of_a_file_are_those_of_the_tool_and_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    here = of({"variant": ["lora"]}, tools=["a"], measured="1", page="p")
    there = of({"variant": ["lora"]}, tools=["b"], measured="2", page="q")
    monkeypatch.setattr(module, "findings", lambda: {"p": here, "q": there})
    words = {"variant": frozenset(["lora"])}
    assert met(words) == [here, there]
    assert (met(words, tool="a"), met(words, tool="c"), met(words, tool="a", version="2")) == ([here], [], [])
    assert met(words, version="2") == [there]
    assert met({"variant": frozenset(["dora"])}) == []


def test_the_table_is_read_once_and_a_finding_cannot_be_changed_in_place() -> None:
    assert findings() is findings()
    with pytest.raises(AttributeError):
        of().page = "x"  # type: ignore[misc]
