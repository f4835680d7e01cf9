from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness.files import match_modules, read_lora
from harness.images import lora_file, run_sweep
from harness.images.factor import Estimate
from harness.images.sampling import Pair, Sampler
from harness.images.sequential import FIRST, agree, counts, deciding, studios_of
from harness.images.studio import LADDER, Studio, _inside, rungs_around
from harness.images.verdict import Judgement, StrengthResult
from harness.loaders.declaration import Declaration
from harness.loaders.protocol import Subject

from .subjects import raw_alpha, subject, times

pytestmark = pytest.mark.images
EVERY = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Count pictures, a share of one where a run ends early."""
    count = SimpleNamespace(pictures=0.0)
    draw, record = Sampler._draw, Sampler._record

    def counted(self: Sampler, pairs):
        count.pictures += len(pairs)
        return draw(self, pairs)

    def recorded(self: Sampler, denoiser, pairs, skip):
        count.pictures -= 0.6 * len(pairs)
        return record(self, denoiser, pairs, skip)

    monkeypatch.setattr(Sampler, "_draw", counted)
    monkeypatch.setattr(Sampler, "_record", recorded)
    monkeypatch.setattr("harness.images.studio._SHARED", {})
    return count


def both(loader: Subject, tiny, lora: Path, drawn: SimpleNamespace, **more):
    """Sweep with all pictures, then in turns; return both and the share of the pictures that the second took."""
    shared = {"pipeline": tiny, "lora": lora, "alphas": EVERY, "progress": False, "workers": 0} | more
    whole = run_sweep(loader, **shared)
    most, drawn.pictures = drawn.pictures, 0.0
    from harness.images import studio

    studio._SHARED.clear()
    return whole, run_sweep(loader, **shared, sequential=True), drawn.pictures / most


@pytest.mark.parametrize("factor", [1.0, pytest.param(0.5, marks=pytest.mark.slow), 2.0])
def test_what_is_clear_takes_a_third_of_the_pictures_and_says_the_same(tiny, r8_a16, drawn, factor: float):
    whole, few, share = both(times(factor), tiny, r8_a16, drawn)
    (before,), (after,) = whole.verdicts, few.verdicts
    assert (after.outcome, after.code) == (before.outcome, before.code)
    assert after.estimated_factor == pytest.approx(factor, rel=0.02)
    assert share <= 1 / 3
    assert after.examples == FIRST


def test_a_factor_far_off_is_read_where_pictures_follow_it(tiny, drawn):
    shared = {"pipeline": tiny, "lora": lora_file("r32_a32", "kohya"), "progress": False, "workers": 0}
    (found,) = run_sweep(raw_alpha(), **shared, sequential=True).verdicts
    assert found.code == "LH601"
    assert found.estimated_factor == pytest.approx(32, rel=0.05)
    assert found.prescription == pytest.approx(1 / 32, rel=0.05)


def test_every_strength_has_one_row_and_says_how_it_was_measured(tiny, r8_a16, tmp_path: Path):
    shared = {"pipeline": tiny, "lora": r8_a16, "alphas": EVERY, "progress": False, "out": tmp_path}
    rows: list[dict] = []
    found = run_sweep(times(1), **shared, sequential=True, on_record=rows.append)
    assert [row["strength"] for row in found.records] == list(EVERY)
    assert rows == found.records
    seen = {row["strength"]: bool(row["images"]) for row in rows}
    assert [strength for strength, pictures in seen.items() if pictures] == [0.0, 1.0]
    assert all(row["label"] == "one denoiser call" for row in rows if not row["images"])
    assert all((tmp_path / image["path"]).is_file() for row in rows for image in row["images"])
    assert found.verdicts[0].data["probed"] == [0.25, 0.5, 2.0, 4.0, 8.0]


def later(first: float, rest: float) -> Subject:
    """A loader whose model is `rest` times as strong from its second call on."""

    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        adapter, calls = read_lora(lora), [0]
        names, _ = match_modules(adapter, [path for path, _ in model.named_modules()])
        deltas = []
        for name, path in names.items():
            a, b = adapter.tensors(name)
            weight = model.get_submodule(path).weight
            deltas.append((weight, strength * adapter.modules[name].trained_scale * (b.double() @ a.double())))
            weight.data += (first * deltas[-1][1]).to(weight.dtype)

        def count(module, args, kwargs) -> None:
            calls[0] += 1
            if calls[0] == 2:
                for weight, delta in deltas:
                    weight.data += ((rest - first) * delta).to(weight.dtype)

        model.register_forward_pre_hook(count, with_kwargs=True)

    return Subject("later", load, "1", Declaration())


def test_pictures_that_contradict_the_probe_are_all_drawn_and_decide(tiny, r8_a16):
    shared = {"pipeline": tiny, "lora": r8_a16, "alphas": (0, 0.5, 1, 2), "progress": False, "workers": 0}
    whole = run_sweep(later(1.0, 2.0), **shared).verdicts[0]
    found = run_sweep(later(1.0, 2.0), **shared, sequential=True)
    assert whole.outcome == found.verdicts[0].outcome == "failed"
    assert found.verdicts[0].examples == 8
    assert found.verdicts[0].estimated_factor == whole.estimated_factor
    assert [row["label"] == "one denoiser call" for row in found.records] == [False] * 4


def test_a_strength_that_is_clamped_is_seen_where_it_is(tiny, r8_a16):
    clamped = subject("clamped", lambda rank, scale, strength: scale * min(strength, 1.0))
    shared = {"pipeline": tiny, "lora": r8_a16, "alphas": (0, 0.5, 1, 2), "progress": False, "workers": 0}
    found = run_sweep(clamped, **shared, sequential=True).verdicts[0]
    assert found.code == "LH602"
    assert "at strength 2" in found.title


def test_a_loader_that_raises_is_one_errored_verdict(tiny, r8_a16):
    def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        raise RuntimeError("no")

    found = run_sweep(
        Subject("raises", load, "1", Declaration()), pipeline=tiny, lora=r8_a16, progress=False, sequential=True
    )
    assert [(v.outcome, v.code) for v in found.verdicts] == [("errored", "LH901")]
    assert found.records == []


@pytest.mark.parametrize(("pictures", "looks"), [(1, (1,)), (4, (4,)), (5, (4, 5)), (8, (4, 8)), (20, (4, 8, 16, 20))])
def test_pictures_are_doubled_until_all_are_there(pictures: int, looks: tuple[int, ...]):
    assert counts(pictures) == looks


def test_the_last_studio_has_all_pictures_and_the_first_is_the_probe(tiny, r8_a16):
    whole = Studio(tiny, r8_a16, [Pair(tiny.prompts[0], seed) for seed in range(6)])
    found = studios_of(whole)
    assert [(s.quick, len(s.sampler.pairs), s.number) for s in found] == [(True, 6, 0), (False, 4, 1), (False, 6, 2)]


RIGHT = Judgement("as trained", None, 1.0, (0.99, 1.01))


@pytest.mark.parametrize(
    ("probe", "seen", "sure"),
    [
        (RIGHT, RIGHT, True),
        (RIGHT, Judgement("as trained", None, 1.0, (0.93, 1.02)), False),
        (RIGHT, Judgement("wrong strength", None, 1.2, (1.15, 1.25)), False),
        (RIGHT, Judgement("inconclusive", None), False),
        (Judgement("wrong strength", None, 2.0), Judgement("wrong strength", None, 2.1), True),
        (Judgement("wrong strength", None, 2.0), Judgement("noise", None, 2.1), True),
        (Judgement("wrong strength", None, 2.0), Judgement("wrong strength", None, 2.5), False),
        (Judgement("wrong strength", None, 2.0), Judgement("wrong strength", None, 2.0, None, "mishandled"), False),
        (Judgement("wrong strength", None, 2.0), RIGHT, False),
        (Judgement("wrong strength", None, 1.0), Judgement("wrong strength", None, -1.0), False),
        (Judgement("wrong strength", None, 1.0), Judgement("wrong strength", None), False),
        (Judgement("no visible effect", None, 0.0), Judgement("no visible effect", None, 0.01), True),
        (Judgement("inconclusive", None), RIGHT, False),
    ],
)
def test_an_answer_is_sure_when_both_say_the_same_factor(probe: Judgement, seen: Judgement, sure: bool):
    assert agree(probe, seen) is sure


def test_pictures_are_drawn_where_a_fault_shows_best():
    def at(strength: float, factor: float) -> StrengthResult:
        place = strength * factor
        return StrengthResult(strength, Estimate(place, (place, place), 0.0), 0.3, 0.0, "clean")

    seen = [at(strength, 16.0) for strength in (0.0, 0.25, 1.0, 4.0, 0.0625)]
    wrong = Judgement("wrong strength", seen[2], 16.0)
    assert deciding(wrong, seen) == [0.0, 1.0, 0.0625]
    assert deciding(RIGHT, seen) == [0.0, 1.0]


def test_a_candidate_that_is_not_between_its_rungs_is_placed_on_the_whole_ladder(tiny, r8_a16):
    studio = Studio(tiny, r8_a16, [Pair(tiny.prompts[0], 5)])
    candidate = studio.reference(4.0)
    assert studio.place(candidate, near=1.0) == studio.place(candidate)
    assert studio.place(candidate, near=4.0).strength == pytest.approx(4.0, rel=0.02)


@pytest.mark.parametrize("strength", [-0.5, 0.0, 0.3, 1.0, 5.0, 64.0, 200.0])
def test_rungs_lie_on_either_side(strength: float):
    rungs = rungs_around(strength)
    assert 0.0 in rungs
    assert min(rungs) <= strength <= max(*rungs, LADDER[-1], strength)
    assert len(rungs) <= 4


def test_the_end_of_a_part_of_the_ladder_is_no_place():
    assert not _inside(Estimate(1.5, (1.4, 1.6), 0.0), (0.0, 1.0, 1.5))
    assert not _inside(Estimate(1.2, (1.1, 1.3), 0.5), (0.0, 1.0, 1.5))
    assert _inside(Estimate(64.0, (60.0, 66.0), 0.01, at_end=True), (0.0, 32.0, 64.0))
