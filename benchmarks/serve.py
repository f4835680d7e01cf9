"""How long a cell takes through `serve:` beside the same loader in the harness's own process."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tools import judged, table

ROOT = Path(__file__).parents[1]
AIM = 2.0
INSIDE = """
import sys
from pathlib import Path
sys.path.insert(0, {examples!r})
from merge_cmd import merge
def load(model, lora, *, strength=1.0):
    model.load_state_dict(merge(model.state_dict(), Path(lora), strength), strict=False)
"""


def seconds(loader: str, most: int) -> tuple[float, float]:
    """Return the wall and processor time of one cell."""
    arguments = ["-m", "harness", "check", loader, "--format", "kohya", "--bench", "qwen-image", "-j", "1"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments, "--max-examples", str(most)], cwd=ROOT, check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{loader} is to be right: {(done.stdout or done.stderr).strip()[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(argv: Sequence[str] = ()) -> list[str]:
    """Measure and return the lines of a Markdown section."""
    most = 20 if "--quick" in argv else 200
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / "inside.py"
        inside.write_text(INSIDE.format(examples=str(ROOT / "examples")), encoding="utf-8")
        ways = {
            "a function": f"{inside}:load",
            "`serve:python examples/serve_merge.py`": "serve:python examples/serve_merge.py",
            "`serve:node examples/serve_merge.js`": "serve:node examples/serve_merge.js",
        }
        found = {name: seconds(loader, most) for name, loader in ways.items()}
    wall, _ = found["a function"]
    rows = []
    for name, (took, processor) in found.items():
        ratio = f"{took / wall:.2f}"
        rows.append([name, f"{took:.1f}", f"{processor:.1f}", judged(ratio, met=took <= AIM * wall)])
    head = ["loader", "wall, s", "processor, s", "wall, of the function's"]
    why = f"Aim: {AIM:g} times. One cell, {most} random examples; the same arithmetic everywhere."
    return ["## Loaders behind a server", "", why, "", *table(head, rows)]
