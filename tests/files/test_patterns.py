"""rank_pattern and alpha_pattern mean what PEFT makes of them."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import time
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harness.doctor import inspect_file
from harness.files import LoraWeights, write_lora
from harness.files.config import AdapterConfig, Budget, ConfigError, PatternError, Patterns, anchored, build

NAMES = st.lists(st.sampled_from(["to_q", "add_to_q", "0", "10", "a", "aXb"]), min_size=1, max_size=4).map(".".join)
PATTERNS = st.one_of(
    NAMES,
    NAMES.map(anchored),
    NAMES.map(lambda name: f"^{name}$"),
    NAMES.map(lambda name: name.replace("o", ".")),
    st.sampled_from([r".*to_q", r"\d+\.to_q", "to_(q|k)", "a.b", "0|10", r"a\.[a-z]+"]),
)


@settings(max_examples=300)
@given(patterns=st.lists(PATTERNS, max_size=5, unique=True), name=NAMES)
@example(patterns=["a.b"], name="aXb")
@example(patterns=["to_q"], name="add_to_q")
@example(patterns=[".*", "to_q"], name="to_q")
def test_the_first_pattern_that_peft_would_match_decides(patterns: list[str], name: str) -> None:
    expected = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None)
    assert Patterns({pattern: pattern for pattern in patterns}).get(name, None) == expected


def test_a_catastrophic_pattern_is_given_up_within_one_budget_for_all_modules() -> None:
    start = time.perf_counter()
    patterns = Patterns({"(a|aa)+[^a]": 1})
    for _ in range(50):
        with pytest.raises(PatternError, match="too long to match"):
            patterns.get("a" * 60, 0)
    assert time.perf_counter() - start < 3


def test_collecting_the_garbage_of_a_large_process_is_not_put_down_to_the_patterns() -> None:
    collected: list[str] = []

    def collect(phase: str, info: object) -> None:
        collected.append(phase)

    before = gc.get_threshold()
    gc.callbacks.append(collect)
    gc.set_threshold(1)
    try:
        with Budget().spent():
            collected.clear()
            kept = [[number] for number in range(1000)]
            during = list(collected)
        kept += [[number] for number in range(1000)]
    finally:
        gc.callbacks.remove(collect)
        gc.set_threshold(*before)
    assert during == []
    assert collected


@pytest.mark.parametrize("pattern", ["(a+)+[^a]", "(.*a){20}[^a]", "(a{1,1000}){1,1000}[^a]"])
def test_no_hostile_pattern_hangs(pattern: str) -> None:
    start = time.perf_counter()
    with contextlib.suppress(PatternError):
        assert Patterns({pattern: 1}).get("a" * 60, 0) == 0
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(?P<x", "x" * 600 + "+"])
def test_a_pattern_that_is_no_usable_expression_is_named(pattern: str) -> None:
    with pytest.raises(PatternError) as raised:
        Patterns({pattern: 1}).get("a", 0)
    assert raised.value.pattern == pattern


BOMBS = {
    "((x{1000}){1000}){1000}": "repeats itself to [0-9,]+ pieces",
    "(((x{99}){99}){99}){99}y": "repeats itself to",
    "|".join(f"m{number}" for number in range(5000)): "is a regular expression of [0-9,]+ characters",
    "(" * 200 + "a" + ")" * 200 + "(x{500}){500}": "is not a valid|repeats itself",
    "(?R)?x{1000}": "is not a valid regular expression",
    "(?:" * 60 + "a" + ")*" * 60: "repeats itself to",
}


@pytest.mark.parametrize("pattern", BOMBS, ids=lambda pattern: pattern[:20])
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_is_measured_before_it_is_compiled(pattern: str, key: str) -> None:
    start = time.perf_counter()
    with pytest.raises(PatternError, match=BOMBS[pattern]) as raised:
        AdapterConfig.parse({key: {pattern: 4}}).of("blocks.0.to_q")
    assert raised.value.key.startswith(f"{key}: pattern ")
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_a_pattern_that_nothing_here_uses_is_a_hazard(key: str, tmp_path: Path) -> None:
    weights = {"blocks.0.to_q": LoraWeights(torch.ones(2, 4), torch.ones(4, 2), 4.0)}
    folder = write_lora(tmp_path / "adapter", "peft", weights)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {key: "((x{1000}){1000}){1000}"}))
    (hazard,) = inspect_file(folder).hazards
    assert (hazard.code, key in hazard.what) == ("LH727", True)


NEVER_COMPILED = (
    "((x{1000}){1000}){1000}",
    "(ab){4000000000}",
    "((x{100}){100}){100}|to_q",
    "(?<=(a{999}){999})b",
    "(?:[a-z]{300,}){300,}",
    "(?R)(?R)(?R)",
    "(x(?1)?){90}",
    "(?i:" + "[\\x00-\\U0010ffff]" * 20 + "){999}",
    "(" * 240 + ")" * 240,
    "|".join("abcdefgh") * 40 + "*",
)


@pytest.mark.parametrize("pattern", NEVER_COMPILED, ids=range(len(NEVER_COMPILED)))
def test_a_bomb_is_refused_before_it_is_compiled(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import regex

    monkeypatch.setattr(regex, "compile", lambda *_, **__: pytest.fail("it was compiled"))
    with pytest.raises(PatternError) as raised:
        Patterns({pattern: 1}, "rank_pattern").get("a", 0)
    assert raised.value.key.startswith("rank_pattern: pattern ")
    assert raised.value.pattern == pattern


@pytest.mark.parametrize("pattern", [r"to_(q|k)", r"blocks\.\d{1,3}\.attn", r"(\d{2}){2}", "[a-z]{2,}", "(?:a|b){9}c?"])
def test_a_pattern_that_somebody_would_write_is_none(pattern: str) -> None:
    assert Patterns({pattern: 1}).get("nothing like it!", 0) == 0


def test_patterns_without_end_are_refused_by_their_number() -> None:
    with pytest.raises(ConfigError, match="characters of patterns"):
        Patterns({f"{place:0>100}": 1 for place in range(20_000)}, "alpha_pattern")


def test_a_loaded_machine_takes_no_time_from_a_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**9, 100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    patterns = Patterns({"to_(q|k)": 7})
    assert [patterns.get("x.to_q", 0) for _ in range(50)] == [7] * 50


def test_patterns_of_every_length_and_place_cost_little() -> None:
    patterns = Patterns({"".join("." if place >> bit & 1 else "x" for bit in range(15)): 1 for place in range(1 << 15)})
    start = time.thread_time()
    with contextlib.suppress(ConfigError):
        for place in range(10_000):
            patterns.get(f"{place:y>15}", 0)
    assert time.thread_time() - start < 2


def test_many_plain_patterns_cost_little() -> None:
    names = [f"transformer_blocks.{i}.attn.{part}" for i in range(60) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    patterns = Patterns({anchored(name): place for place, name in enumerate(names)})
    start = time.perf_counter()
    assert [patterns.get(name, None) for name in names] == list(range(len(names)))
    assert time.perf_counter() - start < 2


@given(st.dictionaries(NAMES, st.tuples(st.integers(1, 64), st.floats(-100, 100)), min_size=1))
def test_a_built_configuration_gives_each_module_its_own_rank_and_alpha(modules: dict[str, tuple[int, float]]) -> None:
    ranks = {name: rank for name, (rank, _) in modules.items()}
    alphas = {name: alpha for name, (_, alpha) in modules.items()}
    config = AdapterConfig.parse(build(ranks, alphas, rslora=False))
    assert {name: config.of(name) for name in modules} == modules


def test_peft_defaults_apply_when_the_configuration_is_silent() -> None:
    assert AdapterConfig.parse({}).of("x") == (8, 8.0)
    assert AdapterConfig.parse({"peft_type": "LOKR", "alpha": 3}).of("x") == (8, 3.0)


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        ({"r": True}, "r"),
        ({"r": 2.5}, "r"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"x": "4"}}, "rank_pattern"),
        ({"alpha_pattern": {"x": None}}, "alpha_pattern"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(raw: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as raised:
        AdapterConfig.parse(raw).of("x")
    assert raised.value.key == key
