"""Every named cause is tested against the counterexample; what nothing explains is said to be unexplained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness import check_loader
from harness.checks.cell import Cell
from harness.checks.families.direction import check_direction
from harness.checks.families.numerics import check_numerics
from harness.checks.families.scale import _ratio
from harness.checks.law import measure_law
from harness.checks.observation import Observation, observation_of
from harness.checks.unloaded import base_weights
from harness.example import Example, Target
from harness.loaders.registry import resolve
from tests.checks.sample_loaders import loader_with, no_effect, pairs, right

NAMES = ("transformer_blocks.0.img_mod.1", "transformer_blocks.1.img_mod.1")


def seen_with(change: Callable[[Tensor, Tensor], Tensor], variant: str = "lora", form: str = "kohya") -> Observation:
    """Return the observation of a load that makes change(product of the module, product of the other) of each layer."""
    cell = Cell(resolve(right), form, "qwen-image", variant)
    example = Example(tuple(Target(name, 4, 8.0) for name in NAMES))
    before = cell.view.gather(base_weights(cell.bench, "float32"))
    updates = cell.variant.updates(example, cell.view, before)
    first, second = (updates[name].direction.product for name in NAMES)
    after = dict(before)
    after[NAMES[0]] = before[NAMES[0]] + change(first, second)
    after[NAMES[1]] = before[NAMES[1]] + 2 * second
    return observation_of(cell, example, updates, before, after)


def noise(product: Tensor, other: Tensor) -> Tensor:
    drawn = torch.randn(product.shape, generator=torch.Generator().manual_seed(3)).double()
    return drawn * product.norm() / drawn.norm()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (noise, "LH306", "nothing that is known explains it"),
        (lambda own, other: 2 * own.T.reshape(own.shape), "LH301", "transposed"),
        (lambda own, other: 2 * own.roll(len(own) // 2, 0), "LH302", "blocks of rows"),
        (lambda own, other: 2 * torch.cat([own.chunk(3)[i] for i in (0, 2, 1)]), "LH302", "blocks of rows"),
        (lambda own, other: 2 * own.flip(0), "LH302", "rows stand in another order"),
        (lambda own, other: 2 * other, "LH104", "another module"),
        (lambda own, other: 2 * own + 1.5 * other, "LH104", "other modules is in it"),
    ],
)
def test_a_direction_has_the_name_that_explains_it(
    change: Callable[[Tensor, Tensor], Tensor], code: str, words: str
) -> None:
    (found,) = check_direction(seen_with(change))
    assert (found.code, found.modules) == (code, (NAMES[0],))
    assert words in found.fact


def fewer_components(own: Tensor, other: Tensor) -> Tensor:
    left, sizes, right = torch.linalg.svd(own, full_matrices=False)
    return 2 * left[:, :2] @ torch.diag(sizes[:2]) @ right[:2]


def test_a_lower_rank_is_no_weighting_of_components_and_other_rows_of_a_layer_are_no_other_module() -> None:
    (found,) = check_direction(seen_with(fewer_components))
    assert (found.code, "components are left out" in found.fact) == ("LH304", True)
    seen = seen_with(lambda own, other: 2 * other)
    (found,) = check_direction(replace(seen, hosts=dict.fromkeys(NAMES, "one layer")))
    assert (found.code, "of other rows of the same layer" in found.fact) == ("LH302", True)


@pytest.mark.parametrize(
    ("change", "code"), [(lambda b, a: b.flip(0) @ a, "LH302"), (lambda b, a: b.abs() @ a, "LH306")]
)
def test_rows_of_rank_one_are_moved_only_where_each_is_found(
    change: Callable[[Tensor, Tensor], Tensor], code: str
) -> None:
    drawn = torch.Generator().manual_seed(5)
    b, a = (torch.randn(*shape, generator=drawn).double() for shape in ((288, 1), (1, 48)))
    seen = seen_with(lambda own, other: change(b, a))
    seen = replace(seen, products={**seen.products, NAMES[0]: b @ a})
    (found,) = check_direction(seen)
    assert found.code == code


def test_what_an_earlier_file_holds_is_named_so() -> None:
    seen = seen_with(noise)
    old = seen.changes[NAMES[0]]
    (found,) = check_direction(replace(seen, earlier={NAMES[0]: [old[:, :3], -0.5 * old]}))
    assert found.code == "LH408"
    (found,) = check_direction(replace(seen, earlier={NAMES[1]: [old]}))
    assert found.code == "LH306"


def test_a_ratio_never_reads_as_right() -> None:
    assert (_ratio(0.5), _ratio(2.0), _ratio(-1.0)) == ("0.500", "2.000", "-1.000")
    assert _ratio(1.0004) == "1.0004"
    assert _ratio(0.99999997) == "0.99999997"


def test_a_loader_that_does_nothing_is_said_to_do_nothing() -> None:
    measured = measure_law(no_effect, format="kohya")
    assert measured.diagnosis.code == "LH101"
    assert str(measured) == "no law of the grammar (LH101 LoRA has no effect)"
    assert len(repr(measured)) < 200


@pytest.mark.parametrize(
    ("scale", "code", "words"),
    [
        (lambda u, m, every: u * min(m.trained_scale, 1.5), "LH205", "alpha / rank beyond 1.5"),
        (
            lambda u, m, every: u * {x.rank: x.rank if x.alpha is None else x.alpha for x in every}[m.rank] / m.rank,
            "LH204",
            "modules of one rank differ in alpha",
        ),
    ],
)
def test_a_cap_and_an_alpha_kept_by_rank_have_names_of_their_own(scale: object, code: str, words: str) -> None:
    found = measure_law(loader_with(scale), format="kohya").diagnosis  # type: ignore[arg-type]
    assert found.code == code
    assert words in str(found.trait)


def test_a_constant_over_the_square_of_the_rank_is_not_the_most_common_rank() -> None:
    found = measure_law(loader_with(lambda u, m, every: 4 * u * (m.alpha or 0.0) / m.rank**2), format="kohya").diagnosis
    assert found.law is not None
    assert found.law.formula == "4 * strength * alpha / rank^2"


CONFIG = """
import json
import torch
from safetensors.torch import load_file

