"""An audit gives one row per file whatever the files are, in a stable order, and can be resumed."""

from __future__ import annotations

import csv
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from markupsafe import escape
from safetensors.torch import save_file

from fixtures.build_malformed import CASES, FILE_CASES, build
from harness.commands.audit import command
from harness.doctor import AuditRow
from harness.doctor.audit import rows as audit_row
from harness.doctor.audit import work as audit_work
from harness.doctor.audit.audit import audit_files, find_files
from harness.doctor.audit.output import read_rows, write_rows
from harness.errors import UserError
from harness.files import LoraWeights, write_lora
from harness.verdict.codes import CODES


def lora(path: Path, format: str = "kohya", *, seed: int = 0, alpha: float = 8.0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(4, 16, generator=generator), torch.randn(16, 4, generator=generator)
    return write_lora(
        path, format, {"blocks.0.to_q": LoraWeights(a, b, alpha), "blocks.1.to_q": LoraWeights(a, b, alpha)}
    )


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "library"
    for name, seed in (("b", 1), ("a", 2), ("deep/er/c", 3)):
        lora(root / f"{name}.safetensors", seed=seed)
    lora(root / "peft_one", "peft", seed=4)
    (root / "broken.safetensors").write_bytes(b"\xff" * 40)
    (root / "notes.txt").write_text("no LoRA")
    return root


def names(rows: list[AuditRow], root: Path) -> list[str]:
    return [os.path.relpath(row.path, root) for row in rows]


EXPECTED = ["a.safetensors", "b.safetensors", "broken.safetensors", "deep/er/c.safetensors", "peft_one"]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_file_is_one_row_in_a_stable_order(library: Path, workers: int) -> None:
    seen: list[str] = []
    rows = audit_files([library], workers=workers, on_row=lambda row: seen.append(row.path))
    assert names(rows, library) == EXPECTED
    assert sorted(seen) == sorted(row.path for row in rows)
    assert [row.format for row in rows] == ["kohya", "kohya", None, "kohya", "peft"]
    assert rows[2].codes == ("LH799",)


def test_an_executor_gives_the_same_rows(library: Path) -> None:
    with ThreadPoolExecutor(2) as executor:
        rows = audit_files([library], executor=executor)
    alone = audit_files([library], workers=0)
    assert [row.model_copy(update={"seconds": None}) for row in rows] == [
        row.model_copy(update={"seconds": None}) for row in alone
    ]


def test_globs_and_single_files_count_once(library: Path) -> None:
    paths = [str(library / "**" / "*.safetensors"), library / "a.safetensors", library]
    assert len(find_files(paths)) == len(EXPECTED)
    with pytest.raises(UserError, match="no such file"):
        find_files([library / "*.missing"])


def test_links_out_of_the_root_are_rows_and_never_followed(library: Path, tmp_path: Path) -> None:
    outside = lora(tmp_path / "outside.safetensors", seed=9)
    (library / "zz_out.safetensors").symlink_to(outside)
    (library / "zz_in.safetensors").symlink_to(library / "a.safetensors")
    (library / "zz_folder").symlink_to(tmp_path)
    (library / "zz_loop.safetensors").symlink_to(library / "zz_loop.safetensors")
    rows = {os.path.basename(row.path): row for row in audit_files([library], workers=0)}
    assert "not followed" in rows["zz_out.safetensors"].hazards[0].what
    assert "leads nowhere" in rows["zz_loop.safetensors"].hazards[0].what
    assert "zz_in.safetensors" not in rows
    assert not any("outside" in name for name in rows)


def test_files_with_the_same_weights_are_found_whatever_their_metadata(library: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file(load_file(library / "a.safetensors"), library / "copy.safetensors", {"title": "another name"})
    lora(library / "other.safetensors", seed=2, alpha=4.0)
    rows = {os.path.basename(row.path): row for row in audit_files([library], workers=1)}
    assert rows["copy.safetensors"].duplicate_of == rows["a.safetensors"].path
    assert rows["a.safetensors"].duplicate_of is None
    assert rows["other.safetensors"].duplicate_of is None
    assert rows["b.safetensors"].digest is None


def test_a_file_that_hangs_or_eats_memory_or_kills_is_one_row(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = audit_row.audit_file

    def hostile(path: str, *, energy: bool = False) -> AuditRow:
        if path.endswith("a.safetensors"):
            while True:
                pass
        if path.endswith("b.safetensors"):
            os.abort()
        if path.endswith("c.safetensors"):
            bytearray(1 << 31)
        return real(path, energy=energy)

    monkeypatch.setattr(audit_work, "audit_file", hostile)
    rows = audit_files([library], workers=1, seconds=1.0, memory=256 << 20)
    said = {os.path.basename(row.path): row.hazards[0].what for row in rows if row.hazards}
    assert "within 1 s" in said["a.safetensors"]
    assert "SIGABRT" in said["b.safetensors"]
    assert "256 MiB" in said["c.safetensors"]
    assert rows[-1].format == "peft"


UNREAD = {"LH797", "LH799"}


def test_every_malformed_file_is_one_row_that_can_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    cases = [case for case in CASES if case.name not in ("folder", "missing", "zip_pickle", "plain_pickle")]
    for case in cases:
        build(case, folder)
    rows = audit_files([folder], workers=1, seconds=20)
    assert len(rows) == len(cases)
    unread = {case.name for case in cases if case in FILE_CASES and case.code in UNREAD}
    found = {Path(row.path).relative_to(folder).parts[0] for row in rows if UNREAD & set(row.codes)}
    assert unread <= found
    for suffix in (".jsonl", ".csv", ".html"):
        text = write_rows(tmp_path / f"rows{suffix}", rows).read_text()
        assert not any(character in text for character in "\x1b\x00\u202e")
    again = write_rows(tmp_path / "again.jsonl", read_rows(tmp_path / "rows.jsonl"))
    assert again.read_text() == (tmp_path / "rows.jsonl").read_text()


def test_a_checkpoint_among_loras_is_not_broken_and_not_judged(tmp_path: Path) -> None:
    lora(tmp_path / "a.safetensors")
    save_file({"blocks.0.to_q.weight": torch.ones(16, 16)}, tmp_path / "base.safetensors")
    done = CliRunner().invoke(command, [str(tmp_path)])
    assert done.exit_code == 2, done.output
    assert "1 LoRA file: 1 without hazards; 1 file without a known LoRA" in done.output
    assert "broken" not in done.output


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_resumed_audit_reads_only_what_changed(library: Path, tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    out = write_rows(tmp_path / f"rows{suffix}", audit_files([library], workers=0))
    changed = lora(library / "b.safetensors", seed=11, alpha=2.0)
    os.utime(changed, ns=(1, 1))
    read: list[str] = []
    real = audit_work.do

    def counted(path: str, task: audit_work.Task) -> str:
        read.append(path)
        return real(path, task)

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(audit_work, "do", counted)
        rows = audit_files([library], workers=0, known=read_rows(out))
    assert [os.path.basename(path) for path in read] == ["b.safetensors"]
    assert rows == audit_files([library], workers=0, known=rows)
    assert rows[1].alphas == {"2": 2}


def test_a_cut_last_line_is_read_again(library: Path, tmp_path: Path) -> None:
    out = write_rows(tmp_path / "rows.jsonl", audit_files([library], workers=0))
    out.write_text(out.read_text()[:-20])
    assert len(read_rows(out)) == len(EXPECTED) - 1


def test_a_hostile_name_is_harmless_in_csv_and_html(tmp_path: Path) -> None:
    lora(tmp_path / "=cmd<script>alert(1)<\x1b[2J>.safetensors")
    rows = audit_files([tmp_path], workers=0)
    with write_rows(tmp_path / "rows.csv", rows).open(newline="") as stream:
        cell = next(csv.DictReader(stream))["path"]
    assert "\x1b" not in cell
    formula = rows[0].model_copy(update={"path": "=cmd()"})
    assert "'=cmd()" in write_rows(tmp_path / "formula.csv", [formula]).read_text()
    page = write_rows(tmp_path / "rows.html", rows).read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "\x1b" not in page


def test_the_page_counts_hazards_and_says_what_is_wrong_with_each_file(library: Path, tmp_path: Path) -> None:
    rows = audit_files([library], workers=0)
    page = write_rows(tmp_path / "rows.html", rows).read_text()
    assert "5 LoRA files: 4 without hazards, 1 unreadable" in page
    for row in rows:
        assert escape(os.path.basename(row.path)) in page
        assert all(escape(hazard.what[:200]) in page for hazard in row.hazards)
    for code in {code for row in rows for code in row.codes}:
        assert escape(CODES[code].fix) in page


def test_what_cannot_be_written_or_resumed_is_said_first(library: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (["--out", str(tmp_path / "rows.xlsx")], "no format"),
        (["--resume"], "--out"),
        (["--out", str(tmp_path / "rows.html"), "--resume"], "can be resumed"),
    ):
        result = CliRunner().invoke(command, [str(library), *arguments])
        assert isinstance(result.exception, UserError)
        assert words in str(result.exception)


def test_the_command_writes_every_format_and_exits_by_what_it_found(library: Path, tmp_path: Path) -> None:
    outs = [tmp_path / f"rows.{suffix}" for suffix in ("jsonl", "csv", "html")]
    arguments = [str(library), "-j", "0", *(part for out in outs for part in ("--out", str(out)))]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 1
    assert "5 LoRA files" in result.output
    assert all(out.stat().st_size for out in outs)
    again = CliRunner().invoke(command, [str(library / "a.safetensors"), "-j", "0", "--json"])
    assert again.exit_code == 0
    assert [json.loads(line)["kind"] for line in again.output.splitlines()] == ["header", "file", "footer"]


def test_urls_need_an_allowed_scheme_and_only_the_header_is_fetched(library: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for name in EXPECTED[:3]:
        system.pipe_file(f"/shelf/{name}", (library / name).read_bytes())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        system.pipe_file(f"/shelf/peft/{name}", (library / "peft_one" / name).read_bytes())
    with pytest.raises(UserError, match="not an allowed scheme"):
        find_files(["memory://shelf"])
    rows = audit_files(["memory://shelf"], schemes=("memory",), workers=0)
    assert [row.format for row in rows] == ["kohya", "kohya", None, "peft"]
    local = audit_files([library / "a.safetensors"], workers=0)[0]
    assert (rows[0].alphas, rows[0].ranks, rows[0].size) == (local.alphas, local.ranks, local.size)


def test_private_web_addresses_are_refused_without_their_credentials() -> None:
    with pytest.raises(UserError, match="private address") as caught:
        find_files(["https://user:secret@127.0.0.1/x.safetensors"])
    assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_a_dask_worker_killed_half_way_loses_nothing(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    for number in range(60):
        lora(tmp_path / f"{number:03d}.safetensors", seed=number)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        victims = [nanny.pid for nanny in cluster.workers.values()]
        seen: list[str] = []

        def kill_one(row: AuditRow) -> None:
            seen.append(row.path)
            if len(seen) == 10:
                os.kill(victims.pop(), 9)

        rows = audit_files([tmp_path], executor=client.get_executor(retries=3), on_row=kill_one)
        arguments = [str(tmp_path), "--dask", cluster.scheduler_address, "--json"]
        again = CliRunner().invoke(command, arguments)
    assert [again.exit_code, again.output.count('"kind":"file"')] == [0, 60]
    assert len(victims) == 1
    assert len(rows) == 60
    assert all(row.format == "kohya" and not row.hazards for row in rows)
