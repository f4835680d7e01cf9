from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from harness.benches import get_bench
from harness.checks.law import measure_law
from harness.checks.run import check_loader
from harness.errors import LoaderSpecError
from harness.isolation.calls import raised_by
from harness.isolation.limits import Limits, alarm
from harness.isolation.server import ServerError
from harness.loaders.registry import resolve
from harness.serve import weights_of

from .conftest import factors, trained, weights, written

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
HELPER = ROOT / "harness" / "serve.py"
LOOP = """
import json, os, sys, time
from pathlib import Path
def say(**what):
    print(json.dumps(what), flush=True)
say(protocol=1, {hello})
def hello_again():
    from safetensors.torch import load_file, save_file
    return load_file, save_file
for line in sys.stdin:
    ask = json.loads(line)
    {body}
"""
DOUBLE = """
    load_file, save_file = hello_again()
    save_file({{name: 2 * value for name, value in load_file(ask["model"]).items()}}, ask["out"])
    say(id=ask["id"], done=True)
"""


@pytest.fixture
def server(tmp_path):
    """Make a loader of a server whose loop does `body` for each line; it is ended with the test."""
    made = []

    def make(body, hello="", name="server.py"):
        script = tmp_path / name
        script.write_text(LOOP.replace("{hello}", hello).replace("{body}", body.replace("{{", "{").replace("}}", "}")))
        made.append(resolve(f"serve:'{sys.executable}' '{script}'"))
        return made[-1]

    yield make
    for subject in made:
        subject.close()


def helper(tmp_path, text, name="loader.py"):
    (tmp_path / name).write_text(text)
    return resolve(f"serve:'{sys.executable}' '{HELPER}' '{tmp_path / name}:load'")


def failed(subject, lora, seconds=20.0):
    """What is told of a load that fails."""
    with pytest.raises(ServerError) as caught, alarm(seconds):
        subject.load(torch.nn.Linear(2, 2), lora)
    return raised_by(caught.value)


@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_the_example_in_python_loads_as_trained(form, tmp_path):
    bench = get_bench("qwen-image-fused")
    subject = resolve(f"serve:python '{EXAMPLES / 'serve_merge.py'}'")
    model = subject.load(bench.build(), written(bench, form, tmp_path), strength=-2.0)
    assert factors(bench, model, weights(bench)) == pytest.approx(trained(weights(bench), -2.0), rel=2e-5)
    subject.close()


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_example_in_javascript_loads_as_trained(bench, tmp_path):
    subject = resolve(f"serve:node '{EXAMPLES / 'serve_merge.js'}'")
    model = subject.load(bench.build(), written(bench, "kohya", tmp_path), strength=0.5)
    assert subject.formats == ("kohya",)
    assert factors(bench, model, weights(bench)) == pytest.approx(trained(weights(bench), 0.5), rel=2e-5)
    subject.close()


def test_one_process_answers_every_load(server, tmp_path):
    starts = tmp_path / "starts"
    subject = server(f"open({str(starts)!r}, 'a').write(f'{{os.getpid()}} ')" + DOUBLE)
    model = torch.nn.Linear(2, 2)
    before = model.weight.detach().clone()
    for _ in range(3):
        subject.load(model, tmp_path)
    assert torch.equal(model.weight, 8 * before)
    assert len(set(starts.read_text().split())) == 1


def test_a_server_says_what_it_is(server):
    subject = server("pass", "name='acme', version='1.2', formats=['kohya'], unload=True, strength_argument='scale'")
    assert (subject.title, subject.version, subject.formats) == ("acme", "1.2", ("kohya",))
    assert subject.declaration.unload is not None
    assert subject.declaration.set_strength is None
    assert subject.strength_argument == "scale"
    assert subject.spec.startswith("serve:")


HELLOS = {
    "print('Loading model...')": r"printed 'Loading model...' on stdout, which is for answers alone",
    "import sys; sys.stderr.write('no weights'); sys.exit(3)": "ended with exit status 3; .*stderr: no weights",
    "import os; os.kill(os.getpid(), 9)": "was killed by SIGKILL",
    "print('{\"protocol\": 2}')": "says protocol 2, this harness speaks 1",
    'print(\'{"protocol": 1, "format": "kohya"}\')': "'format' is nothing that a loader declares",
    'print(\'{"protocol": 1, "formats": ["khoya"]}\')': "no format is called 'khoya'; known are peft, kohya",
    'print(\'{"protocol": 1, "formats": "kohya"}\')': "formats must be a list of names",
    'print(\'{"protocol": 1, "name": 3}\')': "name in its first line is no text",
    "print('x' * 2_000_000)": "on stdout, which is for answers alone",
    "print('[' * 100_000)": "on stdout, which is for answers alone",
}


@pytest.mark.parametrize("text", HELLOS)
def test_a_server_that_does_not_say_what_it_is_is_a_bad_spec(text, tmp_path):
    script = tmp_path / "server.py"
    script.write_text(text)
    with pytest.raises(LoaderSpecError, match=HELLOS[text]):
        resolve(f"serve:'{sys.executable}' '{script}'")