@torch.no_grad()
def load(model, lora, *, strength=1.0):
    config = json.loads((lora / "adapter_config.json").read_text())
    tensors = load_file(lora / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]  # the patterns are never read
    for key in (key for key in tensors if key.endswith("lora_A.weight")):
        layer = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        product = tensors[key.replace("lora_A", "lora_B")].float() @ tensors[key].float()
        layer.weight.add_((strength * scale * product).to(layer.weight.dtype))
"""


def test_the_defaults_of_a_configuration_for_every_module_are_named_on_random_files_too(tmp_path):
    """Values that are equally common in a file are told apart by their order, for the configuration and the law."""
    (tmp_path / "mine.py").write_text(CONFIG)
    found = check_loader(f"{tmp_path / 'mine.py'}:load", formats=["peft"], benches=["qwen-image"], max_examples=20)
    scale = next(verdict for verdict in found if verdict.check == "scale")
    assert (scale.outcome, scale.code) == ("failed", "LH204")


def weighted(product: Tensor) -> Tensor:
    """Return B @ A whose components have weights of their own, all near 1."""
    b, sizes, a = torch.linalg.svd(product.double(), full_matrices=False)
    return (b[:, :4] * sizes[:4] * torch.tensor([1.0, 1.04, 0.97, 1.02])) @ a[:4]


def half_of_a(product: Tensor) -> Tensor:
    """Return B @ A with A rounded to bfloat16."""
    b, sizes, a = torch.linalg.svd(product.double(), full_matrices=False)
    return (b[:, :4] * sizes[:4]) @ a[:4].bfloat16().double()


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        (lambda own, other: 2 * torch.cat([own[:-1], 0 * own[-1:]]), [("direction", "LH304")]),
        (lambda own, other: 2 * torch.cat([own[:, :-1], 0 * own[:, -1:]], 1), [("direction", "LH304")]),
        (lambda own, other: 2 * weighted(own), [("direction", "LH304")]),
        (lambda own, other: 2 * own.bfloat16().double(), [("numerics", "LH501")]),
        (lambda own, other: 2 * half_of_a(own), [("numerics", "LH501")]),
        (lambda own, other: 2 * (own.float() * (own.abs() > own.abs().max() / 50)).double(), [("numerics", "LH501")]),
    ],
)
def test_a_row_that_is_left_out_or_weighted_is_no_loss_of_precision(
    change: Callable[[Tensor, Tensor], Tensor], codes: list[tuple[str, str]]
) -> None:
    seen = seen_with(change)
    found = [*check_direction(seen), *check_numerics(seen)]
    assert [(finding.family, finding.code) for finding in found] == codes
    assert all(finding.modules == (NAMES[0],) for finding in found)


KEPT: dict[str, dict[str, Tensor]] = {}


def stale_and_alpha_ignored(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    found = {module.name: (layer, product) for layer, module, product, _ in pairs(model, lora)}
    kept = KEPT.setdefault(str(lora), {name: product for name, (_, product) in found.items()})
    for name, (layer, product) in found.items():
        layer.weight += (strength * kept.get(name, product)).to(layer.weight.dtype)


def test_a_law_that_every_scale_follows_is_told_beside_a_file_that_comes_back() -> None:
    verdicts = check_loader(stale_and_alpha_ignored, formats=["peft"], benches=["qwen-image"], max_examples=5)
    assert {"LH202", "LH408"} <= {v.code for v in verdicts}
    assert not any(v.title.startswith("scale right") for v in verdicts)
