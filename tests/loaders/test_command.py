from __future__ import annotations

import sys
import time

import pytest
import torch

from harness.errors import LoaderSpecError
from harness.isolation.calls import raised_by
from harness.loaders import command, exchange
from harness.loaders.registry import resolve

PLACES = "{base} {lora} {strength} {out}"


def tool(tmp_path, text, seconds=20.0):
    """A loader that runs `text` as a Python script with base, lora, strength and out as its arguments."""
    script = tmp_path / "the tool.py"
    script.write_text(f"import sys\nbase, lora, strength, out = sys.argv[1:]\n{text}\n")
    return command.command_loader(f"cmd:'{sys.executable}' '{script}' {PLACES}", seconds=seconds)


def shell(line, seconds=20.0):
    return command.command_loader(f"cmd:sh -c '{line}' {PLACES}", seconds=seconds)


MERGE = """
from safetensors.numpy import load_file, save_file
weights = load_file(base)
save_file({"weight": weights["weight"] * float(strength) + len(lora)}, out)
"""


def test_changed_tensors_are_loaded_back_and_the_rest_stays(tmp_path):
    model = torch.nn.Linear(2, 2)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    lora = tmp_path / "a file.safetensors"
    assert tool(tmp_path, MERGE)(model, lora, strength=-0.5) is model
    assert torch.allclose(model.weight, weight * -0.5 + len(str(lora)))
    assert torch.equal(model.bias, bias)


def test_a_cmd_spec_is_a_subject():
    subject = resolve(f"cmd:sh -c true {PLACES}")
    assert (subject.spec, subject.formats[0]) == (f"cmd:sh -c true {PLACES}", "peft")


def test_no_shell_reads_the_paths(tmp_path):
    lora = tmp_path / "$(touch pwned); `touch pwned`"
    text = f"assert lora == {str(lora)!r}, lora\n{MERGE}"
    tool(tmp_path, text)(torch.nn.Linear(2, 2), lora)


def test_tied_weights_can_be_written(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    text = "from safetensors.numpy import load_file, save_file\nsave_file(load_file(base), out)"
    tool(tmp_path, text)(model, tmp_path)


BAD_OUTPUT = {
    "pass": "wrote no file at",
    "open(out, 'w').write('{}')": "no valid safetensors file",
    "open(out, 'wb').truncate(200 << 20)": "merged file has 209715200 bytes, more than",
    "from safetensors.numpy import save_file; save_file({}, out)": "has no tensors",
    "import numpy; from safetensors.numpy import save_file; save_file({'a': numpy.ones(2)}, out)": (
        "has 1 tensor that the model has not, for example 'a'"
    ),
    "import numpy; from safetensors.numpy import save_file; save_file({'weight': numpy.ones(2)}, out)": (
        r"has 'weight' with shape \[2\], the model has \[2, 2\]"
    ),
}


@pytest.mark.parametrize("text", BAD_OUTPUT)
def test_a_merged_file_that_does_not_fit_is_named_with_what_the_tool_printed(text, tmp_path):
    with pytest.raises(exchange.OutputError, match=BAD_OUTPUT[text]) as caught:
        tool(tmp_path, f"print('a hint')\n{text}")(torch.nn.Linear(2, 2), tmp_path)
    assert "a hint" in str(caught.value)


def test_a_failing_command_shows_its_status_and_the_tail_of_stderr(tmp_path):
    with pytest.raises(command.CommandFailedError, match=r"ended with exit status 3; it printed: .*the reason$"):
        shell("echo the reason >&2; exit 3")(torch.nn.Linear(1, 1), tmp_path)


ENDS = {
    "echo LoKr is not supported >&2; exit 2": "LH903",
    "echo refused: LoHa >&2; exit 1": "LH903",
    "echo Traceback of; echo NotImplementedError: LoHa; exit 1": "LH903",
    "echo error: cannot read the file >&2; exit 1": "LH901",
    "echo KeyError: lora_unet_x.alpha >&2; exit 1": "LH901",
    "echo Traceback of; echo ValueError: unsupported operand here; exit 1": "LH901",
    "echo panicked at x.rs:1: unsupported tensor; exit 101": "LH901",
    "echo it is not supported; echo but more follows; exit 1": "LH901",
    "echo LoKr is not supported; kill -9 $$": "LH901",
    "exit 1": "LH901",
    "true": "LH901",
}


@pytest.mark.parametrize("line", ENDS)
def test_a_crash_is_no_refusal(line, tmp_path):
    with pytest.raises(RuntimeError) as caught:
        shell(line)(torch.nn.Linear(1, 1), tmp_path)
    assert raised_by(caught.value).code == ENDS[line]


def test_a_killed_command_shows_the_signal(tmp_path):
    with pytest.raises(command.CommandFailedError, match="was killed by SIGKILL; it printed nothing"):
        shell("kill -9 $$")(torch.nn.Linear(1, 1), tmp_path)


def test_a_command_that_hangs_is_killed_with_all_it_started(tmp_path):
    mark = tmp_path / "mark"
    line = f"(sleep 1.5; touch {mark}) & echo waiting; sleep 60"
    began = time.monotonic()
    with pytest.raises(command.CommandTimeoutError, match=r"longer than 0\.3 s and was killed; it printed: waiting"):
        shell(line, seconds=0.3)(torch.nn.Linear(1, 1), tmp_path)
    assert time.monotonic() - began < 1.4
    time.sleep(1.6)
    assert not mark.exists()


def test_a_command_that_prints_without_end_fills_no_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SPARE_BYTES", 1 << 16)
    monkeypatch.setattr(command, "POLL_SECONDS", 0.02)
    sizes = []
    truncate = command.os.truncate
    monkeypatch.setattr(
        command.os, "truncate", lambda path, to: (sizes.append(path.stat().st_size), truncate(path, to))
    )
    with pytest.raises(command.CommandTimeoutError) as caught:
        shell("yes", seconds=0.5)(torch.nn.Linear(1, 1), tmp_path)
    assert sizes
    assert len(str(caught.value)) < 3 * command.TAIL


def test_a_merged_file_that_grows_without_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "SPARE_BYTES", 1 << 16)
    with pytest.raises(exchange.OutputError, match="grew over"):
        shell("yes > $3; #", seconds=20)(torch.nn.Linear(1, 1), tmp_path)


def test_a_program_that_is_not_there_is_a_bad_spec():
    with pytest.raises(LoaderSpecError, match="no program 'no-such-tool'"):
        resolve(f"cmd:no-such-tool {PLACES}")


def test_a_quote_without_an_end_is_a_bad_spec():
    with pytest.raises(LoaderSpecError, match="No closing quotation"):
        resolve(f"cmd:tool ' {PLACES}")


def test_an_empty_command_is_a_bad_spec():
    with pytest.raises(LoaderSpecError, match="lacks"):
        resolve("cmd:")
