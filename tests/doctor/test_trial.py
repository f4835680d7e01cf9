"""Files as trainers write them, in the sizes of real models: what they are called and what is said of each tool."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.doctor import inspect_file
from harness.doctor.answers import answers
from harness.doctor.diagnose import diagnose
from harness.doctor.repair.repair import repair_file
from harness.doctor.told import lines
from harness.doctor.traits import Traits
from harness.doctor.what_it_is import model_of
from harness.errors import UserError
from harness.files import read_lora
from tests.doctor.trial import CONFIG, DOWN, HF, LLM, A, asked, blocks, kohya, pairs, written

TO = ("attn.to_q", "attn.to_k")
MODELS = {
    "sdxl, kohya": (
        kohya(["down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"], 640)
        | kohya(["down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"], 640, 2048),
        "SDXL",
    ),
    "sd 1.5, kohya": (
        kohya(["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"], 640, 768),
        "Stable Diffusion 1.x/2.x or AnimateDiff",
    ),
    "sd 2, kohya": (
        kohya(["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"], 640, 1024),
        "Stable Diffusion 1.x/2.x",
    ),
    "sd3, OneTrainer": (
        pairs((f"lora_transformer_transformer_blocks_{n}_attn_to_q" for n in range(24)), 1536, halves=DOWN, alpha=True),
        "Stable Diffusion 3",
    ),
    "sd3, joint blocks": (
        pairs(blocks("joint_blocks", 24, "x_block.attn.qkv"), 4608, 1536, prefix="diffusion_model."),
        "Stable Diffusion 3",
    ),
    "wan 14b": (pairs(blocks("blocks", 40, "self_attn.q"), 5120, prefix="diffusion_model."), "Wan 14B"),
    "hunyuan, diffusion-pipe": (
        pairs(blocks("double_blocks", 20, "img_attn_qkv"), 9216, 3072, prefix="transformer."),
        "HunyuanVideo or FramePack",
    ),
    "cogvideox 5b": (
        pairs(blocks("transformer_blocks", 42, "attn1.to_q"), 3072, prefix="transformer."),
        "CogVideoX or ConsisID",
    ),
    "stable audio": (
        pairs(blocks("transformer_blocks", 24, "attn1.to_q"), 1536, prefix="transformer."),
        "unknown model (with layers named as in LTX-Video or LTX-2 or CogVideoX (or 9 more), of other sizes or depth)",
    ),
    "omnigen 2": (
        pairs(blocks("layers", 32, "attn.to_q"), 2520, prefix="diffusion_model."),
        "unknown model (with layers named as in Lumina 2, of other sizes or depth)",
    ),
    "40 blocks of nobody": (
        pairs(blocks("transformer_blocks", 40, *TO), 2048, prefix="transformer."),
        "unknown model (with layers named as in Qwen-Image or Qwen-Image 2.1 or FLUX.1 (or 9 more), of other sizes "
        "or depth)",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_named_by_its_sizes_too(name: str, tmp_path: Path) -> None:
    tensors, model = MODELS[name]
    assert model_of(Traits(read_lora(written(tmp_path, tensors)))) == model


@pytest.mark.parametrize("name", ["stable audio", "omnigen 2", "40 blocks of nobody"])
def test_no_tool_is_said_to_read_a_model_that_nobody_knows(name: str, tmp_path: Path) -> None:
    found = asked(written(tmp_path, MODELS[name][0]), lora_alpha=2.0)["diffusers"]
    assert (found.effect, found.strength) == ("unknown", None)


def test_what_was_measured_on_one_unet_holds_for_another_of_its_class(tmp_path: Path) -> None:
    found = asked(written(tmp_path, MODELS["sdxl, kohya"][0]))
    assert (found["comfyui"].strength, found["comfyui"].sure) == (1.0, "by name")
    assert found["diffsynth"].effect == "factor"
    found = asked(written(tmp_path, MODELS["sd 1.5, kohya"][0]))
    assert found["diffsynth"].effect == "unknown"  # its fault was measured on SDXL


ENCODER = "an encoder of transformers (vision, speech or text)"
FOREIGN = {
    "dinov2": (["dinov2.encoder.layer.0.mlp.fc1"], "unknown model"),
    "whisper": (["model.encoder.layers.0.self_attn.q_proj"], ENCODER),
    "siglip": (
        ["vision_model.encoder.layers.0.self_attn.v_proj"],
        ENCODER,
    ),
    "esm": (["esm.encoder.layer.0.attention.self.query"], "BERT, or an encoder like it,"),
    "rwkv": (["rwkv.blocks.0.attention.key"], "unknown model"),
    "mamba": (["backbone.layers.0.mixer.in_proj"], "unknown model"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_an_engine_of_language_models_is_no_sure_reader_of_others(name: str, tmp_path: Path) -> None:
    layers, model = FOREIGN[name]
    config = CONFIG | {"target_modules": [layers[0].rpartition(".")[2], "v_proj"]}
    traits = Traits(read_lora(written(tmp_path, pairs(layers, 768, prefix=HF), config=config)))
    found = answers(traits)
    assert model_of(traits) == model
    assert (found["vllm"].strength, found["peft"].strength, found["transformers"].strength) == (None, 1.0, 1.0)


def test_a_unet_is_no_model_of_transformers(tmp_path: Path) -> None:
    names = [f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_k")]
    found = asked(written(tmp_path, pairs(names, 320, prefix=HF), config=CONFIG | {"target_modules": ["to_q", "to_k"]}))
    assert {found[name].effect for name in ("transformers", "vllm")} == {"cannot"}
    assert found["sglang"].effect == "unknown"  # it has a part for pictures, which was not measured
    assert found["peft"].strength == 1.0


def test_an_engine_is_asked_by_its_own_rules(tmp_path: Path) -> None:
    found = asked(written(tmp_path, pairs(LLM, 64, prefix=HF), config=CONFIG))
    assert found["vllm"].strength == found["sglang"].strength == 1.0
    (tmp_path / "pissa").mkdir()
    changed = CONFIG | {"init_lora_weights": "pissa_niter_16"}
    vllm = asked(written(tmp_path / "pissa", pairs(LLM, 64, prefix=HF), config=changed))["vllm"]
    assert (vllm.effect, vllm.strength) == ("raises", None)
    assert "it takes no initialisation that changes the base" in vllm.says


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer."])
def test_a_configuration_beside_says_the_alpha_that_no_tool_reads(prefix: str, tmp_path: Path) -> None:
    """diffusion-pipe saves ComfyUI's names in a folder with PEFT's configuration."""
    layers = blocks("transformer_blocks", 28, "attn1.to_q", "attn1.to_k")
    path = written(tmp_path, pairs(layers, 2048, prefix=prefix), config=CONFIG | {"lora_alpha": 8})
    record = inspect_file(path)
    assert record.format == {"diffusion_model.": "comfyui", "transformer.": "diffusers"}[prefix]
    assert (record.alpha_source, record.trained, record.codes) == ("config", (4.0, 4.0), ())
    assert record.prescription["diffusers"] == 4.0
    assert not record.prescription.keys() & {"peft", "vllm"}


def test_gpt2_without_a_prefix_stays_a_file_of_peft(tmp_path: Path) -> None:
    names = ["transformer.h.0.attn.c_attn", "transformer.blocks.0.attn.Wqkv"]
    assert inspect_file(written(tmp_path, pairs(names, 64), config=CONFIG)).format == "peft"


def test_pairs_that_a_tool_does_not_look_for_are_not_applied_by_name(tmp_path: Path) -> None:
    layers = [f"decoder.layers.{number}.self_attention.linear_qkv" for number in range(2)]
    tensors = pairs(layers, 192, 64, halves=("adapter.linear_in.weight", "adapter.linear_out.weight"))
    found = asked(written(tmp_path, tensors), lora_alpha=2.0)
    assert {found[name].effect for name in ("diffsynth", "diffsynth-2.0.4")} == {"unknown"}


def test_what_was_extracted_from_two_models_is_at_scale_one_in_every_line(tmp_path: Path) -> None:
    tensors = pairs(["blocks.0.self_attn.q"], 5120, halves=DOWN, prefix="diffusion_model.")
    path = written(tmp_path, tensors | {"diffusion_model.blocks.0.norm3.diff": (5120,)})
    said = dict(lines(diagnose(path)))
    assert "extracted from the difference of two models: scale 1, so 1 is as trained" in said["alpha"]


def test_methods_without_pairs_are_not_said_to_lose_their_alpha(tmp_path: Path) -> None:
    tensors = {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.oft_blocks": (10, 8, 8)}
    found = asked(written(tmp_path, tensors))["diffsynth"]
    assert found.says == "reads lora_A, lora_B, lora_down and lora_up alone: nothing is loaded"


@pytest.mark.parametrize("halves", [A, ("lora_A", "lora_B")], ids=["transposed", "mflux"])
def test_halves_that_lie_the_other_way_round_are_no_lora_of_enormous_rank(
    halves: tuple[str, str], tmp_path: Path
) -> None:
    tensors = {
        f"transformer.transformer_blocks.0.attn.{name}.{half}": shape
        for name in ("to_q", "to_k") for half, shape in zip(halves, ((3072, 4), (4, 3072)), strict=True)
    }  # fmt: skip
    path = written(
        tmp_path, tensors if halves != A[::-1] else {key: shape[::-1] for key, shape in tensors.items()} | {}
    )
    record = inspect_file(path)
    assert "LH706" in record.codes
    assert set(record.prescription.values()) == {None}
    found = diagnose(path)
    assert "rank 3072 in a layer of 4x4: the halves lie the other way round" in dict(lines(found))["broken"]
    assert found.exit_code == 1


def test_a_narrow_layer_of_high_rank_is_a_lora(tmp_path: Path) -> None:
    tensors = {
        "diffusion_model.x_embedder.lora_A.weight": (512, 64),
        "diffusion_model.x_embedder.lora_B.weight": (64, 512),
    }
    more = {"diffusion_model.proj.lora_A.weight": (512, 640), "diffusion_model.proj.lora_B.weight": (640, 512)}
    assert "LH706" not in inspect_file(written(tmp_path, tensors | more)).codes


def test_halves_of_unequal_rank_that_fit_the_other_way_round_are_told_so(tmp_path: Path) -> None:
    tensors = {"diffusion_model.a.b.lora_A.weight": (640, 4), "diffusion_model.a.b.lora_B.weight": (4, 320)}
    (hazard,) = (h for h in inspect_file(written(tmp_path, tensors)).hazards if h.code == "LH706")
    assert "the other way round they fit" in hazard.what


def test_t_lora_of_lycoris_is_named(tmp_path: Path) -> None:
    from lycoris.modules.tlora import TLoraModule
    from torch import nn

    state = TLoraModule("x", nn.Linear(32, 48), lora_dim=4, alpha=2).custom_state_dict()
    tensors = {f"lora_unet_mid_block_attentions_0_proj_in.{key}": tuple(value.shape) for key, value in state.items()}
    record = inspect_file(written(tmp_path, tensors))
    assert (record.format, dict(record.variants), record.codes) == ("kohya", {"tlora": 1}, ())
    assert record.prescription["lycoris"] is None


def test_a_full_checkpoint_with_a_q_layer_stays_one(tmp_path: Path) -> None:
    assert inspect_file(written(tmp_path, {"block.0.q_layer.weight": (32, 32)})).codes == ("LH797",)


def test_a_folder_of_checkpoints_says_which_hold_a_lora(tmp_path: Path) -> None:
    for step in ("checkpoint-500", "checkpoint-1000"):
        (tmp_path / "run" / step).mkdir(parents=True)
        (tmp_path / "run" / step / "adapter_model.safetensors").write_bytes(b"")
    (hazard,) = inspect_file(tmp_path / "run").hazards
    assert "it has folders with one (checkpoint-1000, checkpoint-500): name one of them" in hazard.what


def test_shards_are_called_shards(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"adapter_model-0000{number}-of-00002.safetensors").write_bytes(b"")
    (hazard,) = inspect_file(tmp_path).hazards
    assert "holds one LoRA in 2 shards: PEFT and diffusers open a single file" in hazard.what


def test_only_tools_that_read_the_file_are_said_to_drop_its_magnitudes(tmp_path: Path) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_q"
    tensors = pairs(["transformer_blocks.0.attn.to_q"], 64, prefix="transformer.")
    notes = inspect_file(written(tmp_path, tensors | {f"{stem}.lora_magnitude_vector": (64,)})).notes
    (note,) = (note for note in notes if "magnitude" in note)
    start = "DoRA magnitudes (lora_magnitude_vector) in 1 module: stable-diffusion.cpp leaves the magnitudes out; "
    assert note.startswith(f"{start}DiffSynth-Studio >= 2.0.5 ignores")
    assert "diffusers filters" not in note
    assert "sd-scripts" not in note


def test_the_repair_that_is_hinted_at_has_the_alpha_that_was_given(tmp_path: Path) -> None:
    names = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]
    path = written(tmp_path, pairs(names, 320, prefix="unet."))
    assert (
        "`lora-harness repair --to kohya --lora-alpha 4` writes"
        in inspect_file(path, lora_alpha=4).unprescribed["comfyui"]
    )


def test_a_repair_of_what_has_scale_one_by_construction_needs_no_alpha(tmp_path: Path) -> None:
    names = [f"double_blocks.{number}.img_attn.qkv" for number in range(19)]
    said = {"software": '{"name": "ai-toolkit"}'}
    path = written(tmp_path, pairs(names, 9216, 3072, prefix="diffusion_model."), metadata=said)
    assert "`lora-harness repair --to kohya` writes a file" in inspect_file(path).unprescribed["diffusers"]


def test_a_repair_names_what_it_refuses(tmp_path: Path) -> None:
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8}
    with pytest.raises(UserError, match="prompt_embeddings is a prompt_tuning module"):
        repair_file(written(tmp_path, {"prompt_embeddings": (8, 32)}, config=config), "peft", tmp_path / "out")


WAN = pairs(blocks("blocks", 40, "self_attn.q"), 5120, prefix="diffusion_model.")
HAS_NOT = {
    "wan": (WAN, {}, {"forge"}, {"comfyui", "invokeai"}),
    "language model": (pairs(LLM, 64, prefix=HF), {"config": CONFIG}, {"invokeai", "diffusers"}, {"peft", "vllm"}),
    "sdxl": (
        kohya(["down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"], 640, 2048), {}, {"musubi-tuner"},
        {"a1111", "forge", "sd-scripts", "comfyui"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HAS_NOT)
def test_a_tool_without_such_a_model_cannot_read_the_file(name: str, tmp_path: Path) -> None:
    tensors, fields, cannot, may = HAS_NOT[name]
    path = written(tmp_path, tensors, **fields)  # type: ignore[arg-type]
    found = asked(path, lora_alpha=2.0)
    assert {tool for tool, each in found.items() if each.effect == "cannot"} >= cannot
    assert not {tool for tool in may if found[tool].effect == "cannot"}


def test_what_nobody_measured_and_what_has_no_such_model_are_a_line_each(tmp_path: Path) -> None:
    names = [f"model.encoder.layers.0.self_attn.{name}_proj" for name in "qv"]
    said = [label for label, _ in lines(diagnose(written(tmp_path, pairs(names, 64, prefix=HF), config=CONFIG)))]
    assert said.count("unknown") <= 1
    (tmp_path / "wan").mkdir()
    said = [label for label, _ in lines(diagnose(written(tmp_path / "wan", WAN)))]
    assert (said.count("unknown"), said.count("cannot")) == (1, 1)


OWN = {
    "flux.2, authors' names": (
        pairs(blocks("double_blocks", 8, "img_attn.qkv"), 18432, 6144, prefix="diffusion_model."), "nothing",
    ),
    "flux.2, diffusers' names": (
        pairs(blocks("single_transformer_blocks", 48, "attn.to_qkv_mlp_proj"), 55296, 6144), "law",
    ),
    "z-image, diffusers' names": (
        pairs(blocks("layers", 30, "attention.to_q", "attention.to_k", "feed_forward.w1"), 3840), "law",
    ),
    "z-image, authors' names": (
        pairs(blocks("layers", 30, "attention.qkv"), 11520, 3840, prefix="diffusion_model.")
        | pairs(blocks("layers", 30, "feed_forward.w1"), 3840, prefix="diffusion_model."), "drops",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_diffsynth_has_the_names_that_its_own_model_has(name: str, tmp_path: Path) -> None:
    """Its FLUX.2 and Z-Image were taken from diffusers: told by the modules that its classes build."""
    tensors, effect = OWN[name]
    found = asked(written(tmp_path, tensors), lora_alpha=2.0)
    assert {found[tool].effect for tool in ("diffsynth", "diffsynth-2.0.4")} == {effect}


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv_x", "decoder.blocks.0.attn.to_k"])
def test_a_denoiser_that_nobody_knows_is_no_language_model(name: str, tmp_path: Path) -> None:
    assert model_of(Traits(read_lora(written(tmp_path, pairs([name], 64))))) == "unknown model"


def test_a_scale_beside_alpha_is_not_what_a1111_takes_alpha_for(tmp_path: Path) -> None:
    tensors = kohya(["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"], 640)
    stem = next(iter(tensors)).partition(".")[0]
    found = asked(written(tmp_path, {**tensors, f"{stem}.scale": ()}))
    assert (found["a1111"].effect, found["comfyui"].strength) == ("unknown", 1.0)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lllite_unet_input_blocks_4_1_attn1_to_k.down.0.weight": (16, 64)}, "a ControlNet-LLLite"),
        ({"unet.a.0.attn1.to_q.vera_lambda_b": (8,)}, "an adapter of PEFT's method vera"),
    ],
)
def test_what_is_no_lora_is_called_what_it_is(tensors: dict[str, tuple[int, ...]], said: str, tmp_path: Path) -> None:
    (hazard,) = inspect_file(written(tmp_path, tensors)).hazards
    assert (hazard.code, said in hazard.what) == ("LH797", True)


def test_norms_that_a_control_lora_of_diffusers_replaces_are_read(tmp_path: Path) -> None:
    """diffusers' script saves them beside the pairs, and its FLUX loader puts them into the model."""
    layers = blocks("transformer_blocks", 19, "attn.to_q", "attn.to_k")
    norms = {f"transformer.transformer_blocks.{number}.attn.norm_q.weight": (128,) for number in range(19)}
    path = written(tmp_path, pairs(layers, 3072, prefix="transformer.") | norms)
    record = inspect_file(path)
    assert (record.variants, record.coverage) == ({"lora": 38, "set": 19}, 1.0)
    found = asked(path, as_rank=True)
    assert (found["diffusers"].strength, found["comfyui"].effect) == (1.0, "drops")
    with pytest.raises(UserError, match="19 trained tensors have no place"):
        repair_file(path, "kohya", tmp_path / "new.safetensors", lora_alpha=2.0)


