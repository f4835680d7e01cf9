"""Releases of a loader in one run: each its own law, one that dies or cannot start its own row, the change named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness import measure_law
from harness.checks.releases import ReleaseLaw, bisected, changes, measure_releases, places_of
from harness.errors import UserError
from harness.isolation.limits import Limits
from harness.law.released import KILLED, NOTHING, RAISES
from harness.loaders.live import live_loaders
from harness.loaders.registry import resolve

PLACE = [("peft", "qwen-image")]
# what the live loader asks of loralib: layers that merge when `eval` is called
LAYER = """
import os
import torch

class Linear(torch.nn.Linear):
    def __init__(self, columns, rows, r, lora_alpha, bias=True, **how):
        super().__init__(columns, rows, bias=bias)
        self.lora_A = torch.nn.Parameter(torch.zeros(r, columns))
        self.lora_B = torch.nn.Parameter(torch.zeros(rows, r))
        self.r, self.lora_alpha = r, lora_alpha

    def eval(self):
        scale = {scale}
        self.weight.data += scale * self.lora_B.data @ self.lora_A.data

MergedLinear = Linear
"""
RIGHT, WRONG = "self.lora_alpha / self.r", "2 * self.lora_alpha / self.r"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_HARNESS_RELEASES", str(tmp_path))
    return tmp_path


def release(root: Path, version: str, scale: str = RIGHT, before: str = "") -> None:
    folder = root / f"loralib-{version}"
    (folder / "loralib").mkdir(parents=True)
    (folder / "loralib" / "__init__.py").write_text(before + LAYER.format(scale=scale))
    (folder / f"loralib-{version}.dist-info").mkdir()
    told = f"Metadata-Version: 2.1\nName: loralib\nVersion: {version}\n"
    (folder / f"loralib-{version}.dist-info" / "METADATA").write_text(told)


def measured(*versions: str, workers: int = 2) -> dict[str, ReleaseLaw]:
    subjects = {version: resolve(f"loralib=={version}") for version in versions}
    found = measure_releases(subjects, PLACE, limits=Limits(20.0, workers=workers))
    assert [each.version for each in found] == list(versions)
    return {each.version: each for each in found}


def test_each_release_has_its_own_law_and_a_bad_one_its_own_row(root, tmp_path):
    marker = tmp_path / "pids"
    release(root, "9.0")
    release(root, "9.1", WRONG)
    release(root, "9.2", f"[open({str(marker)!r}, 'a').write(str(os.getpid()) + ' '), os.kill(os.getpid(), 11)][0]")
    release(root, "9.3", before="import no_such_library\n")
    release(root, "9.4", "0.0")
    release(root, "9.5")
    heard = []
    subjects = {v: resolve(f"loralib=={v}") for v in ("9.0", "9.1", "9.2", "9.3", "9.4", "9.5")}
    found = measure_releases(subjects, PLACE, limits=Limits(20.0, workers=2), on_release=heard.append)
    by_version = {each.version: each for each in found}
    states = {version: list(each.states.values()) for version, each in by_version.items()}
    right = ["strength * alpha / rank"]
    assert states["9.0"] == states["9.5"] == right
    assert states["9.1"] == ["2 * strength * alpha / rank"]
    assert by_version["9.1"].cells[0].code is not None
    assert states["9.2"] == [RAISES]
    assert "SIGSEGV" in by_version["9.2"].cells[0].what
    assert states["9.3"] == []
    assert by_version["9.3"].problem == "cannot be started: ModuleNotFoundError: No module named 'no_such_library'"
    assert states["9.4"] == [NOTHING]
    assert sorted(each.version for each in heard) == list(by_version)
    assert not [pid for pid in marker.read_text().split() if Path(f"/proc/{pid}").exists()]
    assert [(c.last, c.first, c.after) for c in changes(found)] == [
        ("9.0", "9.1", "2 * strength * alpha / rank"),
        ("9.1", "9.2", RAISES),
        ("9.2", "9.4", NOTHING),
        ("9.4", "9.5", right[0]),
    ]


def test_a_release_whose_process_is_killed_from_outside_is_measured_again(root, tmp_path):
    loads, starts = tmp_path / "loads", tmp_path / "starts"
    counted = f"open({str(loads)!r}, 'a').write('x') and os.path.getsize({str(loads)!r}) == 40"
    first = f"import os\nif not os.path.exists({str(starts)!r}): open({str(starts)!r}, 'w'); os.kill(os.getpid(), 9)\n"
    release(root, "9.0")
    release(root, "9.1", f"[{counted} and os.kill(os.getpid(), 9), {RIGHT}][1]")
    release(root, "9.2", before=first)
    found = measured("9.0", "9.1", "9.2")
    assert loads.stat().st_size > 40
    assert starts.exists()
    assert changes(found.values()) == []
    assert [each.problem for each in found.values()] == ["", "", ""]
    assert all(each.cells[0].right for each in found.values())


@pytest.mark.parametrize("number", [9, 15])
def test_a_release_that_is_killed_again_and_again_is_not_judged(root, number):
    release(root, "9.0")
    release(root, "9.1", f"[os.kill(os.getpid(), {number}), os.sched_yield(), 1.0][-1]")
    release(root, "9.2")
    found = measured("9.0", "9.1", "9.2")
    assert list(found["9.1"].states.values()) == [KILLED]
    assert (found["9.1"].cells[0].code, found["9.1"].cells[0].right) == (None, False)
    assert changes(found.values()) == []


def test_a_release_that_says_the_words_of_another_end_in_its_exception_raises(root):
    release(root, "9.0", "{}['no answer within the time limit, killed by SIGKILL']")
    assert list(measured("9.0")["9.0"].states.values()) == [RAISES]


def test_a_release_that_is_not_the_one_named_is_not_measured_for_it(root):
    release(root, "9.0")
    (root / "loralib-9.0").rename(root / "loralib-9.7")
    (row,) = measured("9.7").values()
    assert row.problem == "cannot be started: LoaderSpecError: loralib is 9.0 here, not 9.7"


def test_a_pinned_loader_is_measured_and_checked_like_any_other(root):
    release(root, "9.1", WRONG)
    law = measure_law("loralib==9.1", format="peft", bench="qwen-image")
    assert law.formula == "2 * strength * alpha / rank"
    assert os.environ.get("LORA_HARNESS_RELEASES") == str(root)


def test_the_installed_release_follows_the_same_law_either_way():
    version = live_loaders()["loralib"].version()
    both = [measure_law(spec, format="peft", bench="qwen-image") for spec in ("loralib", f"loralib=={version}")]
    assert both[0].formula == both[1].formula == "strength * alpha / rank"
    assert len(both[0].probes) == len(both[1].probes)


def test_bisecting_measures_few_and_finds_every_change_between_the_ends():
    laws = {str(number): "a" if number < 7 else "b" if number < 20 else "c" for number in range(32)}
    tried = []

    def measure(version: str) -> ReleaseLaw:
        from harness.checks.releases import CellLaw

        tried.append(version)
        return ReleaseLaw("acme", version, (CellLaw("peft", "flux", laws[version]),))

    found = bisected(list(laws), measure)
    assert [(change.last, change.first) for change in changes(found)] == [("6", "7"), ("19", "20")]
    assert len(tried) == len(set(tried)) <= 12
    assert [each.version for each in bisected(["1"], measure)] == ["1"]


def test_places_are_those_that_the_loader_declares():
    diffusers = live_loaders()["diffusers"]
    assert ("kohya", "sd-unet") in places_of(diffusers)
    assert places_of(diffusers, ["kohya"], ["sd-unet"]) == [("kohya", "sd-unet")]
    with pytest.raises(UserError, match="does not declare the format peft; nothing to measure"):
        places_of(diffusers, ["peft"], ["flux"])