@pytest.mark.parametrize("spec", ["serve:", "serve:no-such-tool", "serve:tool '"])
def test_a_line_that_names_no_program_is_a_bad_spec(spec):
    with pytest.raises(LoaderSpecError, match=r"no program|names no program|No closing"):
        resolve(spec)


def test_a_refusal_and_an_error_are_told_apart_and_end_nothing(server, tmp_path):
    subject = server(
        "say(id=ask['id'], **({{'refused': 'LoHa is not supported'}} if ask['strength'] == 1 else "
        "{{'error': 'KeyError: alpha', 'frames': ['acme.py:12 in load: alpha = file[name]']}}), pid=os.getpid())"
    )
    with pytest.raises(ServerError) as refused:
        subject.load(torch.nn.Linear(2, 2), tmp_path)
    process = subject.load._server
    with pytest.raises(ServerError) as raised:
        subject.load(torch.nn.Linear(2, 2), tmp_path, strength=2.0)
    assert subject.load._server is process
    told = raised_by(refused.value), raised_by(raised.value)
    assert [(t.code, t.what) for t in told] == [("LH903", "LoHa is not supported"), ("LH901", "KeyError: alpha")]
    assert told[1].frames == ("acme.py:12 in load: alpha = file[name]",)


def test_a_dead_server_is_named_with_its_status_and_last_lines_and_the_next_load_starts_another(server, tmp_path):
    mark = tmp_path / "mark"
    subject = server(
        f"""if not os.path.exists({str(mark)!r}):
        open({str(mark)!r}, "w").close()
        print("before", file=sys.stderr)
        print("out of cheese", file=sys.stderr)
        sys.exit(7)"""
        + DOUBLE
    )
    told = failed(subject, tmp_path)
    assert (told.code, told.what) == ("LH901", "the server ended with exit status 7")
    assert told.printed.splitlines() == ["before", "out of cheese"]
    assert ("printed", "out of cheese") in list(told.rows())
    subject.load(torch.nn.Linear(2, 2), tmp_path)


def test_the_error_is_told_where_a_language_prints_its_stack_after_it():
    stack = "".join(f"    at Module.f{number} (loader:{number})\n" for number in range(9))
    said = str(
        ServerError(
            "it ended", printed=f"loader:1143\n  throw err;\n\nError: Cannot find module 'x'\n{stack}\nNode v18\n"
        )
    )
    assert (
        said
        == "it ended; the end of its stderr: Error: Cannot find module 'x' | at Module.f0 (loader:0) | … | Node v18"
    )
    assert str(ServerError("it ended", printed="a\nb\nc\nd\n")).endswith(": b | c | d")


def test_a_late_server_is_ended_with_all_it_started_and_its_heartbeats_say_that_it_was_alive(server, tmp_path):
    mark = tmp_path / "mark"
    subject = server(
        f"""import subprocess
    subprocess.Popen(["sh", "-c", "sleep 3; touch {mark}"])
    while True:
        say(heartbeat="step")
        time.sleep(0.05)"""
    )
    subject.prepare()
    told = failed(subject, tmp_path, seconds=0.5)
    assert told.timed_out
    assert "no answer within 0." in told.what
    assert "its last heartbeat came 0." in told.what
    assert not subject.load._server
    silent = server("time.sleep(60)", name="silent.py")
    silent.prepare()
    assert "sent no heartbeat" in failed(silent, tmp_path, seconds=0.5).what
    time.sleep(3.2)
    assert not mark.exists()


WRONG = {
    "print('step 1 of 3', flush=True)": "printed 'step 1 of 3' on stdout",
    "say(id=ask['id'] + 1, done=True)": "neither done, refused nor error for id",
    "say(id=ask['id'])": "neither done, refused nor error for id",
    "say(id=ask['id'], done=True, error='x')": "neither done, refused nor error for id",
    "say(id=ask['id'], done=True)": "wrote no file at",
    "open(ask['out'], 'w').write('{}'); say(id=ask['id'], done=True)": "no valid safetensors file",
    "os.close(1); time.sleep(60)": "no answer within",
}


@pytest.mark.parametrize("body", WRONG)
def test_an_answer_that_is_none_is_one_sentence_and_no_refusal(body, server, tmp_path):
    subject = server(body)
    subject.prepare()
    told = failed(subject, tmp_path, seconds=3.0 if "sleep" in body else 60.0)
    assert told.code == "LH901"
    assert WRONG[body] in told.what
    assert "\n" not in told.what


