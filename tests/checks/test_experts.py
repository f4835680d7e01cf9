"""Experts whose matrices are stacked in one parameter: PEFT is right, and what others make of their files is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from harness import Verdict, bench, check_loader, loader
from harness.errors import UserError
from harness.files import read_lora, write_lora
from harness.files.adapter import LoraParts
from harness.isolation.limits import Limits
from harness.loaders.benches import bench_name


class Experts(nn.Module):
    """Three experts, of which every token is given to all: [3, 10, 6] up, [3, 6, 10] down, or each turned."""

    def __init__(self, *, turned: bool) -> None:
        super().__init__()
        self.is_transposed = turned
        shapes = ((3, 6, 10), (3, 10, 6)) if turned else ((3, 10, 6), (3, 6, 10))
        self.up, self.down = (nn.Parameter(torch.randn(shape) / 3) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return (torch.tanh(x @ up) @ down).sum(0)


class Model(nn.Module):
    def __init__(self, *, turned: bool) -> None:
        super().__init__()
        self.inlet, self.experts = nn.Linear(6, 6), Experts(turned=turned)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.experts(self.inlet(x))
        return answer


def run(model: nn.Module) -> Tensor:
    answer: Tensor = model(torch.randn(4, 6))
    return answer


@bench("stacked", run=run, experts=("experts.up", "down"))
def stacked() -> nn.Module:
    return Model(turned=False)


@bench("stacked-turned", run=run, experts=("experts.up", "down"))
def turned() -> nn.Module:
    return Model(turned=True)


def judged(load: Callable[..., object] | str, *benches: Callable[[], nn.Module]) -> list[Verdict]:
    here = Limits(workers=0)
    found = check_loader(load, formats=["peft"], benches=benches, variants=["experts"], max_examples=4, limits=here)
    return [verdict for verdict in found if verdict.outcome != "passed"]


@pytest.mark.parametrize("name", ["peft", "peft-runtime"])
def test_peft_is_right_however_the_experts_are_stored(name: str) -> None:
    assert judged(name, stacked, turned) == []


def merging(change: Callable[[Tensor, int], Tensor] = lambda delta, rank: delta) -> Callable[..., None]:
    """Return a loader that merges what `change` makes of the deltas [experts, out, in] at the trained scale."""

    @loader(formats={"peft"}, variants={"experts"})
    def load(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        adapter = read_lora(lora)
        for name, module in adapter.modules.items():
            if adapter.unused_keys or module.variant != "experts":
                raise NotImplementedError("only experts are supported")
            a, b = (half.double() for half in adapter.tensors(name))
            weight = model.get_parameter(name)
            weight += (strength * module.trained_scale * change(b @ a, module.rank)).to(weight.dtype)  # type: ignore[operator]

    return load


WRONG = {
    "LH201": lambda delta, rank: delta * rank,
    "LH208": lambda delta, rank: delta / len(delta),
    "LH302": lambda delta, rank: delta.flip(0),
    "LH101": lambda delta, rank: delta * 0,
}


def test_a_right_merge_passes() -> None:
    assert judged(merging(), stacked) == []


@pytest.mark.parametrize("code", WRONG)
def test_a_wrong_merge_is_named(code: str) -> None:
    assert code in {verdict.code for verdict in judged(merging(WRONG[code]), stacked)}


def test_halves_that_are_cut_in_the_other_order_are_named() -> None:
    def load(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        adapter = read_lora(lora)
        for name, module in adapter.modules.items():
            a, b = (half.double() for half in adapter.tensors(name))
            flat = b.permute(1, 2, 0).reshape(b.shape[1], -1)  # as it is stored: [out, rank * experts]
            b = flat.reshape(len(flat), module.experts, -1).movedim(1, 0)
            weight = model.get_parameter(name)
            weight += (strength * module.trained_scale * b @ a).to(weight.dtype)  # type: ignore[operator]

    (found,) = judged(loader(formats={"peft"}, variants={"experts"})(load), stacked)
    assert (found.code, "B is cut by expert" in found.title) == ("LH304", True)


def test_what_is_added_beside_the_parameters_is_not_judged() -> None:
    @loader(formats={"peft"}, variants={"experts"})
    def load(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
        model.get_submodule("experts").register_forward_hook(lambda module, args, answer: 1.5 * answer)

    (found,) = judged(load, stacked)
    assert (found.code, found.outcome) == ("LH902", "errored")
    assert "cannot be read, and is not judged" in found.title


def test_a_file_of_stacked_experts_is_read_as_it_was_written(tmp_path: Path) -> None:
    pairs = {"m.experts.up": (10, 6), "m.experts.down": (6, 10)}
    modules = {
        name: LoraParts({"A": torch.randn(3 * rank, columns), "B": torch.randn(rows, rank * 3)}, 4.0, experts=3)
        for rank, (name, (rows, columns)) in enumerate(pairs.items(), 2)
    }
    read = read_lora(write_lora(tmp_path / "adapter", "peft", modules))
    assert {name: (m.rank, m.experts, m.alpha) for name, m in read.modules.items()} == {
        "m.experts.up": (2, 3, 4.0),
        "m.experts.down": (3, 3, 4.0),
    }
    assert not read.problems
    with pytest.raises(ValueError, match="a kohya file has no stacked experts, only peft"):
        write_lora(tmp_path / "x", "kohya", modules)


def test_experts_that_are_none_are_told() -> None:
    wrong = bench("wrong", run=run, experts="experts.gate")(lambda: Model(turned=False))
    with pytest.raises(
        UserError, match=r"'experts\.gate' is the end of no parameter of three .*: experts\.up, experts\.down"
    ):
        bench_name(wrong)
    with pytest.raises(UserError, match="experts need run="):
        bench("wrong", experts=("experts.up",))
    with pytest.raises(UserError, match="are no ends of paths"):
        bench("wrong", run=run, experts=("",))
