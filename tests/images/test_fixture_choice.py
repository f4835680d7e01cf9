"""Which loaders can be shown in pictures: those that take one of the committed LoRAs."""

from __future__ import annotations

import pytest

from harness.errors import UserError
from harness.images import has_lora_for, lora_for


def test_merged_layers_come_first_and_a_loader_of_another_model_has_none() -> None:
    both = [("peft", "qwen-image"), ("kohya", "qwen-image-fused")]
    assert has_lora_for(both)
    assert lora_for(both).parent.name == "r8_a16"
    assert lora_for(both[:1]).parent.name == "r8_a16_split"
    assert not has_lora_for([("diffusers", "flux"), ("gguf", "qwen-image")])
    with pytest.raises(UserError, match="takes diffusers on flux, but the committed LoRAs are peft, kohya"):
        lora_for([("diffusers", "flux")])