def test_what_diffusers_leaves_out_of_an_extracted_wan_is_said(tmp_path: Path) -> None:
    """Its converter turns `.diff_b` into biases, and drops norms and modulation: by its own code on such keys."""
    names = blocks("blocks", 40, "self_attn.q", "cross_attn.k")
    tensors = pairs(names, 5120, prefix="diffusion_model.", halves=DOWN)
    tensors |= {f"diffusion_model.blocks.{number}.modulation.diff": (1, 6, 5120) for number in range(40)}
    tensors |= {f"diffusion_model.{name}.diff_b": (5120,) for name in names}
    found = asked(written(tmp_path, tensors))
    assert model_of(Traits(read_lora(tmp_path / "file.safetensors"))) == "Wan 14B"
    assert (found["diffusers"].effect, found["comfyui"].strength) == ("drops", 1.0)


@pytest.mark.parametrize(
    ("module", "trainer"),
    [("lora_flux_2", "musubi-tuner"), ("lora_hv_1_5", "musubi-tuner"), ("lora_hunyuan_image", "kohya sd-scripts")],
)
def test_two_trainers_of_one_family_are_told_by_their_modules(module: str, trainer: str, tmp_path: Path) -> None:
    path = written(
        tmp_path, kohya(["double_blocks.0.img_attn.qkv"], 64), metadata={"ss_network_module": f"networks.{module}"}
    )
    assert inspect_file(path).trainer == trainer
