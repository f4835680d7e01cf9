"""Own benches whose layers are no plain ones: codes, weights of a library or a loader, a factor beside the weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from harness import bench, check_loader, loader
from harness.benches import get_bench
from harness.files import LoraModule
from harness.loaders.benches import bench_name
from harness.measure.effective import numbers_of
from tests.checks.sample_loaders import only_pairs, pairs

from .conftest import HERE, codes

pytestmark = pytest.mark.usefixtures("no_own_benches")


class Halved(nn.Linear):
    """A layer with a factor beside its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(x)


@bench("halved", run=lambda model: model(torch.ones(2, 8)))
def halved() -> nn.Module:
    return nn.Sequential(Halved(8, 8), nn.Tanh(), nn.Linear(8, 4))


TWO = ("lora", "dora")  # an update that is added, and one that takes the base's weight into it


def test_a_layer_that_computes_with_a_factor_beside_its_weight_is_not_measured_and_said() -> None:
    assert codes("peft", benches=[halved], variants=TWO) <= {"LH103"}
    told = list(get_bench("halved").measures(("2",)))
    assert any("not measured: 0: it computes with another matrix than its weight" in line for line in told)


def test_a_layer_of_one_column_or_three_weights_is_not_measured_and_small_ones_are_right() -> None:
    def small() -> nn.Module:
        return nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 2), nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(1, 1))

    mine = bench("small", run=lambda model: model(torch.ones(2, 1)))(small)
    assert codes("peft", benches=[mine], variants=TWO) <= {"LH103"}
    told = list(get_bench("small").measures(("1", "2")))
    assert [line.partition("not measured: ")[2] for line in told if "too few weights" in line] == [
        "0, 3, 4: it has too few weights to tell one LoRA from another"
    ]


def undrawn() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model[0].weight.data[0, 0] = float("nan")
    return model


def test_a_weight_that_is_no_number_is_not_measured_and_nobody_has_changed_it() -> None:
    mine = get_bench(bench_name(undrawn, model=True))
    said = list(mine.measures(mine.view.lora_layers))
    assert said[0].endswith("1 of 1 layers take a LoRA: 1")
    assert any(line.endswith("not measured: 0: its weights are not finite") for line in said)
    assert "LH401" not in codes("peft", benches=[bench("undrawn")(undrawn)], formats=["peft"], variants=["lora"])


@bench("in-a-row", run=lambda model: model(torch.ones(2, 16)))
def in_a_row() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))


