"""What is done with each layout that tools write: read, inspect, verify a right merge of it, repair it.

    python -m benchmarks.layouts

Writes docs/layouts.md. The base of each file has a layer of the right shape for every module, called as in the file;
the merge is computed here, in float32, from the published formula of each kind.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from harness.cli import main as command
from harness.doctor import FileRecord, inspect_file
from harness.errors import LoraFileError
from harness.files import LoraAdapter, LoraModule, read_lora
from tests.cases.layouts import BUILT, Layout, foreign, seen

OUT = Path(__file__).parents[1] / "docs" / "layouts.md"
HEAD = """# Layouts

What lora-harness does with files as tools write them, made by `python -m benchmarks.layouts`: the layouts of
`tests/cases`, seen in public places or written by the rules of the tool. *verify* is asked about a right merge into a
synthetic base whose layers have the names of the file (its exit code and first line), *repair* for a file in the same
format; where alpha is unknown, both are told `--lora-alpha` 16.

| layout | read as | inspect | verify | repair |
| --- | --- | --- | --- | --- |
"""


def _delta(adapter: LoraAdapter, name: str) -> Tensor | None:
    """Return what one unit of scale adds to the weight of a module; None where this script has no formula."""
    keys = adapter.modules[name].keys
    part = {role: adapter.part(name, role).float() for role in keys if role != "alpha"}
    if "magnitude" in part or "mid" in part or "hada_t1" in part:
        return None
    if "A" in part and "B" in part:
        product = part["B"].flatten(-1 if part["B"].ndim == 3 else 1) @ part["A"].flatten(
            -1 if part["A"].ndim == 3 else 1
        )
        return (
            product.reshape(*product.shape[:-1], *part["A"].shape[-1:])
            if part["A"].ndim < 4
            else product.reshape(product.shape[0], *part["A"].shape[1:])
        )
    if "hada_w1_a" in part:
        return (part["hada_w1_a"] @ part["hada_w1_b"]) * (part["hada_w2_a"] @ part["hada_w2_b"])
    if any(role.startswith("lokr_w1") for role in part):
        first, second = (part[w] if w in part else part[f"{w}_a"] @ part[f"{w}_b"] for w in ("lokr_w1", "lokr_w2"))
        return torch.kron(first, second)
    return part.get("diff")


def _merge(adapter: LoraAdapter, alpha: float | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    base: dict[str, Tensor] = {}
    merged: dict[str, Tensor] = {}
    for name, module in adapter.modules.items():
        found = list(_tensors(adapter, name, module, alpha))
        if not found:
            raise LookupError(f"no formula for {module.variant} here")
        for tensor, before, after in found:
            if tensor in base:
                raise LookupError("several components with layers of one name")
            base[tensor], merged[tensor] = before, after
    return base, merged


def _tensors(
    adapter: LoraAdapter, name: str, module: LoraModule, alpha: float | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    own = module.variant == "experts"
    weight, bias = module.name if own else f"{module.name}.weight", f"{module.name}.bias"
    delta = _delta(adapter, name)
    delta = delta.t() if delta is not None and adapter.config.get("fan_in_fan_out") else delta
    if delta is None and "set_bias" in module.keys and "set_weight" not in module.keys:
        yield weight, torch.ones(4), torch.ones(4)
    if delta is not None:
        scale = alpha / module.rank if alpha and module.alpha is None and module.rank else module.trained_scale
        before = torch.randn(delta.shape) * delta.std() * scale
        yield weight, before, before + scale * delta
    for role, tensor in (("diff_b", bias), ("b_norm", bias), ("w_norm", weight), ("bias", bias)):
        if role in module.keys:
            change = adapter.part(name, role).float() * (module.trained_scale if role == "bias" else 1)
            yield tensor, torch.zeros_like(change), change
    for role, tensor in (("set_weight", weight), ("set_bias", bias), ("base_copy", weight)):
        if role in module.keys and not (role == "base_copy" and delta is not None):
            new = adapter.part(name, role)
            yield tensor, torch.randn(new.shape).to(new.dtype), new
    if "token_rows" in module.keys and (rows := adapter.token_indices(name)):
        new = adapter.part(name, "token_rows").float()
        before = torch.randn(max(rows) + 9, new.shape[1])
        after = before.clone()
        after[list(rows)] = new
        yield weight, before, after


def _asked(*args: str) -> tuple[int, str]:
    done = CliRunner().invoke(command, list(args))
    lines = [line.strip() for line in (done.output or str(done.exception or "")).splitlines() if line.strip()]
    return done.exit_code, lines[0] if lines else ""


def _cell(text: str, limit: int = 90) -> str:
    text = re.sub(r"(?<!\S)/\S*/[^\s:]*:? ?", "", text.removeprefix("error: ")).replace("|", "/")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _row(layout: Layout, folder: Path) -> str:
    path = layout.write(folder)
    record = inspect_file(path)
    said = ", ".join(dict.fromkeys(record.codes)) or "no hazard"
    if not record.readable:
        return f"| {layout.name} | no LoRA | {said} | – | – |"
    adapter = read_lora(path, strict=False)
    alpha = 16.0 if "LH701" in record.codes else None
    told = [] if alpha is None else ["--lora-alpha", f"{alpha:g}"]
    cells = [_read(record), said, _verified(adapter, path, folder, alpha, told), _repaired(record, path, folder, told)]
    return "| " + " | ".join([layout.name, *map(_cell, cells)]) + " |"


def _read(record: FileRecord) -> str:
    ranks = f", rank {', '.join(record.ranks)}" if record.ranks else ""
    return f"{record.format}: {', '.join(record.variants)}{ranks}"


def _verified(adapter: LoraAdapter, path: Path, folder: Path, alpha: float | None, told: list[str]) -> str:
    try:
        base, merged = _merge(adapter, alpha)
    except (LoraFileError, RuntimeError, LookupError) as error:
        return f"not tried: {error.args[0] if isinstance(error, LookupError) else error}"
    for name, tensors in (("base", base), ("merged", merged)):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    code, said = _asked(
        "verify", "--base", str(folder / "base.safetensors"), "--merged", str(folder / "merged.safetensors"), "--lora",
        str(path), *told,
    )  # fmt: skip
    return f"{code}: {said}"


def _repaired(record: FileRecord, path: Path, folder: Path, told: list[str]) -> str:
    code, said = _asked(
        "repair", str(path), "--to", str(record.format), "--out", str(folder / f"{path.stem}-out"), *told
    )
    return "written" if code == 0 else said


def main() -> None:
    """Write the table."""
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, layout in enumerate([*seen(), *BUILT, *(layout for layout, _ in foreign())]):
            place = Path(folder) / str(number)
            place.mkdir()
            rows.append(_row(layout, place))
    OUT.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    print(OUT)


if __name__ == "__main__":
    main()
