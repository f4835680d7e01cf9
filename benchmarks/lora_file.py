"""LoRA files in memory, what a right loader makes of them, and what one made of them."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import re
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.magnitudes import KINDS, Change, Dora, drawn, fit
from benchmarks.zoo import Parts
from harness.errors import one_line
from harness.files import FORMATS
from harness.files.config import build
from harness.law.reads import pattern_of

MIXED = ((5, 10.5), (12, 2.75), (4, 6.0), (6, 0.625), (24, 33.0), (7, 3.5))  # rank, alpha; whole and fractional ratios
UNIFORM = ((8, 4.0),)
PREFIXES = {
    "transformer": "{component}.",
    "diffusion_model": "diffusion_model.",
    "bare": "",
    "base_model": "base_model.model.",
}
FLAT = {
    "lora_unet": "lora_unet_",
    "lora_unet__": "lora_unet__",
    "lora_transformer": "lora_transformer_",
    "lycoris": "lycoris_",
    "lora_te": "lora_te_",
}
PAIRS = {
    "processor": ("down.weight", "up.weight"),
    "A": ("lora_A.weight", "lora_B.weight"),
    "default": ("lora_A.default.weight", "lora_B.default.weight"),
    "down": ("lora_down.weight", "lora_up.weight"),
    "lora.down": ("lora.down.weight", "lora.up.weight"),
}
ROOT = "rslora"  # how a spelling is marked whose header says that alpha was divided by sqrt(rank)
SECONDS = 20
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Low:
    """The matrix b @ a [rows, columns], never formed where another one of low rank is compared with it."""

    b: torch.Tensor
    a: torch.Tensor

    def dense(self) -> torch.Tensor:
        return self.b.double() @ self.a.double()

    def dot(self, other: Low) -> float:
        """Return the sum over elements of the product with `other`."""
        return float(((self.b.double().T @ other.b.double()) * (self.a.double() @ other.a.double().T)).sum())


Update = Low | Dora | torch.Tensor


@dataclass(frozen=True)
class File:
    """A LoRA file and what a right loader makes of it: layer -> (B @ A, trained scale)."""

    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]
    expected: Mapping[str, tuple[Update, float]]
    where: Mapping[str, str]  # layer -> its name in the file


def make_file(
    names: Parts, shapes: Mapping[str, Shape], scheme: str, numbers: Sequence[tuple[int, float]], component: str
) -> File:
    """Write every name of `names` in the spelling `scheme`, ranks and alphas taken from `numbers` in turn."""
    scheme, _, marked = scheme.partition("+")
    root, dora = marked == ROOT, "" if marked == ROOT else marked
    own = FORMATS[scheme].naming if scheme in FORMATS else None
    prefix, pair, alpha = ("", "processor", "none") if own else _spelled(scheme)
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, tuple[Update, float]] = {}
    where: dict[str, str] = {}
    ranks: dict[str, tuple[int, float]] = {}
    for index, (name, every) in enumerate(names.items()):
        layers = every[:3] if scheme == "xlabs" else every  # its B has the rows of q, k and v alone, not of the MLP
        rank, number = numbers[index % len(numbers)]
        rows, kernel = [shapes[layer][0] for layer in layers], shapes[layers[0]][1:]
        written = own.write(name) if own else name
        if written is None or (dora == "in" and len(layers) > 1):
            continue  # the format has no such module; the norm over all outputs of a fused layer is no layer's own
        flat = f"{FLAT[prefix]}{written.replace('.', '_')}" if prefix in FLAT else ""
        before = FORMATS[scheme].write_prefix if own else PREFIXES.get(prefix, "").format(component=component)
        stem = flat or before + written
        parts, product = _parts(pair, rank, sum(rows), kernel, generator)
        magnitudes = drawn(dora, (sum(rows), *kernel), generator) if dora else None
        parts |= {KINDS[dora]: magnitudes} if magnitudes is not None else {}
        tensors |= {f"{stem}.{tail}": tensor for tail, tensor in parts.items()}
        tensors |= {f"{stem}.alpha": torch.tensor(number)} if alpha == "tensor" else {}
        ranks[name] = (rank, number)
        scale, at = 1.0 if alpha == "none" else number / (math.sqrt(rank) if root else rank), 0
        for layer, height in zip(layers, rows, strict=True):
            expected[layer] = _update(product, slice(at, at + height), kernel, magnitudes, dora), scale
            where[layer], at = name, at + height
    metadata = _header(ranks, component, use_dora=bool(dora), rslora=root) if alpha == "header" else {}
    return File(tensors, metadata, expected, where)


def _update(product: Rows, rows: slice, kernel: Shape, magnitudes: torch.Tensor | None, dora: str) -> Update:
    update = product(rows)
    if magnitudes is None:
        return update
    assert isinstance(update, Low)
    return Dora(update.dense(), kernel, magnitudes if dora == "in" else magnitudes.flatten()[rows], dora == "in")


def _spelled(scheme: str) -> tuple[str, str, str]:
    """Cut `transformer.lora.down.none` into prefix, halves and home of alpha."""
    prefix, rest = scheme.split(".", 1)
    pair, _, alpha = rest.rpartition(".")
    return prefix, pair, alpha


Rows = Callable[[slice], Update]  # rows of the update without its scale, [rows, columns]


def _parts(
    pair: str, rank: int, height: int, kernel: Shape, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], Rows]:
    """Draw the tensors of one module, by the tail of their keys, and say what they multiply to."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 8

    columns = math.prod(kernel)
    if pair == "lokr":
        out, into = _factor(height), _factor(columns)
        parts = {
            "lokr_w1": draw(out, into),
            "lokr_w2_a": draw(height // out, rank),
            "lokr_w2_b": draw(rank, columns // into),
        }
        return parts, lambda rows: torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])[rows]
    if pair == "loha":
        parts = {
            f"hada_w{i}_{half}": draw(*((height, rank) if half == "a" else (rank, columns)))
            for i in "12"
            for half in "ab"
        }
        return (
            parts,
            lambda rows: (
                (parts["hada_w1_a"][rows] @ parts["hada_w1_b"]) * (parts["hada_w2_a"][rows] @ parts["hada_w2_b"])
            ),
        )
    down, up = PAIRS[pair]
    parts = {down: draw(rank, *kernel), up: draw(height, rank, *(1 for _ in kernel[1:]))}
    return parts, lambda rows: Low(parts[up][rows].flatten(1), parts[down].flatten(1))


