from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import QwenImagePipeline

from harness.errors import UserError
from harness.files import LoraWeights, write_lora
from harness.images import base_pipeline, lora_file, open_pipeline, read_prompts, run_sweep
from harness.images.reference import Reference, open_lora
from harness.images.sampling import Pair, Sampler

from .subjects import times
from .tiny_pipelines import ALL

pytestmark = pytest.mark.images


def lora_for_model(model: torch.nn.Module, path: Path, form: str, strength: float) -> Path:
    """Write a random LoRA (rank 4, alpha 2) over the attention of any diffusers denoiser."""
    generator = torch.Generator().manual_seed(0)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "attn" in n and "to_" in n}
    weights = {
        name: LoraWeights(
            0.2 * torch.randn(4, layer.in_features, generator=generator),
            strength * torch.randn(layer.out_features, 4, generator=generator),
            2.0,
        )
        for name, layer in layers.items()
    }
    return write_lora(path, form, weights)


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_saved_pipeline_of_any_class_is_swept_and_a_wrong_factor_found(name: str, tmp_path: Path):
    folder = ALL[name](tmp_path)
    opened = open_pipeline(folder, steps=3, size=32)
    lora = lora_for_model(opened.base, tmp_path / "lora", "kohya", 20.0 if name == "qwen-image" else 2.0)
    found = run_sweep(
        times(2), pipeline=opened, lora=lora, alphas=(0, 0.5, 1), prompts=["red cat", "a mat"], progress=False
    )
    assert found.verdicts[0].code in ("LH601", "LH602")
    assert found.verdicts[0].estimated_factor == pytest.approx(2, rel=0.1)
    right = run_sweep(
        times(1), pipeline=opened, lora=lora, alphas=(0, 0.5, 1), prompts=["red cat", "a mat"], progress=False
    )
    assert right.verdicts[0].outcome == "passed"


def test_the_committed_pipeline_opens_with_plain_diffusers():
    pipe = QwenImagePipeline.from_pretrained(base_pipeline(), text_encoder=None, tokenizer=None)
    assert sum(p.numel() for p in pipe.transformer.parameters()) == pytest.approx(1.4e6, rel=0.05)
    size = sum(path.stat().st_size for path in base_pipeline().rglob("*.safetensors"))
    assert size <= 6_000_000


def test_the_same_seed_gives_the_same_picture_in_any_batch(tiny):
    pairs = [Pair(prompt, seed) for prompt in tiny.prompts[:2] for seed in (0, 1)]
    together = Sampler(tiny, pairs).images(tiny.fresh())
    alone = Sampler(tiny, pairs, batch=1).images(tiny.fresh())
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.05


def test_the_reference_is_pefts_merge(tiny, r8_a16):
    from peft import PeftModel

    reference = Reference(tiny, open_lora(r8_a16, tiny)).at(1.0)
    merged = PeftModel.from_pretrained(tiny.fresh(), str(r8_a16)).merge_and_unload()
    for (name, one), other in zip(reference.state_dict().items(), merged.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=name)


def test_the_merged_lora_and_its_split_form_draw_the_same():
    pairs = [Pair("red circle on dark", 0), Pair("blue cross on lake", 1)]
    pictures = []
    for name in ("r8_a16", "r8_a16_split"):
        opened = open_pipeline(base_pipeline())
        adapter = open_lora(lora_file(name, "kohya"), opened)
        pictures.append(Sampler(opened, pairs).images(Reference(opened, adapter).at(1.0)))
    torch.testing.assert_close(*pictures, atol=1e-3, rtol=0)


def test_a_missing_component_is_named(tmp_path: Path):
    folder = shutil.copytree(base_pipeline(), tmp_path / "pipe")
    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError, match=r"component 'vae' \(AutoencoderKLQwenImage\) is missing"):
        open_pipeline(folder)


def test_a_folder_that_is_no_pipeline_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"no model_index\.json"):
        open_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        open_pipeline(tmp_path)


def test_a_hub_id_is_not_fetched_unasked():
    with pytest.raises(UserError, match="only fetched when downloads are allowed"):
        open_pipeline("someone/some-model")


def test_a_damaged_weight_file_is_named(tmp_path: Path):
    folder = shutil.copytree(base_pipeline(), tmp_path / "pipe")
    next((folder / "transformer").glob("*.safetensors")).write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match="diffusers cannot open this pipeline"):
        open_pipeline(folder)


def test_a_pipeline_without_a_denoiser_is_named(tmp_path: Path):
    folder = shutil.copytree(base_pipeline(), tmp_path / "pipe")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"transformer": [None, None]}))
    with pytest.raises(UserError, match="neither a transformer nor a unet"):
        open_pipeline(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_named():
    with pytest.raises(UserError, match="sees no CUDA device"):
        open_pipeline(base_pipeline(), device="cuda")


def test_a_prompts_file_gives_its_lines(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("# colours\nred circle on dark\n\n  blue cross on lake \n")
    assert read_prompts(path) == ("red circle on dark", "blue cross on lake")


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_an_empty_prompts_file_is_named(tmp_path: Path, text: str):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=r"prompts\.txt: the prompts file holds no prompt"):
        read_prompts(path)


def test_a_word_outside_the_table_is_named(tiny):
    with pytest.raises(UserError, match="knows only the words red, green"):
        tiny.conditioning(["purple circle on dark"])
    with pytest.raises(UserError, match="prompt '': this pipeline knows only"):
        tiny.conditioning([""])


def test_prompts_of_several_lengths_are_padded_and_masked(tiny) -> None:
    call = tiny.conditioning(["red", "red circle on dark"])
    assert call["prompt_embeds_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert call["prompt_embeds"].shape[:2] == (2, 4)
    assert torch.equal(call["prompt_embeds"][0, 0], call["prompt_embeds"][1, 0])


def test_a_lora_for_another_model_is_named(tiny, tmp_path: Path):
    weights = {"down_blocks.0.attentions.0.proj_in": LoraWeights(torch.ones(2, 4), torch.ones(4, 2), 1.0)}
    with pytest.raises(UserError, match="none of its 1 module"):
        open_lora(write_lora(tmp_path / "other", "kohya", weights), tiny)


def test_a_lora_of_another_width_is_named(tiny, tmp_path: Path):
    name = "transformer_blocks.0.attn.to_out.0"
    weights = {name: LoraWeights(torch.ones(2, 64), torch.ones(64, 2), 1.0)}
    with pytest.raises(UserError, match=r"its B @ A is \(64, 64\), but the model's weight is \(96, 96\)"):
        open_lora(write_lora(tmp_path / "wide", "kohya", weights), tiny)
