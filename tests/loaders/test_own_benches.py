"""A bench of one's own: what a function builds is looked at in a child, and what cannot be used is one sentence."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from harness import UserError, bench, loader
from harness.benches import get_bench, own_benches
from harness.checks.cell import cells_of
from harness.loaders.benches import bench_name, spec_of
from harness.loaders.registry import resolve
from tests.checks.sample_loaders import only_pairs

from .conftest import codes

pytestmark = pytest.mark.usefixtures("no_own_benches")


class Attention(nn.Module):
    """Unequal parts in one layer, a layer that begins at zero, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.qkv = nn.Linear(16, 32)
        self.gate = nn.Linear(16, 16)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.depth = nn.Conv2d(16, 16, 3, groups=16)
        self.scale = nn.Parameter(torch.ones(16))
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        q, k, v = self.qkv(hidden).split((16, 8, 8), -1)
        answer: torch.Tensor = self.head(self.scale * torch.tanh(self.gate(q + torch.cat([k, v], -1))))
        return answer


@bench(
    "attention",
    targets=("qkv", "gate"),
    run=lambda model: model(torch.tensor([[1, 2, 3]])),
    fused={"qkv": {"q": 16, "k": 8, "v": 8}},
)
def attention() -> nn.Module:
    return Attention()


@bench("renamed", targets=["qkv", "gate"], names={"qkv": "attn.in_proj"}, component="unet")
def renamed() -> nn.Module:
    return Attention()


def everything() -> nn.Module:
    return Attention()


def pairs(model: nn.Module, lora: Path, strength: float, rows: dict[str, tuple[str, int]]) -> None:
    adapter = only_pairs(lora)
    for name, module in adapter.modules.items():
        a, b = adapter.tensors(name)
        layer, start = rows.get(name, (name, 0))
        weight = model.get_submodule(layer).weight
        assert isinstance(weight, torch.Tensor)
        weight[start : start + len(b)] += (strength * module.trained_scale * b.float() @ a.float()).to(weight.dtype)


ROWS = {"q": ("qkv", 0), "k": ("qkv", 16), "v": ("qkv", 24)}


