"""Questions that people ask of a file and a tool: each is answered with what is so and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.doctor import inspect_file
from harness.doctor.answer import Question
from harness.doctor.diagnose import diagnose, tool_named
from harness.doctor.told import lines
from harness.doctor.traits import Traits, untargeted
from harness.doctor.what_it_is import model_of
from harness.errors import UserError
from harness.files import read_lora
from harness.law.explained import symptoms_of
from tests.doctor.trial import CONFIG, DOWN, HF, LLM, asked, kohya, pairs, written


@pytest.mark.parametrize("foreign", ["emb_params", "some.other.weight"])
def test_a_key_that_no_lora_has_makes_diffusers_refuse_the_file(foreign: str, tmp_path: Path) -> None:
    tensors = kohya([f"down_blocks.{n}.attentions.0.transformer_blocks.0.attn1.to_q" for n in range(2)], 320)
    found = asked(written(tmp_path, tensors | {foreign: (4, 768)}))["diffusers"]
    assert (found.effect, found.strength) == ("raises", None)
    assert "keys that its converter does not know" in found.says


def test_text_encoders_of_comfyui_are_not_those_of_diffusers(tmp_path: Path) -> None:
    tensors = pairs(
        ["clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"], 768, halves=DOWN, prefix="text_encoders."
    )
    more = pairs(["input_blocks.4.1.transformer_blocks.0.attn1.to_q"], 640, halves=DOWN, prefix="diffusion_model.")
    found = asked(written(tmp_path, more | tensors), lora_alpha=2.0)
    assert (found["diffusers"].effect, found["comfyui"].strength) == ("nothing", 1.0)


@pytest.mark.parametrize(
    ("name", "tool"),
    [("swarmui", "comfyui"), ("ComfyUI", "comfyui"), ("comfy-ui", "comfyui"), ("automatic1111", "a1111"),
     ("SD.Next", "sd-next"), ("kohya_ss", "sd-scripts"), ("mlx-lm", "mlx"), ("llama cpp", "llama.cpp")],
)  # fmt: skip
def test_tools_are_known_by_the_names_that_people_use(name: str, tool: str) -> None:
    assert tool_named(name).name == tool


def test_a_release_is_still_asked_by_its_own_row() -> None:
    assert tool_named("DiffSynth-Studio", "1.1.9").name == "diffsynth-2.0.4"
    with pytest.raises(UserError, match="no such tool"):
        tool_named("...")


def test_a_file_for_llama_cpp_is_made_by_its_own_script(tmp_path: Path) -> None:
    said = dict(lines(diagnose(written(tmp_path, pairs(LLM, 64, prefix=HF), config=CONFIG), tool="llama.cpp")))
    assert said["do"] == "convert the PEFT folder with llama.cpp's convert_lora_to_gguf.py"


@pytest.mark.parametrize(
    ("config", "number", "words"),
    [
        ({"use_rslora": True}, 2**0.5, "0.7071 times as strong"),  # trained 8 / sqrt(2), converted 8 / 2
        ({"alpha_pattern": {"q_proj": 2.0}}, None, "no single strength"),
        ({"alpha_pattern": {".*": 2.0}}, 0.25, "4 times as strong"),
        ({"alpha_pattern": {"q_proj": 8}}, 1.0, ""),
    ],
)
def test_what_the_converter_of_llama_cpp_drops_is_told(
    config: dict[str, object], number: float | None, words: str, tmp_path: Path
) -> None:
    """`convert_lora_to_gguf.py` writes `lora_alpha` and nothing else of the scale (its page in docs/findings)."""
    folder = written(tmp_path, pairs(LLM, 64, prefix=HF), config=CONFIG | {"lora_alpha": 8} | config)
    found = diagnose(folder, tool="llama.cpp").answers["llama.cpp"]
    assert (found.effect, found.strength) == ("cannot", number and pytest.approx(number, rel=1e-5))
    assert words in found.says
    assert [page.page for page in found.findings] == ["llama-cpp-convert-drops-rslora-and-patterns"] * bool(words)


def test_several_alphas_are_evened_out_before_the_conversion(tmp_path: Path) -> None:
    config = CONFIG | {"lora_alpha": 8, "alpha_pattern": {"q_proj": 2.0}}
    said = dict(lines(diagnose(written(tmp_path, pairs(LLM, 64, prefix=HF), config=config), tool="llama.cpp")))
    assert said["pass"] == "no number makes this right there"
    assert "repair" in said["do"]
    assert said["do"].endswith(", then convert the PEFT folder with llama.cpp's convert_lora_to_gguf.py")


def test_mlx_is_told_what_is_missing(tmp_path: Path) -> None:
    tensors = {"model.layers.0.self_attn.q_proj.lora_a": (64, 4), "model.layers.0.self_attn.q_proj.lora_b": (4, 64)}
    said = dict(lines(diagnose(written(tmp_path, tensors), tool="mlx")))
    assert said["do"] == "put adapter_config.json beside it, where lora_parameters say rank and scale"


def test_peft_is_said_to_repeat_what_changed_the_base(tmp_path: Path) -> None:
    path = written(tmp_path, pairs(LLM, 64, prefix=HF), config=CONFIG | {"init_lora_weights": "pissa_niter_4"})
    said = dict(lines(diagnose(path, tool="peft")))
    assert "repeats what init_lora_weights did to the base" in said["sure"]


def test_kinds_of_layers_that_are_trained_somewhere_are_not_called_left_alone(tmp_path: Path) -> None:
    names = [f"down_blocks.1.attentions.0.transformer_blocks.1.attn1.{name}" for name in ("to_q", "to_k", "to_v")]
    left = untargeted(Traits(read_lora(written(tmp_path, kohya(names, 640)))))
    assert {"attn1_to_out", "ff_net", "conv1", "proj_in"} <= set(left)
    assert not {"attn1_to_q", "attn1_to_k"} & set(left)
    assert not any("#" in kind for kind in left)


def test_a_weak_effect_is_first_what_the_tool_leaves_out(tmp_path: Path) -> None:
    stem = "transformer.transformer_blocks.0.attn.to_q"
    tensors = pairs(["transformer_blocks.0.attn.to_q"], 64, prefix="transformer.") | {
        f"{stem}.lora_magnitude_vector": (64,)
    }
    said = [text for label, text in lines(diagnose(written(tmp_path, tensors), tool="diffsynth", saw="weak"))]
    assert any(text.startswith("modules dropped or misplaced (diffsynth ignores the magnitudes") for text in said)


def test_shards_that_were_not_gathered_are_called_so(tmp_path: Path) -> None:
    tensors = {f"{HF}{LLM[0]}.lora_{half}.weight": (0,) for half in "AB"}
    path = written(tmp_path, tensors, config=CONFIG)
    (hazard,) = (each for each in inspect_file(path).hazards if each.code == "LH706")
    assert "DeepSpeed ZeRO-3 and FSDP leave this where shards were not gathered" in hazard.what
    assert dict(lines(diagnose(path)))["file"] == "no module that can be read (peft keys)"


@pytest.mark.parametrize("before", ["model.", "", "transformer.", "model.language_model.", "model.decoder."])
def test_a_language_model_is_told_by_what_stands_before_its_layers(before: str, tmp_path: Path) -> None:
    names = [name.replace("model.", before, 1) for name in LLM]
    assert (
        model_of(Traits(read_lora(written(tmp_path, pairs(names, 64, prefix=HF), config=CONFIG)))) == "language model"
    )


def test_the_model_of_a_robot_is_no_language_model(tmp_path: Path) -> None:
    names = [name.replace("model.", "paligemma_with_expert.gemma_expert.model.", 1) for name in LLM]
    found = asked(written(tmp_path, pairs(names, 64, prefix=HF), config=CONFIG))
    assert (found["vllm"].effect, found["peft"].strength) == ("unknown", 1.0)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_server_with_a_part_for_pictures_is_not_said_to_refuse_them(prefix: str, tmp_path: Path) -> None:
    names = [f"transformer_blocks.{number}.attn.to_q" for number in range(60)]
    given = diagnose(written(tmp_path, pairs(names, 3072, prefix=prefix)), tool="sglang").answers["sglang"]
    assert given.effect == "unknown"
    assert "SGLang Diffusion" in given.says


def test_where_there_is_nothing_to_pass_no_other_number_is_warned_of(tmp_path: Path) -> None:
    said = dict(lines(diagnose(written(tmp_path, pairs(LLM, 64, prefix=HF), config=CONFIG), tool="vllm")))
    assert said["pass"] == "nothing to pass: it applies the scale of adapter_config.json"


def test_a_vector_of_magnitudes_is_not_judged_as_dora_scale(tmp_path: Path) -> None:
    name = "transformer_blocks.0.attn.to_q"
    tensors = pairs([name], 3072, prefix="transformer.") | {f"transformer.{name}.lora_magnitude_vector": (3072,)}
    found = asked(written(tmp_path, tensors), lora_alpha=2.0)["comfyui"]
    assert (found.effect, "norm of the base weight" in found.says) == ("drops", False)


@pytest.mark.parametrize(
    ("name", "tool"),
    [("unsloth", "peft"), ("krita", "comfyui"), ("webui", "a1111"), ("Hugging Face diffusers", "diffusers")],
)
def test_what_loads_with_another_tool_is_known_as_that(name: str, tool: str) -> None:
    assert tool_named(name).name == tool


def test_the_alpha_of_mlx_vlm_is_not_sure_since_its_releases_read_it_in_two_ways(tmp_path: Path) -> None:
    layer = "language_model.model.layers.0.self_attn.q_proj"
    config = {"rank": 4, "alpha": 0.1, "dropout": 0.1}
    halves = {f"{layer}.A": (64, 4), f"{layer}.B": (4, 64)}
    path = written(tmp_path, halves, config=config, file="adapters.safetensors")
    record = inspect_file(path)
    assert (record.format, record.trained, [hazard.code for hazard in record.hazards]) == ("mlx-vlm", None, ["LH716"])
    assert "alpha = 0.1 as the whole factor, from 0.5.0 on with alpha / rank = 0.025" in record.hazards[0].what
    said = dict(lines(diagnose(path, tool="mlx-vlm")))
    assert said["tool"].startswith("mlx-vlm 0.7.10: applies modules at scale 0.025; what the training meant")
    assert (said["pass"], said["do"]) == (
        "not known from this file alone",
        "give the alpha of the training: --lora-alpha N",
    )
    assert said["alpha"].startswith("as others count, 0.4 if mlx-vlm up to 0.4.4 trained it, 0.1 if a later one did")
    known = inspect_file(path, lora_alpha=0.4)
    assert (known.trained, known.prescription) == ((0.1, 0.1), {"mlx-vlm": 4.0, "mlx-vlm-0.4": 1.0})


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("0.7.10", "multiply the factor in adapter_config.json by 4"),
        ("0.5.1", "multiply the factor in adapter_config.json by 4"),
        ("0.3.0", "leave the alpha in adapter_config.json as it is"),
        ("0.9", "not known from this file alone"),
    ],
)
def test_each_release_of_mlx_vlm_has_its_own_number(tmp_path: Path, version: str, says: str) -> None:
    halves = {f"model.layers.0.self_attn.q_proj.{half}": (64, 4) if half == "A" else (4, 64) for half in "AB"}
    path = written(tmp_path, halves, config={"rank": 4, "alpha": 0.1, "dropout": 0.1}, file="adapters.safetensors")
    question = Question(version, lora_alpha=0.4)
    assert dict(lines(diagnose(path, tool="mlx-vlm", asked=question)))["pass"] == says


def test_an_alpha_that_nobody_needed_is_said(tmp_path: Path) -> None:
    stem = "lora_unet_blocks_0_self_attn_q"
    tensors = {f"{stem}.lora_down.weight": (4, 64), f"{stem}.lora_up.weight": (64, 4), f"{stem}.alpha": ()}
    said = dict(lines(diagnose(written(tmp_path, tensors), asked=Question(lora_alpha=8.0))))
    assert said["alpha"] == "--lora-alpha 8 is not used: the file has its own alpha"


def test_a_scale_that_lies_beside_the_file_is_left_as_it_is(tmp_path: Path) -> None:
    halves = {f"model.layers.0.self_attn.q_proj.lora_{half}": (64, 4) if half == "a" else (4, 64) for half in "ab"}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}}
    path = written(tmp_path, halves, config=config, file="adapters.safetensors")
    for tool, field in (("mlx-lm", "scale"), ("mlx-vlm", "factor")):
        said = dict(lines(diagnose(path, tool=tool)))["pass"]
        assert said == f"leave the {field} in adapter_config.json as it is"


def test_the_scripts_that_trained_with_another_alpha_are_said(tmp_path: Path) -> None:
    names = [f"down_blocks.1.attentions.0.transformer_blocks.{n}.attn1.to_q" for n in range(2)]
    said = dict(lines(diagnose(written(tmp_path, pairs(names, 640, prefix="unet.")), tool="diffusers")))
    assert "those of 0.24, of December 2023, with 8" in said["alpha"]


def test_no_trainer_is_assumed_for_a_model_that_its_scripts_do_not_have(tmp_path: Path) -> None:
    path = written(tmp_path, pairs([f"blocks.{n}.adaln.1" for n in range(3)], 96, prefix="transformer."))
    assert "as trained" not in " ".join(f"{label} {said}" for label, said in lines(diagnose(path)))
    assert inspect_file(path).notes == (
        "alpha: none in the file: if lora_alpha was 2 pass 1, if it was N pass N / 2; "
        "passing 2 would be 2x too strong if it was 2",
    )


def test_the_headline_of_a_rank_stabilised_file_says_so(tmp_path: Path) -> None:
    record = inspect_file(
        written(tmp_path, pairs(LLM, 64, prefix=HF), config=CONFIG | {"use_rslora": True, "lora_alpha": 8})
    )
    assert record.headline == (
        "Rank-stabilised: alpha / sqrt(rank) = 5.657. Loaders that ignore alpha are 5.657x too weak."
    )


@pytest.mark.parametrize("words", ["the merged model is different", "after merging it is worse"])
def test_a_merge_that_is_not_right_is_a_symptom(words: str) -> None:
    assert symptoms_of(words)[-1] == "merged model"


def test_a_repair_that_waits_for_an_alpha_is_said(tmp_path: Path) -> None:
    """diffusers puts `transformer.` twice before these names: its own converter says so."""
    names = [f"transformer_blocks.{number}.attn.to_q" for number in range(60)]
    halves = ("lora_A.default.weight", "lora_B.default.weight")
    path = written(tmp_path, pairs(names, 3072, prefix="transformer.", halves=halves))
    said = dict(lines(diagnose(path, tool="diffusers")))
    assert "finds no module" in said["tool"]
    assert said["do"].startswith("give the alpha of the training, --lora-alpha N: `repair --to diffusers` then writes")


def test_ollama_reads_what_llama_cpp_does_and_has_no_field_for_a_strength(tmp_path: Path) -> None:
    """Its own import of a PEFT folder permutes A, and B is left as it was (convert/convert_llama_adapter.go)."""
    config = CONFIG | {"lora_alpha": 8, "use_rslora": True}
    said = dict(lines(diagnose(written(tmp_path, pairs(LLM, 64, prefix=HF), config=config), tool="ollama")))
    assert "leaves the rows of q and k in an order" in said["tool"]
    assert said["pass"] == "nothing to pass: multiply the alpha of the file by 1.41421"
    assert said["do"].endswith("and name that file in ADAPTER")


FLUX_BLOCKS = ["double_blocks_0_img_attn_proj", "double_blocks_1_txt_attn_proj"]


@pytest.mark.parametrize(
    ("layers", "effect"),
    [(FLUX_BLOCKS, "law"), ([*FLUX_BLOCKS, "time_in_out_layer"], "drops")],
)
def test_stable_diffusion_cpp_finds_blocks_but_no_embedders(layers: list[str], effect: str, tmp_path: Path) -> None:
    """It replaces underlines by dots but in names that its list protects (convert_sep_to_dot)."""
    tensors = pairs(layers, 3072, halves=DOWN, prefix="lora_unet_")
    assert asked(written(tmp_path, tensors), lora_alpha=2.0)["sd.cpp"].effect == effect


def test_a_language_model_is_asked_for_no_picture(tmp_path: Path) -> None:
    folder = written(tmp_path, pairs(LLM, 64, prefix=HF), config=CONFIG)
    said = " ".join(line for _, line in lines(diagnose(folder, tool="vllm", saw="noise")))
    assert "with a quarter of its alpha: is what it writes sound?" in said
    assert "picture" not in said


@pytest.mark.parametrize(
    ("layers", "shapes", "model"),
    [
        (["layers.0.attention.qkv"], (3840, 2304), "Lumina 2"),
        (["layers.0.attention.qkv"], (11520, 3840), "Z-Image"),
        (["context_embedder", "transformer_blocks.0.attn.to_q"], (3072, 3584), "of other sizes or depth"),
        (["transformer_blocks.0.attn2.to_k"], (2048, 1024), "Cosmos or Anima"),
        (["transformer_blocks.0.attn2.to_k"], (2048, 2048), "LTX-Video"),
        (["layers.0.cross_attn.q_proj"], (2048, 2048), "ACE-Step 1.5"),
        (["llm.layers.0.self_attn.qkv_proj"], (9216, 3072), "OmniGen"),
    ],
)
def test_a_model_is_told_by_the_sizes_of_its_layers(
    layers: list[str], shapes: tuple[int, int], model: str, tmp_path: Path
) -> None:
    first, *others = layers
    tensors = pairs(others, 3072, prefix="transformer.")
    tensors |= {f"transformer.{first}.lora_A.weight": (2, shapes[1])}
    tensors |= {f"transformer.{first}.lora_B.weight": (shapes[0], 2)}
    assert model in dict(lines(diagnose(written(tmp_path, tensors))))["file"]


def test_a_prefix_of_denoisers_makes_no_language_model_of_a_decoder(tmp_path: Path) -> None:
    """HiDream-O1 is trained so by musubi-tuner: its layers are those of Qwen3-VL."""
    tensors = pairs([layer.replace(".", "_") for layer in LLM], 64, halves=DOWN, prefix="lora_unet_model_")
    assert asked(written(tmp_path, tensors), lora_alpha=2.0)["musubi-tuner"].effect == "unknown"


@pytest.mark.parametrize(
    ("width", "model"), [(2048, "HunyuanVideo 1.5"), (3584, "HunyuanImage 2.1"), (3072, "HunyuanVideo")]
)
def test_models_of_hunyuan_are_told_by_their_width(width: int, model: str, tmp_path: Path) -> None:
    layers = ["double_blocks_0_img_attn_q", "double_blocks_0_img_mod_linear"]
    told = dict(lines(diagnose(written(tmp_path, pairs(layers, width, halves=DOWN, prefix="lora_unet_")))))
    assert told["file"].startswith(f"{model} LoRA")


def test_who_has_a_complaint_is_not_told_to_do_nothing(tmp_path: Path) -> None:
    layers = ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_k"]
    path = written(tmp_path, pairs(layers, 3072, prefix="transformer."))
    told = [dict(lines(diagnose(path, tool="diffusers", saw=saw))) for saw in (None, "noise")]  # type: ignore[arg-type]
    assert told[0]["do"] == "nothing else"
    assert told[1]["do"] == "if that is what you passed, try the causes below, from the first on"
    assert "1 is rank / alpha times too strong" in told[1]["cause 1"]