@pytest.mark.parametrize("name", ["qwen-image", "sd-unet", "clip-text"])
def test_layers_under_adapters_are_read_as_merging_them_leaves_them(name, tmp_path):
    """A wrapped linear layer, convolution or embedding is asked for its weight."""
    bench = get_bench(name)
    lora = peft_folder(bench, tmp_path / "lora")
    base = bench.build().state_dict()
    kept = weights_of(PeftModel.from_pretrained(bench.build(), lora).eval(), base)
    wanted = PeftModel.from_pretrained(bench.build(), lora).merge_and_unload().state_dict()
    off = {n: (kept[n] - w).norm() / w.norm() for n, w in wanted.items() if w.is_floating_point() and w.any()}
    assert max(off.values()) < 2e-6
    assert sum(not torch.equal(kept[n], base[n]) for n in kept) >= 4


def test_layers_under_two_wrappers_are_found_by_their_names():
    first = torch.nn.Sequential(torch.nn.Linear(3, 2))
    base = first.state_dict()
    model = get_peft_model(first, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    outer = torch.nn.Module()
    outer.base_model = torch.nn.Module()
    outer.base_model.model = model
    assert weights_of(outer.eval(), base).keys() == base.keys()


def peft_folder(bench, folder):
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=list(bench.lora_layers), init_lora_weights=False)
    get_peft_model(bench.build(), config).save_pretrained(folder)
    return folder


UNLOADING = """
import sys; sys.path[:0] = [{root!r}, {examples!r}]
from pathlib import Path
from harness.serve import layers_of, serve
import merge_cmd
def load(model, lora, *, strength=1.0):
    model.kept = {{name: value.clone() for name, value in model.state_dict().items()}}, lora
    model.load_state_dict(merge_cmd.merge(model.state_dict(), lora, strength), strict=False)
def unload(model):
    {unload}
def set_strength(model, strength):
    model.load_state_dict(model.kept[0])
    load(model, model.kept[1], strength=strength)
serve(load, unload=unload, set_strength=set_strength, build=layers_of, formats=["kohya"], benches=["qwen-image"])
"""


UNLOADS = [
    ("model.load_state_dict(model.kept[0])", set()),
    pytest.param("pass", {"LH403"}, marks=pytest.mark.slow),  # it looks for the plainest file, through a server
]


@pytest.mark.parametrize(("unload", "codes"), UNLOADS)
def test_unload_and_strength_are_tested_where_a_server_has_them(unload, codes, tmp_path):
    script = tmp_path / "server.py"
    script.write_text(UNLOADING.format(root=str(ROOT), examples=str(EXAMPLES), unload=unload))
    verdicts = check_loader(f"serve:'{sys.executable}' '{script}'", max_examples=1, limits=Limits(workers=1))
    found = {v.code for v in verdicts if v.code and v.check != "silence"}
    assert found == codes, [v.title for v in verdicts]


STALE = """
import sys; sys.path[:0] = [{root!r}, {examples!r}]
from functools import cache
from harness.serve import layers_of, serve
import merge_cmd
{cached}
def load(model, lora, *, strength=1.0):
    model.load_state_dict(merge_cmd.merge(model.state_dict(), lora, strength), strict=False)
serve(load, build=layers_of)
"""


@pytest.mark.parametrize(("cached", "codes"), [("", set()), ("merge_cmd._read = cache(merge_cmd._read)", {"LH408"})])
def test_a_server_that_keeps_what_it_read_is_found(cached, codes, tmp_path):
    script = tmp_path / "server.py"
    script.write_text(STALE.format(root=str(ROOT), examples=str(EXAMPLES), cached=cached))
    spec = f"serve:'{sys.executable}' '{script}'"
    verdicts = check_loader(spec, formats=["kohya"], benches=["qwen-image"], max_examples=1, limits=Limits(workers=1))
    assert {v.code for v in verdicts if v.code and v.check != "silence"} == codes, [v.title for v in verdicts]


def test_nothing_outlives_a_run(server, tmp_path):
    pids = tmp_path / "pids"
    body = f"""open({str(pids)!r}, "a").write(f"{{os.getpid()}} ")
    import subprocess
    child = subprocess.Popen(["sleep", "60"])
    open({str(pids)!r}, "a").write(f"{{child.pid}} ")"""
    subject = server(body + DOUBLE)
    check_loader(subject.spec, formats=["kohya"], benches=["qwen-image"], max_examples=1, limits=Limits(workers=1))
    started = set(pids.read_text().split())
    assert len(started) >= 2
    assert not set(filter(lives, started))


def lives(pid):
    """Whether a process runs; one that is dead may wait for init to notice."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_the_law_of_a_server_is_measured_like_any_other():
    found = measure_law(f"serve:python '{EXAMPLES / 'serve_merge.py'}'", format="kohya", bench="qwen-image")
    assert found.diagnosis.law is not None
    assert found.diagnosis.law.is_trained


def test_without_processes_of_its_own_a_run_ends_the_server_too(tmp_path, server):
    pids = tmp_path / "pids"
    subject = server(f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')" + DOUBLE)
    check_loader(subject.spec, formats=["kohya"], benches=["clip-text"], max_examples=1, limits=Limits(workers=0))
    (pid,) = set(pids.read_text().split())
    assert not lives(pid)