@loader(formats={"peft"}, benches={attention}, variants={"lora", "qkv-split", "rslora"})
def right(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    pairs(model, lora, strength, ROWS)


@loader(formats={"peft"}, benches={attention}, variants={"qkv-split"})
def swapped(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    pairs(model, lora, strength, {**ROWS, "k": ROWS["v"], "v": ROWS["k"]})


@loader(formats={"peft"}, variants={"lora", "rslora"})
def by_other_names(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    pairs(model, lora, strength, {"attn.in_proj": ("qkv", 0)})


def test_a_right_loader_of_one_s_own_model_passes_with_parts_of_unequal_height() -> None:
    assert codes(right) == set()


def test_a_loader_that_puts_v_where_k_belongs_is_found() -> None:
    assert codes(swapped) == {"LH302"}


def test_files_have_the_names_that_the_bench_says() -> None:
    assert codes(by_other_names, benches=[renamed]) == set()
    (cell,) = cells_of(resolve(by_other_names), benches=[renamed], variants=["lora"])[0]
    assert cell.targets == ("attn.in_proj", "gate")


def test_a_layer_that_begins_at_zero_has_weights_and_every_build_the_same() -> None:
    mine = get_bench(bench_name(attention))
    first, second = (mine.build().get_submodule("gate") for _ in range(2))
    assert first.weight.any()
    assert first.bias.any()
    assert torch.equal(first.weight, second.weight)


def test_what_is_measured_is_said_and_what_is_not() -> None:
    mine = get_bench(bench_name(everything, model=True))
    assert mine.view.lora_layers == ("qkv", "gate")  # the head and the embedding are one tensor
    said = "\n".join(mine.measures(mine.view.lora_layers))
    for part in (
        "head shares its weight with embed: a merge into one changes both",
        "not measured, only looked at for being changed: depth.weight (grouped Conv2d)",
        "only looked at for being changed: 2 vectors (norms, biases)",
        "no forward is given",
    ):
        assert part in said


def endless() -> nn.Module:
    while True:
        time.sleep(1)


def test_a_function_that_never_returns_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.loaders.benches.BUILD_SECONDS", 1.0)
    with pytest.raises(UserError, match=r"endless: building it takes longer than 1 s$"):
        bench_name(endless, model=True)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 8))
        self.wide = nn.Conv1d(8, 8, 3, groups=2)
        self.head = nn.Linear(8, 8)


def test_stacks_that_may_be_experts_are_named_with_how_to_measure_them() -> None:
    mine = get_bench(bench_name(Experts, model=True))
    said = [line for line in mine.measures(mine.view.lora_layers) if "experts=" in line]
    assert [line.rpartition(": ")[2] for line in said] == ["up"]


def test_the_reproduce_line_names_the_bench_by_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my model.py").write_text("from torch import nn\ndef make(): return nn.Sequential(nn.Linear(4, 6))\n")
    monkeypatch.chdir(tmp_path)
    name = bench_name("my model.py:make", model=True)
    (cell,) = cells_of(resolve("peft"), ["peft"], [name], ["lora"])[0]
    line = cell.reproduce(__import__("harness.checks.plan", fromlist=["plan"]).smoke_example(cell, cell.targets))
    assert "--format peft --model 'my model.py:make' --rank 4" in line
    assert "my model.py:make" in own_benches()


def test_the_loader_s_file_is_named_where_the_bench_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\nfrom harness import bench, loader\n"
        "@bench('mine')\ndef make(): return nn.Sequential(nn.Linear(4, 6))\n"
        "@loader(formats={'peft'}, benches={make})\ndef load(model, lora, *, strength=1.0): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    subject = resolve("mine.py:load")
    assert (subject.benches, get_bench("mine").spec) == (("mine",), "mine.py:make")
    assert [cell.bench_name for cell in cells_of(subject)[0]] == ["mine"]


HEAD = "import os, sys\nimport torch\nfrom torch import nn\nfrom harness import bench\n"
HEAD += "def one(*args, **kwargs): return nn.Sequential(nn.Linear(*args, **kwargs))\n"
BAD = {
    "def make(): raise ValueError('no config')": "its function raises ValueError: no config",
    "def make(): sys.exit(3)": "its function raises SystemExit: 3",
    "def make(): os._exit(3)": "building it ended its process: the process ended with exit status 3",
    "def make(n): return one(4, 4)": r"its function raises TypeError: make\(\) missing 1 required",
    "def make(): return {'a': 1}": "its function returns dict, but should return a torch.nn.Module",
    "def make(): return nn.ReLU()": "the model has no weights",
    "def make(): return nn.LayerNorm(4)": "it has no linear layer, convolution or embedding, with a name",
    "def make(): return nn.Linear(60000, 50000)": "does not fit into the memory allowed",
    "def make(): return nn.Linear(6000, 6000)": "the model has 36,006,000 weights, a bench at most 30,000,000",
    "def make(): return one(4, 4, device='meta')": "its weights are on the device meta",
    "n = []\ndef make():\n n.append(one(4, 4))\n n[-1][0].weight.data[0] = len(n)\n return n[-1]": (
        "two calls of its function differ in 0.weight: draw its weights with torch"
    ),
    "m = one(4, 4)\ndef make(): return m": "two calls of its function return the same layers",
    "m = nn.Linear(4, 4)\ndef make(): return nn.Sequential(nn.Linear(4, 4), m)": "return the same layers",
    "def make(): return torch.jit.script(one(4, 4))": "returns a TorchScript module, whose layers cannot be changed",
    "def make(): return torch.compile(one(4, 4))": "returns a compiled model; return the model itself",
    "def make(): return nn.Sequential(nn.LazyLinear(4))": "it has lazy layers, which have no weights before they run",
    "def make():\n m = one(4, 4)\n m[0].weight.data[:] = float('nan')\n return m": (
        "none of its layers can be read: 0: its weights are not finite"
    ),
    "def make(): return nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64))": "its weights are complex64, not float",
    "make = 3": "is int, not a function that builds a model",
    "class make: pass": "is a class; a bench is a function that builds a model",
    "from mine import make": "cannot import name 'make' from partially initialized module",
    "def make(:": "is not valid Python: invalid syntax",
    "def other(): pass": r"has no 'make'; it defines (one, )?other",
    "@bench('x', targets=('to_q',))\ndef make(): return one(4, 4)": (
        r"targets: 'to_q' is the end of no layer's path \(0\)"
    ),
    "@bench('x', targets=())\ndef make(): return one(4, 4)": r"targets=\(\) names no layer",
    "@bench('x y')\ndef make(): return one(4, 4)": "a name has letters, digits, dots and dashes",
    "@bench('flux')\ndef make(): return one(4, 4)": "'flux' is the name of a bench of the harness",
    "@bench('x', fused={'0': {'q': 3}})\ndef make(): return one(4, 4)": ("the projections of '0' have 3 rows, 0 has 4"),
    "@bench('x', names={'1': 'y'})\ndef make(): return one(4, 4)": "names: '1' is in no layer's",
    "@bench('x', names={'0': ''})\ndef make(): return one(4, 4)": "nothing would be left of the name of '0'",
    "@bench('x', run=lambda m: m(torch.ones(5)))\ndef make(): return one(4, 4)": "its forward raises Runtime",
    "@bench('x', run=lambda m: m(torch.ones(4, dtype=torch.bfloat16)))\ndef make(): return one(4, 4)": (
        "in float32, not in bfloat16: give inputs no dtype"
    ),
    "@bench('x', run=lambda m: 'no')\ndef make(): return one(4, 4)": "returned str, but should return a tensor",
    "@bench('x', run=lambda m: m(torch.ones(4)) * float('nan'))\ndef make(): return one(4, 4)": "not finite",
    "@bench('x', run=lambda m: m(torch.ones(4)) + id(object()) % 97 + len(os.urandom(1)) * os.urandom(1)[0])\n"
    "def make(): return one(4, 4)": "answers the same input differently when it is run again",
}


@pytest.mark.parametrize(("text", "told"), BAD.items())
def test_what_cannot_be_used_is_one_sentence(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(f"{HEAD}{text}\n")
    with pytest.raises(UserError, match=told) as raised:
        bench_name("mine.py:make", model=True)
    assert "\n" not in str(raised.value)
    assert not own_benches()


def test_what_a_function_does_to_its_process_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        f"{HEAD}torch.set_grad_enabled(False)\ndef make():\n torch.set_default_dtype(torch.float64)\n os.chdir('/')\n"
        " torch.set_num_threads(1)\n return one(4, 4)\n"
    )
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), Path.cwd()
    model = get_bench(bench_name("mine.py:make", model=True)).build()
    assert before == (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), Path.cwd())
    assert model.get_submodule("0").weight.dtype == torch.float32


