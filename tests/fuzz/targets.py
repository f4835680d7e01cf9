"""What is fuzzed: a name, the files that mutations start from, and what reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.checks.known import read_known_failures
from harness.doctor import inspect_file
from harness.doctor.audit.output import read_rows
from harness.doctor.audit.rows import audit_file
from harness.errors import UserError
from harness.files import read_lora
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


def _run_read(path: Path) -> object:
    run: Run = read_run(path)
    return run.status, step_summary(run), json.dumps(sarif(run))


def _frames(path: Path) -> object:
    return list(Frames().feed(path.read_bytes()))


def _small(paths: Iterable[Path]) -> tuple[bytes, ...]:
    return tuple(path.read_bytes()[:40_000] for path in sorted(paths))


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
    "gguf": Target(inspect_file, "x.gguf", (_GGUF, _GGUF + b"\x18\0\0\0\0\0\0\0adapter.lora.alpha\x06\0\0\0")),
    "adapter_config.json": Target(_peft_folder, "adapter_config.json", _CONFIGS),
    "run.jsonl": Target(_run_read, "run.jsonl", ("\n".join([_HEADER, _VERDICT, _FILE, _FOOTER]).encode(),)),
    "history.jsonl": Target(lambda p: history_text(read_history(p)), "history.jsonl", (_NIGHTS,)),
    "rows.jsonl": Target(read_rows, "rows.jsonl", (f"{_FILE}\n{_FILE}\n".encode(),)),
    "known failures": Target(read_known_failures, "known.toml", _KNOWN),
    "frames": Target(_frames, "frames", (pack({"number": 1, "answer": {"others": []}}) * 2,), (FrameError,)),
}  # fmt: skip
