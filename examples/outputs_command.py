"""An engine that shows no weights: the model, a LoRA and its inputs in, what the model answers out. Right with peft.

lora-harness check "outputs:python examples/outputs_command.py {base} {lora} {strength} {input} {out}"
"""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

base, lora, strength, given, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()
for module in model.modules():
    if hasattr(module, "set_scale"):
        module.set_scale("default", float(strength))
with torch.no_grad():
    save_file({"logits": model(**load_file(given)).logits}, out)
