"""`full` judges every row: damage to any number of rows is seen, and a right merge has none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness.doctor.verify.verify import MergeReport, verify_merge
from tests.doctor.damage import COUNTS, KINDS, write_base, write_merged

CODES = {"unmerged": "LH102", "doubled": "LH401", "zeroed": "LH401", "nan": "LH502", "noise": "LH401"}
Layer = tuple[Path, Tensor, Tensor]


@pytest.fixture(scope="module", params=[3e-2, 2e-3], ids=["plain", "weak"])
def layer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Layer:
    folder = tmp_path_factory.mktemp("layer")
    return (folder, *write_base(folder, request.param))


def verify(folder: Path, *, full: bool = True) -> MergeReport:
    return verify_merge(
        folder / "base.safetensors", folder / "merged.safetensors", folder / "lora.safetensors", full=full
    )


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_damaged_row_is_seen_and_named(layer: Layer, kind: str, count: int) -> None:
    folder, base, update = layer
    start = 1000 if count < 64 else 2 * count
    write_merged(folder, base, update, kind, count, start)
    report = verify(folder)
    assert (report.exit_code, report.overall.code) == (1, CODES[kind]), report.overall.text()
    measured = report.measured[0].measured
    assert measured is not None
    found = [*measured.unmerged, *(damage.rows for damage in measured.damaged)]
    assert (min(found)[0], max(found)[1]) == (start, start + count)
    assert sum(stop - begin for begin, stop in found) >= 0.98 * count


def test_no_row_of_a_right_merge_is_called_damaged(layer: Layer) -> None:
    folder, base, update = layer
    write_merged(folder, base, update)
    report = verify(folder)
    assert report.exit_code == 0, report.overall.text()
    assert report.modules[0].data["damaged_rows"] == report.modules[0].data["unmerged_rows"] == []


def test_rows_at_either_end_and_a_row_apart_are_seen(layer: Layer) -> None:
    folder, base, update = layer
    for start in (0, 4095):
        write_merged(folder, base, update, "doubled", 1, start)
        damaged = verify(folder).modules[0].data["damaged_rows"]
        assert [text.partition(" (scale ")[0] for text in damaged] == [f"row {start}"]
        assert float(damaged[0].partition("(scale ")[2].rstrip(")")) == pytest.approx(4, rel=0.02)


def test_the_sample_sees_what_is_not_finite_in_the_columns_that_it_skips(tmp_path: Path) -> None:
    base, update = write_base(tmp_path, 3e-2)
    merged = (base.float() + update).bfloat16()
    merged[:, 1] = torch.inf
    from safetensors.torch import save_file

    save_file({"x.weight": merged}, tmp_path / "merged.safetensors")
    assert verify(tmp_path, full=False).overall.code == "LH502"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_row_is_enough_in_every_dtype(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    base, update = write_base(tmp_path, 0.1, dtype)
    write_merged(tmp_path, base, update)
    assert verify(tmp_path).exit_code == 0
    write_merged(tmp_path, base, update, kind, 1)
    assert verify(tmp_path).exit_code == 1
