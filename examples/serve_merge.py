"""A server in Python: started once, one line of JSON per load in, one out.

lora-harness check "serve:python examples/serve_merge.py"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from merge_cmd import merge
from safetensors.torch import load_file, save_file

print(json.dumps({"protocol": 1, "name": "merge"}), flush=True)
for line in sys.stdin:
    ask = json.loads(line)
    try:
        save_file(merge(load_file(ask["model"]), Path(ask["lora"]), ask["strength"]), ask["out"])
        answer = {"done": True}
    except NotImplementedError as error:
        answer = {"refused": str(error)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps({"id": ask["id"], **answer}), flush=True)
