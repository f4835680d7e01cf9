"""Every malformed file gets one clear sentence that names the file and the key."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fixtures.build_malformed import FILE_CASES, HAZARD_CASES, MODULE_CASES, Case, build, framed
from harness.errors import LoraFileError
from harness.files import read_header, read_lora


@pytest.fixture
def bad(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Case, Path]:
    return request.param, build(request.param, tmp_path)


def named(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("bad", FILE_CASES + MODULE_CASES, ids=named, indirect=True)
def test_a_bad_file_is_one_sentence_with_its_path_and_key(bad: tuple[Case, Path]) -> None:
    case, path = bad
    start = time.perf_counter()
    with pytest.raises(LoraFileError) as raised:
        read_lora(path)
    assert time.perf_counter() - start < 5
    sentence = str(raised.value)
    assert str(path) in sentence
    assert all(word in sentence for word in case.says), sentence
    assert len(sentence) < 900, sentence
    assert sentence.isprintable(), sentence


@pytest.mark.parametrize("bad", [case for case in MODULE_CASES if case.code != "LH799"], ids=named, indirect=True)
def test_a_lenient_read_collects_the_problem_instead_of_raising(bad: tuple[Case, Path]) -> None:
    case, path = bad
    adapter = read_lora(path, strict=False)
    assert case.code in {problem.code for problem in adapter.problems}
    text = "\n".join(problem.text() for problem in adapter.problems)
    assert all(word in text for word in case.says if word != "adapter_config.json"), text


@pytest.mark.parametrize("bad", HAZARD_CASES, ids=named, indirect=True)
def test_a_file_that_is_only_hazardous_is_read(bad: tuple[Case, Path]) -> None:
    _, path = bad
    adapter = read_lora(path)
    assert len([module for module in adapter.modules.values() if module.rank]) == 1
    assert not [problem for problem in adapter.problems if problem.fatal]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_the_hostile_sizes_cost_little_memory(tmp_path: Path) -> None:
    paths = [str(build(case, tmp_path)) for case in FILE_CASES + MODULE_CASES if case.name in HUNGRY]
    assert len(paths) == len(HUNGRY)
    done = subprocess.run([sys.executable, "-c", _READ_ALL, *paths], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 400_000  # kilobytes


@pytest.mark.parametrize(
    ("again", "metadata", "twice"),
    [
        ('"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}', "{}", ("a",)),
        (
            '"\\u0061" : {"dtype" :"F32", "shape": [1], "data_offsets": [0, 4]}',
            '{"x": "\\u003a\\u003a\\u003a\\u003A"}',
            ("a",),
        ),
        ('"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}', '{"x": "1:2", "x": "3"}', ("x",)),
        ('"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}', '{"a:b": "1:2", "y": "{\\"z\\": 1}"}', ()),
    ],
)
def test_a_name_that_stands_twice_is_found_however_it_is_written(
    tmp_path: Path, again: str, metadata: str, twice: tuple[str, ...]
) -> None:
    first = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    header = f'{{"__metadata__": {metadata}, {first}, {again}}}'.encode()
    (tmp_path / "x.safetensors").write_bytes(framed(header, bytes(4 if "[0, 4]" in again else 8)))
    assert read_header(tmp_path / "x.safetensors").duplicates == twice


HUNGRY = ("header_2_to_the_62", "bomb_of_tensors", "long_header", "sparse_4_terabytes", "very_many_dimensions")
_READ_ALL = """
import sys
from harness.errors import LoraFileError
from harness.files import read_header, read_lora
for path in sys.argv[1:]:
    try:
        read_lora(path)
    except LoraFileError:
        continue
    raise SystemExit(f"{path} was read")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