class Beside(nn.Module):
    """A layer and its LoRA, whose own weights, in float32, come first."""

    def __init__(self, layer: nn.Module, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.a, self.b = layer, nn.Parameter(a.float()), nn.Parameter(b.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.layer(x)
        return answer + (x.float() @ self.a.T @ self.b.T).to(answer.dtype)


@loader(formats={"peft"}, benches={in_a_row})
def wraps(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    adapter = only_pairs(lora)
    for name, module in adapter.modules.items():
        a, b = adapter.tensors(name)
        model.set_submodule(name, Beside(model.get_submodule(name), a, strength * module.trained_scale * b.float()))


def test_a_loader_whose_own_weights_come_first_in_another_dtype_is_not_blamed() -> None:
    assert codes(wraps) == set()


class Stiff(torch.Tensor):
    """Weights of a library that cannot make others of their kind."""

    def new_empty(self, *size: object, **how: object) -> torch.Tensor:  # type: ignore[override]
        raise NotImplementedError("no new_empty")


def test_what_goes_into_a_layer_of_a_librarys_own_weights_is_plain() -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Stiff), requires_grad=False)
    assert numbers_of(layer, torch.bfloat16).dtype == torch.bfloat16


class Reused(nn.Module):
    """A layer under two names, a complex one, and one whose weight another parameter is."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.waves = nn.Linear(8, 8, dtype=torch.complex64)
        self.out = nn.Linear(8, 4)
        self.free = nn.ParameterList([self.out.weight])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.out(self.waves(self.again(self.first(x)).to(torch.complex64)).abs())
        return answer


@bench("reused", run=lambda model: model(torch.randn(2, 8)))
def reused() -> nn.Module:
    return Reused()


def test_other_names_of_a_layer_and_complex_ones_are_no_layers_of_their_own() -> None:
    assert codes("peft", benches=[reused], variants=TWO) <= {"LH103"}
    known = get_bench("reused")
    assert list(known.layers) == ["first", "out"]
    told = list(known.measures(()))
    assert "again is first once more: what a loader does under that name is not measured" in told
    assert any(line.startswith("not measured, only looked at for being changed: waves.weight") for line in told)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_model_that_hangs_on_a_graph_is_copied_all_the_same() -> None:
    def old_weight_norm() -> nn.Module:
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 4))

    mine = get_bench(bench_name(bench("normed")(old_weight_norm)))
    assert mine.base(torch.bfloat16)[0].weight_g.dtype == torch.bfloat16
    assert torch.equal(mine.build()[0].weight_v, mine.base()[0].weight_v)


class Codes(nn.Linear):
    """A linear layer whose weight is eight-bit codes with a scale per row."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(columns, rows, bias=False)
        whole = self.weight.detach()
        self.register_buffer("step", torch.empty(rows, 1))
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=torch.int8), requires_grad=False)
        self.put(whole)

    def whole(self) -> torch.Tensor:
        return self.weight.float() * self.step  # type: ignore[operator]

    def put(self, whole: torch.Tensor) -> None:
        self.step.copy_(whole.abs().amax(1, keepdim=True) / 127)  # type: ignore[operator]
        self.weight.copy_((whole / self.step).round().to(torch.int8))  # type: ignore[operator]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.whole())


@bench("codes", run=lambda model: model(torch.randn(2, 24)))
def codes_model() -> nn.Module:
    return nn.Sequential(Codes(32, 24), nn.Tanh(), Codes(24, 32), nn.Linear(24, 24))


def put(model: nn.Module, lora: Path, factor: Callable[[LoraModule], float]) -> None:
    for layer, module, product, _ in pairs(model, lora):
        if isinstance(layer, Codes):
            layer.put(layer.whole() + factor(module) * product)
        else:
            layer.weight += factor(module) * product


