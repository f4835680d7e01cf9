"""Questions in a user's own words lead to symptoms, and those to codes."""

from __future__ import annotations

import pytest

from harness.law.explained import _examples, symptoms, symptoms_of
from harness.verdict.codes import CODES


@pytest.mark.parametrize(
    ("asked", "symptom"),
    [
        ("lora not loaded", "no effect"),
        ("my LoRA doesn't change anything", "no effect"),
        ("the text encoder part is ignored", "no effect"),
        ("looks nothing like me", "no effect"),
        ("grey video", "noise"),
        ("garbled text from vllm", "noise"),
        ("blurry faces", "artifacts"),
        ("burned images", "burnt"),
        ("size mismatch for lora_A", "wrong model"),
        ("unexpected keys in state dict", "cannot load"),
        ("ComfyUI crashes", "error"),
        ("style too subtle", "too weak"),
        ("only works at strength 10", "wrong strength"),
        ("works in comfyui but not in diffusers", "does not work"),
        ("stacking two loras", "second lora"),
        ("unfuse does not restore the base", "stays after unloading"),
        ("lora key not loaded: lora_unet_double_blocks_0_img_mlp_fc1.alpha", "no effect"),
        ("UserWarning: Found missing adapter keys while loading the checkpoint", "target modules"),
        ("ERROR lora blocks.16.self_attn.q.weight shape '[5, 5]' is invalid for input of size 9", "wrong model"),
        ("the output is the same with and without the lora", "no effect"),
        ("works at 0.03 but not at 1.0", "wrong strength"),
    ],
)
def test_what_people_say_is_a_symptom(asked: str, symptom: str) -> None:
    assert symptom in symptoms_of(asked)


def test_symptoms_that_are_named_are_the_only_ones() -> None:
    assert symptoms_of("slider does nothing") == ["does nothing"]
    assert symptoms_of("sampler gives noise") == ["noise"]
    assert symptoms_of("merged model gives noise") == ["noise", "merged model"]
    assert symptoms_of("the weather") == []


def test_every_symptom_leads_to_codes_and_every_other_word_to_a_symptom() -> None:
    assert set(_examples()["also"].values()) <= symptoms().keys()
    assert {code for codes in symptoms().values() for code in codes} <= CODES.keys()