def _factor(number: int) -> int:
    return next(each for each in (4, 3, 2, 1) if number % each == 0)


def _header(ranks: Mapping[str, tuple[int, float]], component: str, *, use_dora: bool, rslora: bool) -> dict[str, str]:
    config = build({n: r for n, (r, _) in ranks.items()}, {n: a for n, (_, a) in ranks.items()}, rslora=rslora)
    config |= {"target_modules": sorted(ranks), "peft_type": "LORA", "use_dora": use_dora}
    return {"format": "pt", "lora_adapter_metadata": json.dumps({f"{component}.{k}": v for k, v in config.items()})}


UNSET = torch.empty(0, device="meta")  # what a layer got whose factors were put in and never set
Deltas = Mapping[str, Update | Change]
Reader = Callable[[Path, float], Deltas]  # what every layer got, for the file at a path and the strength passed


def outcome(reader: Reader, file: File, strength: float = 1.0) -> Any:
    """Return `ok`, `nothing`, {"raises": ...}, or what was dropped, never set, has another factor or another matrix."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        save_file({k: t.contiguous() for k, t in file.tensors.items()}, path, metadata=dict(file.metadata) or None)
        try:
            with torch.no_grad(), limited(), quiet():
                deltas = reader(path, strength)
        except TimeoutError:
            return {"hangs": f"no answer in {SECONDS} s"}
        except Exception as error:  # whatever a loader raises is what it does
            return {"raises": re.split(r"['\"`{\[]", one_line(error))[0].strip()[:90]}
    return _judged(file, deltas)


def _judged(file: File, deltas: Deltas) -> Any:
    found: dict[str, Any] = {}
    fits = {layer: _fit(deltas.get(layer), *expected) for layer, expected in file.expected.items()}
    if {kind for kind, _ in fits.values()} == {"plain"}:
        return "magnitudes ignored"
    if _ignores_alpha(file, fits):
        return "alpha ignored"
    if {kind for kind, _ in fits.values()} == {"unset"}:
        return "weights never set"
    for layer, (kind, value) in fits.items():
        if kind == "factor":
            found.setdefault("factor", {}).setdefault(pattern_of(file.where[layer]), set()).add(value)
        else:
            found.setdefault(kind, set()).add(pattern_of(file.where[layer]))
    if set(found) <= {"ok"}:
        return "ok"
    if set(found) == {"dropped"}:
        return "nothing"
    shown = {kind: sorted(each) for kind, each in found.items() if kind in ("dropped", "unset", "plain", "other")}
    if "factor" in found:
        shown["factor"] = {name: sorted(each) for name, each in sorted(found["factor"].items())}
    return shown


def _ignores_alpha(file: File, fits: Mapping[str, tuple[str, float]]) -> bool:
    """Tell whether every layer got B @ A times 1, where alpha / rank asks for something else in some."""
    scales = [(file.expected[layer][1] * value, kind) for layer, (kind, value) in fits.items()]
    return all(abs(s - 1) < 0.005 and k in ("ok", "factor") for s, k in scales) and ("factor" in {k for _, k in scales})


def _fit(delta: Update | Change | None, product: Update, scale: float) -> tuple[str, float]:
    if delta is None:
        return "dropped", 0.0
    if delta is UNSET:
        return "unset", 0.0
    if isinstance(product, Dora):
        assert isinstance(delta, Change)
        return fit(delta, product, scale), 1.0
    assert not isinstance(delta, Change | Dora)
    if isinstance(delta, Low) and isinstance(product, Low):
        own, dot, whole = delta.dot(delta), delta.dot(product), product.dot(product)
    else:
        dense = product.dense() if isinstance(product, Low) else product.double()
        given = (delta.dense() if isinstance(delta, Low) else delta.detach().double()).reshape(dense.shape)
        own, dot, whole = float((given * given).sum()), float((given * dense).sum()), float((dense * dense).sum())
    if not own > 1e-16:
        return "dropped", 0.0
    measured, residual = dot / whole, math.sqrt(max(own - dot * dot / whole, 0.0) / own)
    if residual > 0.01:
        return "other", measured
    ratio = measured / scale
    return ("ok", 1.0) if abs(ratio - 1) < 0.005 else ("factor", float(f"{ratio:.3g}"))


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise TimeoutError when the block takes longer of the processor than a load may, however busy the machine is."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what loaders print and warn of."""
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