@loader(formats={"peft"}, benches={codes_model}, variants={"lora", "rslora"})
def merges_into_codes(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    put(model, lora, lambda module: strength * module.trained_scale)


@loader(formats={"peft"}, benches={codes_model}, variants={"lora", "rslora"})
def raw_alpha_into_codes(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    put(model, lora, lambda module: strength * (module.alpha or 1.0))


@loader(formats={"peft"}, benches={codes_model}, variants={"lora", "rslora"})
def beside_codes(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    for layer, module, product, _ in pairs(model, lora):
        delta = strength * module.trained_scale * product
        layer.register_forward_hook(lambda layer, args, out, d=delta: out + args[0] @ d.T.to(out))


def test_a_merge_into_codes_is_right_and_one_beside_them_too() -> None:
    assert codes(merges_into_codes) == codes(beside_codes) == set()
    bench_of_codes = get_bench("codes")
    assert [layer.codes for layer in bench_of_codes.layers.values()] == ["int8", "int8", ""]
    assert (bench_of_codes.dtypes, bench_of_codes.copies) == (("float32",), False)


def test_a_wrong_law_shows_through_codes() -> None:
    assert "LH201" in codes(raw_alpha_into_codes)


class Counting(nn.Module):
    """A model that changes buffers, and an embedding's rows, whenever it runs."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(9, 24, max_norm=0.5), nn.Linear(24, 24)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.steps.add_(1)
        return self.layer(self.words(tokens))  # type: ignore[no-any-return]


class Turned(nn.Linear):
    """A layer that stores its weight as [in, out]."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        self.weight = nn.Parameter(self.weight.detach().T.contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


@bench("counting", run=lambda model: model(torch.tensor([[1, 5, 2]])))
def counting() -> nn.Module:
    return Counting()


@bench("normed", run=lambda model: model(torch.ones(2, 24)))
def normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(24, 32)), nn.Tanh(), nn.Linear(32, 24))


@bench("turned", run=lambda model: model(torch.ones(2, 16)))
def turned() -> nn.Module:
    return nn.Sequential(Turned(16, 24), nn.Linear(24, 16))


@loader(formats={"peft"}, variants={"lora", "rslora"})
def assigns(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    for layer, module, product, _ in pairs(model, lora):
        merged = layer.weight.detach() + (strength * module.trained_scale * product).to(layer.weight.dtype)
        layer.weight = merged if hasattr(layer, "parametrizations") else nn.Parameter(merged, requires_grad=False)


@pytest.mark.parametrize("model", [counting, normed], ids=["counting", "normed"])
def test_a_right_loader_is_right_on_a_model_that_changes_or_computes_what_it_holds(
    model: Callable[[], nn.Module],
) -> None:
    assert codes(assigns, benches=[model]) == set()


def test_what_stores_its_weight_the_other_way_is_left_out_and_the_model_is_taken() -> None:
    assert codes(assigns, benches=[turned]) == set()
    assert any("not measured: 0: it computes with another matrix" in line for line in get_bench("turned").measures(()))


class Attention(nn.Module):
    """`nn.MultiheadAttention` reads the weight of its `out_proj` without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.last(x + self.attention(x, x, x, need_weights=False)[0])
        return answer


@bench("attention", run=lambda model: model(torch.linspace(-1, 1, 64).reshape(1, 4, 16)))
def attention() -> nn.Module:
    return Attention()


@loader(formats={"kohya"})
def by_hooks(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    for layer, module, product, _ in pairs(model, lora):
        delta = strength * module.trained_scale * product.double()
        layer.register_forward_hook(lambda _, x, y, d=delta: y + (x[0].double() @ d.T).to(y.dtype))


class Faint(nn.Module):
    """Uses the weight of `step` by itself, which changes what it answers by far less than `last` does."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.last(x) + 1e-3 * torch.tanh(x @ self.step.weight.T)
        return answer


@bench("faint", run=lambda model: model(torch.linspace(-1, 1, 64).reshape(4, 16)))
def faint() -> nn.Module:
    return Faint()


def test_a_hook_that_never_runs_is_found_however_little_its_layer_does() -> None:
    (wrong,) = [v for v in check_loader(by_hooks, benches=[faint], max_examples=5, limits=HERE) if v.code == "LH102"]
    assert "whose forward does not call step" in wrong.text()
    assert codes("peft", benches=[faint], variants=TWO) <= {"LH103"}


def test_a_hook_on_a_layer_that_is_never_called_is_no_effect_and_the_layer_is_named() -> None:
    told = check_loader(by_hooks, benches=[attention], max_examples=5, limits=HERE)
    (wrong,) = [verdict for verdict in told if verdict.code == "LH102"]
    assert "whose forward does not call attention.out_proj" in wrong.text()
    measured = get_bench("attention").measures(("last",))
    assert any(line.startswith("its forward does not call attention.out_proj: a hook there") for line in measured)
    assert codes("peft", benches=[attention], variants=TWO) <= {"LH103"}


@bench("normed", run=lambda model: model(torch.linspace(-1, 1, 64).reshape(4, 16)))
def normed() -> nn.Module:
    """Give a model whose weight is another of unit norm times a magnitude, computed anew whenever it is read."""
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)))


@loader(formats={"peft"}, variants={"lora"})
def into_weight(model: nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    for layer, module, product, _ in pairs(model, lora):
        layer.weight.data.add_(strength * module.trained_scale * product)


def test_a_write_to_a_computed_weight_is_lost_and_the_cause_says_so() -> None:
    (lost,) = [v for v in check_loader(into_weight, benches=[normed], max_examples=3, limits=HERE) if v.code == "LH101"]
    assert "cause      the weight of these layers is computed from other parameters" in lost.text()
