"""Known failures excuse exactly what they name, and turn the run red when it no longer fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness import KnownFailure, check_loader, read_known_failures
from harness.checks.cell import cells_of
from harness.checks.examine import check_cell
from harness.checks.known import applies, shipped_known_failures, unmatched
from harness.checks.plan import Plan
from harness.checks.run import Limits
from harness.errors import UserError
from harness.loaders.registry import resolve
from harness.verdict.verdict import Verdict

SPEC = "tests.checks.sample_loaders:"
QUICK = {"formats": ["kohya"], "benches": ["qwen-image"], "max_examples": 25, "limits": Limits(seconds=5, workers=1)}


def known(name: str, code: str, **more: object) -> KnownFailure:
    return KnownFailure("it", SPEC + name, code, "for a reason", "https://example.org/1", **more)  # type: ignore[arg-type]


def outcomes(name: str, *failures: KnownFailure) -> set[str]:
    return {v.outcome for v in check_loader(SPEC + name, known_failures=failures, **QUICK)}  # type: ignore[arg-type]


def test_a_known_failure_is_excused() -> None:
    assert outcomes("raw_alpha", known("raw_alpha", "LH201")) == {"passed", "xfailed"}


def test_another_fault_is_not_excused() -> None:
    assert "failed" in outcomes("raw_alpha", known("raw_alpha", "LH202"))


def test_a_known_failure_that_no_longer_fails_is_red() -> None:
    assert "xpassed" in outcomes("right", known("right", "LH201"))


def test_a_fault_with_a_trait_is_tried_on_its_own_and_hides_nothing() -> None:
    assert outcomes("only_rank_one", known("only_rank_one", "LH209", trait="rank = 1")) == {"passed", "xfailed"}
    assert "xpassed" in outcomes("right", known("right", "LH209", trait="rank = 1"))


def test_a_line_that_matches_no_cell_is_an_error() -> None:
    assert "errored" in outcomes("right", known("right", "LH201", benches=("gpt2",)))


def of_a_release(name: str, *failures: KnownFailure) -> list[tuple[str, str | None]]:
    """Return outcome and code of every verdict on a release of the loader `acme`, whose known failures these are."""
    subject = replace(resolve(SPEC + name), spec="acme==2.0", version="2.0", known_as="acme")
    plan = Plan(25, known=tuple(replace(line, loader="acme") for line in failures), shrink=False)
    cell, *_ = cells_of(subject, ["kohya"], ["qwen-image"])[0]
    return [(v.outcome, v.code) for v in check_cell(cell, plan) if v.outcome != "passed"]


def test_what_is_known_of_a_loader_excuses_its_releases() -> None:
    assert of_a_release("raw_alpha", known("raw_alpha", "LH201")) == [("xfailed", "LH201")]
    assert of_a_release("raw_alpha", known("raw_alpha", "LH201", versions="<2")) == [("failed", "LH201")]
    line = known("only_rank_one", "LH209", trait="rank = 1")
    assert of_a_release("only_rank_one", line) == [("xfailed", "LH209")]


def test_a_line_binds_the_releases_that_it_names_and_no_other() -> None:
    for trait in (None, "rank = 1"):
        assert of_a_release("right", known("right", "LH901", trait=trait)) == []
        assert of_a_release("right", known("right", "LH901", trait=trait, versions=">=2")) == [("xpassed", "LH901")]


def test_what_a_release_does_instead_of_what_is_known_is_told() -> None:
    line = known("only_rank_one", "LH901", trait="rank = 1")
    assert of_a_release("only_rank_one", line) == [("failed", "LH209")]


def test_the_version_of_a_commit_is_not_compared() -> None:
    (cell, *_), _ = cells_of(resolve(SPEC + "right"), ["kohya"], ["qwen-image"])
    line = known("right", "LH201", versions=">=2")
    versions = {"2.1": True, "1.9": False, "2.1+0a1b2c3d4e5f": True, "0a1b2c3d4e5f": True}
    assert {v: applies(line, replace(cell, subject=replace(cell.subject, version=v))) for v in versions} == versions


def test_the_shipped_lines_have_a_reason_a_link_and_their_finding_page() -> None:
    root = Path(__file__).parents[2]
    for line in shipped_known_failures():
        assert line.reason
        assert line.link.startswith("https://") or (root / line.link).is_file()


@pytest.mark.parametrize(("bench", "stale"), [("motion-unet", False), ("phi3", True)])
def test_a_line_of_a_bench_that_is_checked_when_asked_for_is_not_stale(bench: str, stale: bool) -> None:
    cells, _ = cells_of(resolve("diffusers"), ["diffusers"], ["flux"])
    line = known("diffusers", "LH902", benches=(bench,))
    assert bool(unmatched([replace(line, loader="diffusers")], cells)) == stale


LINE = "[[failure]]\nid='x'\nloader='l'\ncode='LH201'\nreason='r'\nlink='l'\n"
BAD = {
    LINE.replace("link='l'\n", ""): r"failure 1 \(x\): link: Field required",
    LINE.replace("'LH201'", "'LH999'"): "code: 'LH999' is no code",
    LINE.replace("reason='r'", "reason=' '"): "reason: String should have at least 1 character",
    LINE.replace("link='l'", "link=''"): "link: String should have at least 1 character",
    LINE.replace("loader='l'", "loader=3"): "loader: Input should be a valid string",
    LINE + "trait='nope'": "trait: 'nope' is none of",
    LINE + "formats='kohya'": "formats: Input should be a valid tuple",
    LINE + "formats=['spam']": "formats: 'spam' is none of",
    LINE + "benches=['gone']": "benches: 'gone' is none of",
    LINE + "variants=['x']": "variants: 'x' is none of",
    LINE + "versions='~>1'": "versions: '~>1' is no version specifier",
    LINE + "seconds=-1": "seconds: Input should be greater than 0",
    LINE + "seconds=nan": "seconds: Input should be a finite number",
    LINE + "kinds=['x']": "kinds: 'x' is none of a module the model lacks",
    LINE + "xx=1": "xx: Unexpected keyword argument",
    LINE + LINE: "id='x' stands 2 times",
    LINE.replace("[[failure]]", "[[failures]]"): "failures: known failures are",
    "failure = 3": "failure: known failures are",
    "failure = [3]": r"failure 1 \(without id\): the table: ",
    "[[fail": "no TOML file of known failures",
    "\ud800": "no TOML file of known failures",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_line_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "known.toml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=BAD[text]) as caught:
        read_known_failures(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_short_check_may_see_a_law_where_a_long_one_sees_none() -> None:
    (known,) = [k for k in shipped_known_failures() if k.id == "diffsynth-flux-header-alpha"]
    assert known.code == "LH209"
    assert known.names(verdict("LH202"), short=True)
    assert not known.names(verdict("LH202"), short=False)
    assert known.names(verdict("LH209"), short=False)
    assert not any(known.names(verdict(code), short=True) for code in ("LH102", "LH301", None))


def verdict(code: str | None, check: str = "scale", **data: object) -> Verdict:
    return Verdict(loader="l", check=check, outcome="failed", code=code, data=data)


def test_a_line_excuses_exactly_the_kinds_that_it_names() -> None:
    line = known("right", "LH103", kinds=("half of a pair", "dora"))
    assert line.names(verdict("LH103", "silence", silent=["dora"]), short=False)
    assert not line.names(verdict("LH103", "silence", silent=["dora", "loha"]), short=False)
    assert not line.names(verdict("LH203", "silence", silent=["dora"]), short=True)
    assert not known("right", "LH103").names(verdict("LH103", "silence", silent=["dora"]), short=False)
    assert line.spoken({"half of a pair": "said", "dora": "silent"}) == ("half of a pair",)
    assert line.spoken({"half of a pair": "silent"}) == ()
