"""49 PEFT folders against their base: `inspect` must say what PEFT's own loading does with each."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from peft import PeftModel

from harness.doctor import inspect_file
from harness.verdict.file_record import FileRecord
from tests.cases.adapters import CASES, Case, base_model, write

EXITS = {None: 0, "warning": 0, "error": 1, "fatal": 2}
# hazards that say that PEFT, or anybody, gets less than the file holds
LESS = {"LH705", "LH706", "LH707", "LH712", "LH713", "LH714", "LH718", "LH719", "LH720", "LH721", "LH797", "LH799"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    base_model().save_pretrained(folder)
    return folder


def loaded(folder: Path) -> tuple[int, int]:
    """Return how many modules PEFT gives an effect, of how many that it makes.

    Raises:
        Exception: whatever PEFT raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base_model(), folder)
    halves = [p for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    return sum(bool(half.abs().max() > 0) for half in halves), len(halves)


def less_than_the_file_holds(folder: Path, record: FileRecord) -> bool:
    """Tell whether PEFT raises, or some module of the file has no effect in it."""
    try:
        with_effect, made = loaded(folder)
    except Exception:
        return True
    pairs = sum(count for variant, count in record.variants.items() if variant not in ("set", "tokens"))
    return with_effect < max(pairs, made)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_inspect_says_what_peft_does(case: Case, base: Path, tmp_path: Path) -> None:
    folder = write(case, tmp_path / case.name)
    record = inspect_file(folder, base=base)
    assert (tuple(sorted(set(record.codes))), EXITS[record.severity]) == (case.codes, case.exit), record.hazards
    if case.name not in ("bin_only", "alpha0", "inf", "no_config"):
        assert less_than_the_file_holds(folder, record) == bool(LESS & set(record.codes))


def test_49_cases_are_tried() -> None:
    assert len({case.name for case in CASES}) == 49
