"""What is fuzzed: a name, the files that mutations start from, and what reads them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save, save_file

from harness.checks.known import read_known_failures
from harness.doctor import inspect_file, repair_file, verify_merge
from harness.doctor.audit.output import read_rows
from harness.doctor.audit.rows import audit_file
from harness.errors import UserError
from harness.files import FORMATS, LoraParts, LoraWeights, read_lora, write_lora
from harness.isolation.frames import FrameError, Frames, pack
from harness.report.ci import sarif, step_summary
from harness.report.history import history_text, read_history
from harness.report.records import Run, read_run

ROOT = Path(__file__).parents[2]
LORAS = ROOT / "fixtures" / "loras"


@dataclass(frozen=True)
class Target:
    """`read` gets the path of a mutated file called `name`; of exceptions it may raise `allowed` only."""

    read: Callable[[Path], object]
    name: str
    seeds: tuple[bytes, ...]
    allowed: tuple[type[Exception], ...] = (UserError,)


def _peft_folder(path: Path) -> object:
    """Read the mutated configuration beside right weights."""
    weights = path.with_name("adapter_model.safetensors")
    if not weights.exists():
        weights.symlink_to(LORAS / "r16_a4_rslora" / "peft" / "adapter_model.safetensors")
    return inspect_file(path.parent)


def _repair(path: Path) -> object:
    """Write the mutated file again, in a format that its bytes choose."""
    to = list(FORMATS)[zlib.crc32(path.read_bytes()) % len(FORMATS)]
    with TemporaryDirectory(dir=path.parent) as folder:
        return repair_file(path, to, Path(folder) / "out", lora_alpha=4.0)


def _repair_folder(path: Path) -> object:
    weights = path.with_name("adapter_model.safetensors")
    if not weights.exists():
        weights.symlink_to(LORAS / "r16_a4_rslora" / "peft" / "adapter_model.safetensors")
    with TemporaryDirectory(dir=path.parent) as folder:
        return repair_file(path.parent, "peft", Path(folder) / "out")


@cache
def _checkpoint() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"{name}.weight": torch.randn(*shape, generator=generator) for name, shape in _LAYERS.items()}


def _verify_lora(path: Path) -> object:
    """Verify a merge of nothing with the mutated file."""
    base = path.with_name("base.safetensors")
    if not base.exists():
        save_file(_checkpoint(), base)
    return verify_merge(base, base, path)


def _verify_merged(path: Path) -> object:
    """Verify the mutated checkpoint with a right LoRA."""
    base, lora = path.with_name("base.safetensors"), path.with_name("lora.safetensors")
    if not lora.exists():
        save_file(_checkpoint(), base)
        lora.write_bytes(_ODD[0])
    return verify_merge(base, path, lora)


def _run_read(path: Path) -> object:
    run: Run = read_run(path)
    return run.status, step_summary(run), json.dumps(sarif(run))


def _frames(path: Path) -> object:
    return list(Frames().feed(path.read_bytes()))


def _small(paths: Iterable[Path]) -> tuple[bytes, ...]:
    return tuple(path.read_bytes()[:40_000] for path in sorted(paths))


_LAYERS = {"blocks.0.q": (6, 4), "blocks.1.q": (6, 4), "blocks.0.conv": (4, 2, 3, 3), "blocks.0.norm": (4,)}


def _odd_loras() -> tuple[bytes, ...]:
    """Return files with modules of every kind, which the committed ones do not have."""
    draw = torch.randn
    pair = LoraWeights(draw(2, 4), draw(6, 2), 4.0)
    loha = {"hada_w1_a": draw(6, 2), "hada_w1_b": draw(2, 4), "hada_w2_a": draw(6, 2), "hada_w2_b": draw(2, 4)}
    lokr = {"lokr_w1": draw(2, 2), "lokr_w2_a": draw(3, 1), "lokr_w2_b": draw(1, 2)}
    dora = {"A": draw(2, 4), "B": draw(6, 2), "magnitude": draw(6, 1)}
    conv = LoraWeights(draw(2, 2, 3, 3), draw(4, 2, 1, 1), 1.0)
    others = [LoraParts(parts, 2.0) for parts in (loha, lokr, dora, {"diff": draw(6, 4)})]
    found = []
    with TemporaryDirectory() as folder:
        for format in ("kohya", "comfyui"):
            for odd in others:
                modules = {"blocks.0.q": pair, "blocks.1.q": odd, "blocks.0.conv": conv}
                found.append(write_lora(Path(folder) / "x", format, modules).read_bytes())
    return tuple(found)


with torch.random.fork_rng():
    torch.manual_seed(0)
    _ODD = _odd_loras()
_SAFETENSORS = _small(LORAS.glob("r*/*.safetensors"))
_HISTORY = json.dumps({"kind": "history", "run_id": "a", "created": "2026-01-01T00:00:00+00:00", "status": "passed"})
_HEADER = json.dumps({"kind": "header", "run_id": "a", "created": "2026-01-01T00:00:00+00:00", "command": "x"})
_VERDICT = json.dumps(
    {"kind": "verdict", "loader": "a", "check": "scale", "outcome": "failed", "code": "LH201", "format": "peft"}
)
_FILE = json.dumps({"kind": "file", "path": "a", "hazards": [{"code": "LH705", "what": "x"}], "ranks": {"4": 2}})
_FOOTER = json.dumps({"kind": "footer", "counts": {"failed": 1}, "seconds": 1.0, "exit_code": 1})
_GGUF = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") * 2

_NIGHTS = f"{_HISTORY}\n{_HISTORY}\n".encode()
_CONFIGS = _small(LORAS.glob("*/peft/adapter_config.json"))
_KNOWN = _small((ROOT / "fixtures" / "known_failures").glob("d*.toml"))

TARGETS = {
    "safetensors": Target(lambda path: read_lora(path, strict=False), "x.safetensors", _SAFETENSORS),
    "inspect": Target(inspect_file, "x.safetensors", _SAFETENSORS),
    "audit row": Target(lambda path: audit_file(str(path), energy=False), "x.safetensors", _SAFETENSORS),
    "repair": Target(_repair, "x.safetensors", (*_ODD, *_SAFETENSORS)),
    "repair of a configuration": Target(_repair_folder, "adapter_config.json", _CONFIGS),
    "verify": Target(_verify_lora, "x.safetensors", _ODD),
    "verify of a checkpoint": Target(_verify_merged, "x.safetensors", (save(_checkpoint()),)),
    "gguf": Target(inspect_file, "x.gguf", (_GGUF, _GGUF + b"\x18\0\0\0\0\0\0\0adapter.lora.alpha\x06\0\0\0")),
    "adapter_config.json": Target(_peft_folder, "adapter_config.json", _CONFIGS),
    "run.jsonl": Target(_run_read, "run.jsonl", ("\n".join([_HEADER, _VERDICT, _FILE, _FOOTER]).encode(),)),
    "history.jsonl": Target(lambda p: history_text(read_history(p)), "history.jsonl", (_NIGHTS,)),
    "rows.jsonl": Target(read_rows, "rows.jsonl", (f"{_FILE}\n{_FILE}\n".encode(),)),
    "known failures": Target(read_known_failures, "known.toml", _KNOWN),
    "frames": Target(_frames, "frames", (pack({"number": 1, "answer": {"others": []}}) * 2,), (FrameError,)),
}  # fmt: skip
