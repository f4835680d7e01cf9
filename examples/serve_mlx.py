"""mlx-lm as an engine that gives outputs, from an interpreter of its own (`pip install "mlx[cpu]" mlx-lm safetensors`).

lora-harness check "serve:/venv/bin/python examples/serve_mlx.py"
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from safetensors.numpy import load_file, save_file

hello = {"protocol": 1, "name": "mlx-lm", "version": metadata.version("mlx-lm"), "outputs": True}
print(json.dumps({**hello, "formats": ["mlx"], "strength_argument": None}), flush=True)
for line in sys.stdin:
    ask = json.loads(line)
    try:
        model, _ = load_model(Path(ask["base"]))
        model = load_adapters(model, ask["lora"])
        model.eval()
        tokens = mx.array(load_file(ask["input"])["input_ids"].astype(np.int32))
        save_file({"logits": np.array(model(tokens).astype(mx.float32))}, ask["out"])
        answer = {"done": True}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({"id": ask["id"], **answer}), flush=True)