def test_a_function_without_bench_is_pointed_to_the_other_option(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no bench: put @bench"):
        bench_name(everything)
    with pytest.raises(UserError, match=r"names a file but no function; write .*mine.py:make"):
        bench_name(f"{tmp_path}/mine.py")


def test_two_benches_of_one_name_do_not_take_each_other_s_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(
            f"{HEAD}@bench('same')\ndef make(): return nn.Sequential(nn.Linear(4, 4))\n"
        )
    assert bench_name("a.py:make") == bench_name("a.py:make") == "same"
    with pytest.raises(UserError, match=r"b\.py:make and a\.py:make are both called 'same'"):
        bench_name("b.py:make")


def test_importing_a_bench_draws_nothing_after_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import torch\ntorch.randn(3)\ndef make(): return torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
    )
    mine = get_bench(bench_name("mine.py:make", model=True))
    assert mine.build()[0].weight.shape == (4, 4)  # it would say that it builds another model


@dataclasses.dataclass
class Answer:
    """What many models return."""

    loss: None
    sample: torch.Tensor


def test_what_a_model_returns_may_hold_its_tensor_in_a_dataclass_or_deeper() -> None:
    def run(model: nn.Module) -> Answer:
        return Answer(None, model(torch.ones(1, 4)))

    def deeper(model: nn.Module) -> dict[str, object]:
        return {"ids": torch.ones(2).long(), "hidden": [(None, model(torch.ones(1, 4)))]}

    for name, how in (("answers", run), ("deeper", deeper)):
        mine = get_bench(bench_name(bench(name, run=how)(lambda: nn.Sequential(nn.Linear(4, 6)))))
        assert mine.forward(mine.build()).shape == (1, 6)


def test_the_command_line_ends_with_2_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"{HEAD}def make(): return 3\n")
    line = [sys.executable, "-m", "harness", "check", "peft", "--model", "mine.py:make"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: bench mine.py:make: its function returns int, but should return a torch.nn.Module\n"


def test_a_function_is_named_by_its_file_or_its_module() -> None:
    assert spec_of(attention).endswith(":attention")


def test_a_scheme_that_there_is_not_and_a_library_that_is_missing_are_told() -> None:
    with pytest.raises(UserError, match="quantise='q9': no such scheme; known are nf4, fp4, int8"):
        bench_name(attention, quantise="q9")
    with pytest.raises(UserError, match=r"quantise='nf4': its blocks are 64 weights .* multiple of that \(16\)"):
        bench_name(attention, quantise="nf4")
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(UserError, match="bitsandbytes is not installed, or does not fit the installed torch"):
            bench_name(attention, quantise="int8")
