"""Fused experts (PEFT's `target_parameters`; vllm#41754) that PEFT merged, judged per expert; and an alpha of 0."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from harness.doctor import inspect_file, verify_merge  # noqa: E402
from harness.doctor.verify.verify import MergeReport  # noqa: E402

EXPERTS, WIDE, NARROW = 4, 48, 24
State = dict[str, Tensor]


class _Experts(nn.Module):
    """Parameters [experts, out, in], or [experts, in, out] with `turned`."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        shapes = {"gate_up_proj": (2 * NARROW, WIDE), "down_proj": (WIDE, NARROW)}
        for name, (out, into) in shapes.items():
            shape = (EXPERTS, into, out) if turned else (EXPERTS, out, into)
            setattr(self, name, nn.Parameter(0.02 * torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return x


class _Model(nn.Module):
    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": _Experts(turned)}) for _ in range(2))
        self.config = {"model_type": "mixture"}

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture(scope="module", params=[False, True], ids=["out-in", "in-out"])
def merge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State, State]:
    """Return the LoRA that PEFT saved, the weights of the base, and those of PEFT's own merge."""
    torch.manual_seed(0)
    model, folder = _Model(request.param), tmp_path_factory.mktemp("experts")
    base = copy.deepcopy(model.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=8, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    return folder, base, adapted.merge_and_unload().state_dict()


def _one_expert(base: State, good: State, expert: int, change: Callable[[Tensor, Tensor], Tensor]) -> State:
    found = {name: tensor.clone() for name, tensor in good.items()}
    name = "layers.1.experts.gate_up_proj"
    found[name][expert] = change(base[name][expert], good[name][expert])
    return found


WRONG: Mapping[str, Callable[[State, State], State]] = {
    "dropped": lambda base, good: base,
    "doubled": lambda base, good: {name: 2 * good[name] - base[name] for name in good},
    "one expert left out": lambda base, good: _one_expert(base, good, 2, lambda before, after: before),
    "one expert doubled": lambda base, good: _one_expert(base, good, 0, lambda before, after: 2 * after - before),
    "one expert not finite": lambda base, good: _one_expert(base, good, 3, lambda before, after: after * torch.nan),
    "experts exchanged": lambda base, good: {name: base[name] + (good[name] - base[name]).flip(0) for name in good},
}


def _report(lora: Path, base: State, merged: State, folder: Path, dtype: torch.dtype, *, full: bool) -> MergeReport:
    for name, state in (("base", base), ("merged", merged)):
        save_file({key: t.to(dtype).contiguous() for key, t in state.items()}, folder / f"{name}.safetensors")
    return verify_merge(folder / "base.safetensors", folder / "merged.safetensors", lora, full=full)


def _verified(lora: Path, base: State, merged: State, folder: Path, dtype: torch.dtype) -> int:
    return _report(lora, base, merged, folder, dtype, full=True).exit_code


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("one expert doubled", "LH206", "the update is not once in every expert: 0 2 times"),
        ("experts exchanged", "LH104", "experts hold the updates of others: 0 that of 3, 1 that of 2"),
        ("one expert left out", "LH102", "1 expert (2)"),
    ],
)
def test_what_went_wrong_among_experts_is_named(
    merge: tuple[Path, State, State], fault: str, code: str, words: str, dtype: torch.dtype, full: bool, tmp_path: Path
) -> None:
    lora, base, good = merge
    report = _report(lora, base, WRONG[fault](base, good), tmp_path, dtype, full=full)
    assert report.overall.code == code, report.overall.text()
    assert words in report.overall.title


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_s_own_merge_of_experts_is_right(
    merge: tuple[Path, State, State], dtype: torch.dtype, tmp_path: Path
) -> None:
    lora, base, good = merge
    record = inspect_file(lora)
    assert (record.variants, record.ranks, record.hazards) == ({"experts": 4}, {"4": 4}, ())
    assert _verified(lora, base, good, tmp_path, dtype) == 0


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_merge_of_experts_is_found(merge: tuple[Path, State, State], fault: str, tmp_path: Path) -> None:
    lora, base, good = merge
    assert _verified(lora, base, WRONG[fault](base, good), tmp_path, torch.float32) == 1


