"""`inspect_file`: a record for every file, the hazards by name, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fixtures.build_malformed import CASES, FILE_CASES, HAZARD_CASES, Case, build, dotted, floats, kohya, tensors_file
from harness.doctor import FileRecord, inspect_file
from harness.files import LoraWeights, write_lora


def weights(rank: int, alpha: float | None, *, rows: int = 6, columns: int = 8) -> LoraWeights:
    return LoraWeights(torch.randn(rank, columns), torch.randn(rows, rank), alpha)


def codes(record: FileRecord) -> list[str]:
    return [hazard.code for hazard in record.hazards]


def what(record: FileRecord, code: str) -> str:
    found = [hazard.what for hazard in record.hazards if hazard.code == code]
    assert len(found) == 1, record.hazards
    return found[0]


def test_a_clean_file_is_described_without_hazards(tmp_path: Path) -> None:
    modules = {f"blocks.{i}.to_q": weights(4, 8.0) for i in range(3)}
    record = inspect_file(write_lora(tmp_path / "x", "kohya", modules, dtype=torch.bfloat16))
    assert (record.kind, record.format, record.modules, record.alpha_source) == ("file", "kohya", 3, "tensor")
    assert (record.ranks, record.alphas, record.dtypes) == ({"4": 3}, {"8": 3}, {"BF16": 3})
    assert (record.variants, record.components) == ({"lora": 3}, {"unet": 3})
    assert record.scales == {"alpha / rank": (2, 2), "alpha / sqrt(rank)": (4, 4), "alpha": (8, 8), "1": (1, 1)}
    assert (record.trained, record.coverage, record.hazards, record.energy) == ((2, 2), 1.0, (), None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_malformed_file_is_a_record_with_its_hazard(tmp_path: Path, case: Case) -> None:
    record = inspect_file(build(case, tmp_path))
    text = "\n".join(f"{hazard.code} {hazard.what}" for hazard in record.hazards)
    assert text.replace("\n", "").isprintable()
    if case in FILE_CASES and case.says:
        assert case.code in codes(record)
    elif case.code:
        assert case.code in codes(record), text
    if case in HAZARD_CASES:
        assert all(word in text for word in case.says), text
    json.loads(record.model_dump_json())


def test_hostile_metadata_is_shown_without_control_characters(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "hostile_metadata")
    record = inspect_file(build(case, tmp_path))
    assert set(record.metadata) == {"ss_output_name", "ss_session_id"}
    assert all(value.isprintable() for value in record.metadata.values())
    assert "<script>" in record.metadata["ss_output_name"]  # text is text: escaping is for whoever renders HTML


def test_long_metadata_is_cut_and_counted_out(tmp_path: Path) -> None:
    metadata = {f"key{i}": "v" for i in range(500)} | {"ss_output_name": "x" * 100_000, "ss_epoch": "9" * 100_000}
    (tmp_path / "x.safetensors").write_bytes(tensors_file(kohya(), metadata))
    record = inspect_file(tmp_path / "x.safetensors")
    assert len(record.metadata) <= 24
    assert len(record.metadata["ss_output_name"]) <= 200
    assert record.trainer == "kohya sd-scripts"


@pytest.mark.parametrize("format", ["kohya", "diffusers", "comfyui", "diffsynth"])
def test_no_alpha_anywhere_is_lh701_and_prescribes_nothing(tmp_path: Path, format: str) -> None:
    path = write_lora(tmp_path / "x", format, {"a.b": weights(4, None), "a.c": weights(8, None)})
    record = inspect_file(path)
    assert codes(record) == ["LH701"]
    assert "training configuration" in what(record, "LH701")
    assert "the ranks differ" in what(record, "LH701")
    assert record.trained is None
    assert set(record.prescription.values()) == {None}


@pytest.mark.parametrize("said", [{}, {"unet.r": 4, "unet.lora_alpha": 8}])
def test_a_header_that_says_nothing_of_the_modules_leaves_them_without_alpha(tmp_path: Path, said: object) -> None:
    entries = {"transformer.a.lora_A.weight": floats(4, 2), "transformer.a.lora_B.weight": floats(3, 4)}
    (tmp_path / "x.safetensors").write_bytes(tensors_file(entries, {"lora_adapter_metadata": json.dumps(said)}))
    record = inspect_file(tmp_path / "x.safetensors")
    assert (record.format, record.alpha_source, codes(record)) == ("diffusers", "none", ["LH701"])


def test_the_alpha_of_the_training_turns_a_file_without_alpha_into_a_prescription(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x", "diffsynth", {"a.b": weights(32, None), "a.c": weights(32, None)})
    record = inspect_file(path, lora_alpha=16)
    known = {name: strength for name, strength in record.prescription.items() if strength is not None}
    assert known == {"diffsynth": 0.5, "diffsynth-2.0.4": 0.5, "raw alpha": 0.5}
    assert "was not measured on an architecture with these layers" in record.unprescribed["diffusers"]


def test_partly_missing_alpha_is_lh702(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x", "kohya", {"a.b": weights(4, 4.0), "a.c": weights(4, None), "d": weights(4, None)})
    record = inspect_file(path)
    assert codes(record) == ["LH702"]
    assert "2 of 3 modules carry no alpha" in what(record, "LH702")


def test_mixed_ratios_are_lh703(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x", "peft", {"a": weights(4, 4.0), "b": weights(4, 2.0), "c": weights(8, 4.0)})
    record = inspect_file(path)
    assert codes(record) == ["LH703"]
    assert "0.5 in 2, 1 in 1" in what(record, "LH703")
    assert (record.trained, record.scales["alpha"]) == ((0.5, 1.0), (2.0, 4.0))


def test_alpha_that_follows_the_rank_is_lh703_too(tmp_path: Path) -> None:
    record = inspect_file(write_lora(tmp_path / "x", "kohya", {"a": weights(4, 2.0), "b": weights(8, 4.0)}))
    assert "alpha follows the rank (2 in 1, 4 in 1)" in what(record, "LH703")


@pytest.mark.parametrize(("blocks", "rows"), [(3, (4, 4, 4)), (4, (4, 4, 4, 16)), (3, (8, 2, 2))])
def test_split_layers_stacked_into_a_merged_one_are_lh704(tmp_path: Path, blocks: int, rows: tuple[int, ...]) -> None:
    b = torch.block_diag(*[torch.randn(count, 2) for count in rows])
    fused = LoraWeights(torch.randn(2 * blocks, 8), b, 2.0)
    for dtype in (torch.float32, torch.bfloat16):
        record = inspect_file(write_lora(tmp_path / str(dtype), "kohya", {"to_qkv": fused}, dtype=dtype))
        assert codes(record) == ["LH704"]
        assert f"{blocks} blocks of rank 2): an alpha that is still that of training belongs over 2," in what(
            record, "LH704"
        )


@pytest.mark.parametrize("b", [torch.ones(6, 6), torch.zeros(6, 6), torch.eye(6)[:, [1, 0, 2, 3, 5, 4]].roll(3, 0)])
def test_a_dense_a_zero_or_a_shuffled_b_is_not_lh704(tmp_path: Path, b: torch.Tensor) -> None:
    modules = {"to_qkv": LoraWeights(torch.randn(6, 8), b, 6.0)}
    assert codes(inspect_file(write_lora(tmp_path / "x", "kohya", modules), headers_only=True)) == []


def test_an_empty_b_beside_another_variant_is_read_without_a_crash(tmp_path: Path) -> None:
    loha = {f"lora_unet_x.hada_{part}_a": floats(6, 4) for part in ("w1", "w2")}
    loha |= {f"lora_unet_x.hada_{part}_b": floats(4, 8) for part in ("w1", "w2")}
    (tmp_path / "x.safetensors").write_bytes(tensors_file({**loha, "lora_unet_x.lora_up.weight": floats(0, 8)}))
    record = inspect_file(tmp_path / "x.safetensors")
    assert (record.variants, "LH704" in codes(record)) == ({"loha": 1}, False)


def test_alpha_in_half_precision_above_its_whole_numbers_is_lh710(tmp_path: Path) -> None:
    raw = torch.tensor([300.0]).bfloat16().view(torch.uint8).numpy().tobytes()
    (tmp_path / "x.safetensors").write_bytes(tensors_file(kohya(alpha=("BF16", [], raw))))
    record = inspect_file(tmp_path / "x.safetensors")
    assert codes(record) == ["LH710"]
    assert "BF16, which rounds whole numbers above 256" in what(record, "LH710")


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({"ss_network_alpha": "16"}, ["LH711"]),
        ({"ss_network_alpha": "1.0"}, []),
        ({"ss_network_alpha": "Dynamic"}, []),
        ({"ss_network_alpha": "None", "lora_alpha": "nan"}, []),
        ({"ss_network_args": '{"conv_alpha": "8"}'}, ["LH711"]),
        ({"ss_network_args": "[" * 100_000}, []),
    ],
)
def test_metadata_that_disagree_with_the_tensors_are_lh711(
    tmp_path: Path, metadata: dict[str, object], found: list[str]
) -> None:
    (tmp_path / "x.safetensors").write_bytes(tensors_file(kohya(), metadata))
    assert codes(inspect_file(tmp_path / "x.safetensors")) == found


@pytest.mark.parametrize(("shape", "found"), [([1, 4], []), ([3, 1], ["LH709"]), ([3], [])])
def test_a_dora_scale_on_the_output_axis_is_lh709(tmp_path: Path, shape: list[int], found: list[str]) -> None:
    entries = kohya() | {"lora_unet_x.dora_scale": floats(*shape)}
    (tmp_path / "x.safetensors").write_bytes(tensors_file(entries))
    record = inspect_file(tmp_path / "x.safetensors")
    assert (codes(record), record.variants) == (found, {"dora": 1})


def test_halves_that_tools_store_in_either_order_are_lh709(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x", "diffusers", {"norm_out.linear": weights(2, 2.0)})
    assert "opposite order" in what(inspect_file(path), "LH709")


def test_keys_not_understood_are_counted_by_kind(tmp_path: Path) -> None:
    extra = {"lora_unet_x.scale": floats(1), "lora_unet_y.scale": floats(1), "something.else": floats(1)}
    (tmp_path / "x.safetensors").write_bytes(tensors_file(kohya() | extra))
    record = inspect_file(tmp_path / "x.safetensors")
    assert record.coverage == 0.5
    assert "3 of 6 keys not understood (50%)" in what(record, "LH708")
    assert "2 A1111 scale, which replaces alpha / rank there (lora_unet_x.scale)" in what(record, "LH708")
    assert set(record.unused) == set(extra)


def test_rank_stabilised_scaling_is_noted(tmp_path: Path) -> None:
    layers = {f"model.layers.0.self_attn.{n}_proj": weights(16, 4.0) for n in "qv"}
    record = inspect_file(write_lora(tmp_path / "x", "peft", layers, rslora=True))
    assert record.trained == (1.0, 1.0)
    assert "sqrt(rank) = 4" in record.notes[0]
    known = {name: strength for name, strength in record.prescription.items() if strength is not None}
    assert known == {"peft": 1.0, "transformers": 1.0, "vllm": 1.0, "raw alpha": 0.25}
    assert "divide by r whatever use_rslora says" in record.unprescribed["sglang"]


def test_text_encoders_are_components(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(tensors_file(dotted("transformer.x") | dotted("text_encoder.x")))
    assert inspect_file(tmp_path / "x.safetensors").components == {"transformer": 1, "text_encoder": 1}


def test_a_file_name_of_arbitrary_bytes_is_recorded(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x", "kohya", {"x": weights(2, 1.0)})
    record = inspect_file(path.rename(tmp_path / "\udcff\x1b[2J.safetensors"))
    assert record.format == "kohya"
    assert record.path.endswith("\\udcff\x1b[2J.safetensors")
    assert json.loads(record.model_dump_json())["path"] == record.path


def test_the_founding_file_says_which_strength_to_pass(tmp_path: Path) -> None:
    modules = {f"blocks.{i}.to_qkv": weights(32, 16.0) for i in range(2)}
    record = inspect_file(write_lora(tmp_path / "x", "diffsynth", modules))
    assert record.prescription["diffsynth-2.0.4"] == 0.5
    assert record.prescription["diffsynth"] == 1.0
    assert record.prescription["raw alpha"] == 0.03125


_LIGHT = """
import sys
from harness.doctor import inspect_file
record = inspect_file(sys.argv[1])
assert record.format == "kohya", record
heavy = {"torch", "peft", "diffusers", "hypothesis", "jinja2"} & set(sys.modules)
assert not heavy, heavy
"""


def test_inspecting_a_header_imports_no_torch(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x", "kohya", {"x": weights(2, 1.0)})
    done = subprocess.run([sys.executable, "-c", _LIGHT, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("parts", "key"),
    [
        ({"lora_down.weight": (4, 8, 3, 3), "lora_up.weight": (16, 4, 3, 3)}, "lora_up"),
        ({"lora_down.weight": (4, 8), "lora_up.weight": (16, 4), "dora_scale": (7,)}, "dora_scale"),
    ],
)
def test_halves_and_magnitudes_of_no_layer_are_named(
    tmp_path: Path, parts: dict[str, tuple[int, ...]], key: str
) -> None:
    tensors = {f"lora_unet_x.{tail}": torch.randn(shape) for tail, shape in parts.items()}
    save_file({**tensors, "lora_unet_x.alpha": torch.tensor(4.0)}, tmp_path / "x.safetensors")
    save_file({"x.weight": torch.randn(16, 8)}, tmp_path / "base.safetensors")
    record = inspect_file(tmp_path / "x.safetensors", base=tmp_path / "base.safetensors")
    assert [hazard.code for hazard in record.hazards if key in hazard.what] == ["LH706"]


def test_a_file_without_ranks_speaks_of_no_alpha(tmp_path: Path) -> None:
    save_file({"diffusion_model.x.diff": torch.randn(8, 8)}, tmp_path / "x.safetensors")
    assert inspect_file(tmp_path / "x.safetensors").headline == "Nothing in it is scaled by alpha / rank."
