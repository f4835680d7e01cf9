"""What a user would write instead, run by `benchmarks.peers` in a process of its own:

python -m benchmarks.rivals {merged BASE MERGED LORA | norms BASE LORA | read FILE}
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path


def merged(base: str, found: str, lora: str) -> int:
    """Merge with PEFT and compare with what is there, tensor by tensor; 1 when one differs."""
    import torch
    from safetensors.torch import load_file

    wanted = adapted(base, lora).merge_and_unload().state_dict()
    tensors = load_file(Path(found) / "model.safetensors")
    return int(not all(torch.equal(wanted[name], tensor) for name, tensor in tensors.items()))


def norms(base: str, lora: str) -> int:
    """Print ||ΔW|| of every layer that PEFT adapts, by its own dense update."""
    import torch
    from peft.tuners.lora import LoraLayer

    layers = {name: layer for name, layer in adapted(base, lora).named_modules() if isinstance(layer, LoraLayer)}
    updates = ((name, layer.get_delta_weight("default")) for name, layer in layers.items())
    found = {name: float(torch.linalg.vector_norm(update, dtype=torch.float64)) for name, update in updates}
    print(json.dumps({name.removeprefix("base_model.model."): norm for name, norm in found.items()}))
    return 0


def adapted(base: str, lora: str):  # type: ignore[no-untyped-def]
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, local_files_only=True)
    return PeftModel.from_pretrained(model, lora)


def read(path: str) -> int:
    """Read every tensor."""
    from safetensors.torch import load_file

    print(len(load_file(path)), "tensors")
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit({"merged": merged, "norms": norms, "read": read}[sys.argv[1]](*sys.argv[2:]))