@pytest.mark.parametrize(("alpha", "code"), [(None, 3), (8.0, 0), (32.0, 1)])
def test_an_alpha_of_0_is_not_judged_until_it_is_given(alpha: float | None, code: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    layer, lora = "model.layers.0.q_proj", tmp_path / "lora"
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((32, 32), (4, 32), (32, 4)))
    lora.mkdir()
    halves = {"lora_A": a, "lora_B": 0.1 * b}
    save_file(
        {f"base_model.model.{layer}.{half}.weight": t for half, t in halves.items()}, lora / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 0, "target_modules": ["q_proj"]}
    (lora / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({f"{layer}.weight": weight}, tmp_path / "base.safetensors")
    save_file({f"{layer}.weight": weight + 2 * halves["lora_B"] @ a}, tmp_path / "merged.safetensors")
    files = (tmp_path / "base.safetensors", tmp_path / "merged.safetensors", lora)
    assert verify_merge(*files, lora_alpha=alpha).exit_code == code
    assert load_file(lora / "adapter_model.safetensors").keys()


class _Square(nn.Module):
    """Square experts alone; `is_transposed` is how transformers' classes say that they lie as [experts, in, out]."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.down_proj = nn.Parameter(0.02 * torch.randn(EXPERTS, WIDE, WIDE))
        self.experts.is_transposed = turned
        self.config = {"model_type": "mixture"}

    def forward(self, x: Tensor) -> Tensor:
        return x


def _square(folder: Path, *, turned: bool, model: str | None, version: str | None) -> tuple[Path, State, State]:
    torch.manual_seed(0)
    base_model = _Square(turned)
    base = copy.deepcopy(base_model.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=["experts.down_proj"])
    adapted = peft.get_peft_model(base_model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder / "lora")
    path = folder / "lora" / "adapter_config.json"
    said = {**json.loads(path.read_text(encoding="utf-8")), "peft_version": version}
    path.write_text(json.dumps({key: value for key, value in said.items() if value is not None}), encoding="utf-8")
    if model:
        (folder / "config.json").write_text(json.dumps({"model_type": model}), encoding="utf-8")
    return folder / "lora", base, adapted.merge_and_unload().state_dict()


# how the parameter lies, the model's type, PEFT's version: the code of PEFT's own merge, and of the transposed one
SQUARES = [
    (False, "mixture", peft.__version__, 0, 1),
    (True, "gpt_oss", peft.__version__, 0, 1),
    (True, "mixture", "0.18.1", 0, 1),
    (False, "gpt_oss", peft.__version__, 1, 0),
    (False, None, peft.__version__, 3, 3),
    (False, "mixture", None, 3, 3),
    (False, "qwen3_vl_moe", peft.__version__, 3, 3),
]


@pytest.mark.parametrize(("turned", "model", "version", "right", "other"), SQUARES)
def test_square_experts_are_judged_where_peft_s_rule_tells_how_they_lie(
    turned: bool, model: str | None, version: str | None, right: int, other: int, tmp_path: Path
) -> None:
    lora, base, good = _square(tmp_path, turned=turned, model=model, version=version)
    swapped = {name: base[name] + (good[name] - base[name]).transpose(1, 2) for name in good}
    for merged, code in ((good, right), (swapped, other)):
        assert _verified(lora, base, merged, tmp_path, torch.float32) == code
    assert _verified(lora, base, base, tmp_path, torch.float32) == 1
    strange = {name: base[name] + 0.01 * torch.randn_like(base[name]) for name in base}
    assert _verified(lora, base, strange, tmp_path, torch.float32) == 1


def test_a_transposed_merge_of_square_experts_is_called_so(tmp_path: Path) -> None:
    lora, base, good = _square(tmp_path, turned=False, model="mixture", version=peft.__version__)
    for name, state in (
        ("base", base),
        ("merged", {name: base[name] + (good[name] - base[name]).transpose(1, 2) for name in good}),
    ):
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / f"{name}.safetensors")
    report = verify_merge(tmp_path / "base.safetensors", tmp_path / "merged.safetensors", lora)
    assert (report.overall.code, "transposed" in report.overall.title) == ("LH301", True)
