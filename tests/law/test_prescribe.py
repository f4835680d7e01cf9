"""The strength to pass, from a law and the modules of a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from harness.doctor import ScaleLaw, conventions, known_laws, prescribe
from harness.files import FORMATS, LoraModule
from harness.law.grammar import ALPHA, RANK, STRENGTH
from harness.law.known import Tool, distinct, tools, wanted_scale
from harness.law.law import Law

ALPHAS = st.floats(0.1, 500) | st.floats(-500, -0.1)
POWERS = st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0])


def module(rank: int, alpha: float | None, *, rslora: bool = False, tensor: bool = True) -> LoraModule:
    keys = {"alpha": "x.alpha"} if tensor and alpha is not None else {}
    return LoraModule("x", rank, 8, 8, alpha, rslora, "F32", keys)


def law(strength: float = 1.0, alpha: float = 1.0, rank: float = -1.0, constant: float = 1.0) -> ScaleLaw:
    return ScaleLaw.of_powers("some loader", strength, alpha, rank, constant)


@pytest.mark.parametrize(
    ("loader_law", "modules", "strength"),
    [
        (law(), [module(32, 16.0)], 1.0),
        (law(alpha=0, rank=0), [module(32, 16.0)], 0.5),
        (law(alpha=0, rank=0), [module(32, 32.0)], 1.0),
        (law(rank=0), [module(32, 16.0)], 1 / 32),
        (law(rank=-0.5), [module(16, 16.0)], 0.25),
        (law(constant=2.0), [module(32, 16.0), module(8, 1.0)], 0.5),
        (law(alpha=0, rank=0), [module(32, 16.0), module(8, 4.0)], 0.5),
        (law(alpha=0, rank=0), [module(32, 16.0), module(8, 8.0)], None),
        (law(rank=0), [module(32, 16.0), module(8, 8.0)], None),
        (law(strength=2.0, alpha=0, rank=0), [module(32, 8.0)], 0.5),
        (law(strength=2.0, alpha=0, rank=0), [module(32, -8.0)], None),
        (law(strength=3.0, alpha=0, rank=0), [module(8, -1.0)], -0.5),
        (law(strength=0.0), [module(32, 16.0)], 1.0),
        (law(strength=0.0, constant=2.0), [module(32, 16.0)], None),
        (law(alpha=0.5, rank=0), [module(4, -4.0)], 0.5),  # the grammar's root keeps the sign
        (law(alpha=0, rank=0), [module(32, None)], None),
        (law(), [module(32, 16.0), module(32, None)], None),
        (law(), [module(32, 0.0)], None),
        (law(), [module(32, 0.0, tensor=False)], 1.0),
        (law(alpha=0, rank=0), [module(32, 0.0, tensor=False)], 0.0),
        (law(), [], 1.0),
    ],
)
def test_the_strength_is_the_one_that_gives_every_module_its_trained_scale(
    loader_law: ScaleLaw, modules: Sequence[LoraModule], strength: float | None
) -> None:
    assert prescribe(loader_law, modules) == (None if strength is None else pytest.approx(strength, rel=1e-5))


@given(
    powers=st.tuples(st.sampled_from([1.0, 2.0, 3.0, 0.5]), POWERS, POWERS, st.floats(0.1, 10)),
    modules=st.lists(st.tuples(st.integers(1, 128), ALPHAS), min_size=1, max_size=4),
)
def test_a_prescription_reproduces_training_and_none_means_that_no_strength_does(
    powers: tuple[float, float, float, float], modules: list[tuple[int, float]]
) -> None:
    loader_law, adapted = law(*powers), [module(rank, alpha) for rank, alpha in modules]
    assume(all(math.isfinite(loader_law.at_one(each)) for each in adapted))
    strength = prescribe(loader_law, adapted)
    needed = [each.trained_scale / loader_law.at_one(each) for each in adapted]
    if strength is None:
        even = powers[0] == 2.0  # the root keeps the sign
        assert max(needed) - min(needed) > 5e-5 * abs(needed[0]) or (even and min(needed) < 0)
    else:
        factor = math.copysign(abs(strength) ** powers[0], strength if powers[0] != 2.0 else 1.0)
        assert all(math.isclose(factor, each, rel_tol=1e-3) for each in needed)


@given(st.lists(st.tuples(st.integers(1, 128), ALPHAS), min_size=1, max_size=4), st.booleans())
def test_peft_needs_strength_one_for_every_file(modules: list[tuple[int, float]], rslora: bool) -> None:
    adapted = [module(rank, alpha, rslora=rslora) for rank, alpha in modules]
    assert prescribe(known_laws()["peft"], adapted) == 1.0


def test_a_loader_that_knows_no_rslora_needs_more(tmp_path: object) -> None:
    assert prescribe(known_laws()["diffsynth"], [module(16, 4.0, rslora=True)]) == 4.0


def test_the_founding_case() -> None:
    """rank 32, alpha 16 in DiffSynth before 2.0.5: `alpha=0.5` is right; with rank 32, alpha 32 it is `alpha=1`."""
    old = known_laws()["diffsynth-2.0.4"]
    assert (prescribe(old, [module(32, 16.0)]), prescribe(old, [module(32, 32.0)])) == (0.5, 1.0)
    assert old.argument == "alpha"


def test_the_table_of_laws_names_formats_that_exist() -> None:
    assert {name for loader_law in known_laws().values() for name in loader_law.formats} <= set(FORMATS)
    assert all(loader_law.formats for loader_law in known_laws().values())
    assert list(conventions()) == ["alpha / rank", "alpha / sqrt(rank)", "alpha", "1"]


def test_a_law_of_powers_is_that_of_training_until_it_is_told_otherwise() -> None:
    plain = ScaleLaw.of_powers("some loader")
    assert (plain.law.is_trained, plain.rslora, plain.formats, plain.argument) == (True, False, (), "strength")
    assert not ScaleLaw("some loader", plain.law).rslora
    assert plain.at_one(module(4, 8.0)) == 2.0
    with pytest.raises(AttributeError):
        plain.argument = "alpha"  # type: ignore[misc]


@pytest.mark.parametrize("unscaled", [module(4, None), module(0, 8.0)])
def test_a_module_that_alpha_scales_nothing_of_gets_the_constant_and_the_strength(unscaled: LoraModule) -> None:
    one_more = Law(next(word for word in STRENGTH if word.text == "(1 + {x})"), ALPHA[0], RANK[0], constant=2.5)
    assert ScaleLaw("some loader", one_more).at_one(unscaled) == 5.0


@pytest.mark.parametrize(("power", "gain"), [(-1.0, 4.0), (-2.0, 0.5), (0.0, 8.0)])
def test_only_a_loader_that_divides_by_the_rank_has_a_root_to_take(power: float, gain: float) -> None:
    stabilised = module(4, 8.0, rslora=True)
    assert ScaleLaw.of_powers("some loader", rank=power, rslora=True).at_one(stabilised) == gain


def test_the_table_is_read_once() -> None:
    assert known_laws() is known_laws()
    assert conventions() is conventions()


def unscaled(rank: int, alpha: float | None) -> LoraModule:
    return replace(module(rank, alpha), unscaled=True)


@pytest.mark.parametrize(
    ("one", "lora_alpha", "scale"),
    [
        (module(4, 8.0), None, 2.0),
        (module(4, 8.0), 16.0, 2.0),
        (module(4, 8.0, rslora=True), None, 4.0),
        (module(4, None), None, None),
        (module(4, None), 16.0, 4.0),
        (module(0, None), None, 1.0),
        (unscaled(4, None), None, 1.0),
        (unscaled(4, None), 16.0, 4.0),
        (module(4, 0.0), None, None),
        (module(4, 0.0), 16.0, 4.0),
        (module(4, 0.0, tensor=False), None, 0.0),
        (module(4, 0.0, tensor=False), 16.0, 4.0),
        (module(4, math.nan), None, None),
        (module(4, math.inf), None, None),
    ],
)
def test_a_trained_scale_is_wanted_where_it_is_known(
    one: LoraModule, lora_alpha: float | None, scale: float | None
) -> None:
    assert wanted_scale(one, lora_alpha) == scale


def test_modules_of_one_scale_are_looked_at_once() -> None:
    every = [module(4, 8.0), module(4, 8.0), module(4, 8.0, rslora=True), module(4, 8.0, tensor=False), module(5, 8.0)]
    assert distinct(every) == [every[1], *every[2:]]


def tool(**fields: object) -> Tool:
    given = {"title": "", "field": "strength", "known": "measured", "without_alpha": "", "alpha_zero": ""}
    return Tool("x", law=law(), formats=(), **{**given, **fields})  # type: ignore[arg-type]


def test_a_tool_says_how_it_is_known() -> None:
    assert tool(release="1.2").provenance == "measured on 1.2"
    assert tool(known="read", release="2026-06").provenance == "read in the code of 2026-06"


def test_a_tool_says_what_becomes_of_a_variant() -> None:
    limits = (
        {"effect": "raises", "file": {"variant": ["loha"]}, "says": "raises"},
        {"effect": "drops", "file": {}, "says": "drops some"},
        {"effect": "drops", "file": {"variant": ["loha"]}, "says": "drops it"},
    )
    some = tool(variants={"dora": "leaves the magnitude out", "lokr": "ok"}, limits=limits)
    assert [some.without(name) for name in ("dora", "lokr", "loha", "lora")] == [
        "leaves the magnitude out", "", "drops it", "",
    ]  # fmt: skip


def test_tools_are_read_once_and_cannot_be_changed_in_place() -> None:
    assert tools() is tools()
    assert known_laws()["peft"] is tools()["peft"].law
    with pytest.raises(AttributeError):
        tool().name = "y"  # type: ignore[misc]
