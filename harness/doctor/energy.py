"""How strong each update ΔW = s * B @ A is, exactly and without ever forming it: from matrices of rank size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from harness.doctor.advice import advise
from harness.doctor.base import BaseWeights
from harness.doctor.record import FileRecord, Hazard, ModuleEnergy
from harness.files.text import count, printable

if TYPE_CHECKING:
    from torch import Tensor

    from harness.files import LoraAdapter

_CHUNK = 4096  # columns per float32 product; longer sums are done in float64
_LEADING = 8
_SYMMETRIC_PAYS = 64  # columns from which half the products save more than another library's call costs
_TRUST_GRAM = 1e-3  # a Gram matrix squares the condition number: smaller ratios of singular values need QR


def with_energy(record: FileRecord, adapter: LoraAdapter, base: Path | str | None = None) -> FileRecord:
    """Return `record` with the energy of every low-rank pair, hazard LH707, and what the energies advise.

    Raises:
        LoraFileError: `base` cannot be read.
    """
    weights = BaseWeights.open(base) if base is not None else None
    found = energies(adapter, weights)
    broken = [name for name, energy in found.items() if not energy.finite]
    hazards = list(record.hazards)
    if broken:
        what = f"NaN or infinite weights in {count(len(broken), 'module')} ({printable(broken[0], 80)})"
        hazards.append(Hazard(code="LH707", what=what))
    known = {name: energy for name, energy in found.items() if energy.finite}
    relative = {name: energy.relative for name, energy in known.items() if energy.relative is not None}
    lost = weights is not None and not weights.match(adapter)
    note = f"no module of this LoRA is a layer of {printable(base, 200)}: is it the model that it was trained on?"
    return record.model_copy(
        update={
            "notes": (*record.notes, note) if lost else record.notes,
            "hazards": tuple(sorted(hazards, key=lambda hazard: hazard.code)),
            "energy": relative if weights else {name: energy.norm for name, energy in known.items()},
            "energies": found,
            "advice": advise(adapter, found, weights),
        }
    )


def energies(adapter: LoraAdapter, base: BaseWeights | None = None) -> dict[str, ModuleEnergy]:
    """Return the energy of every module that is a pair A, B; of DoRA and biases only the low-rank part counts.

    One module is in memory at a time.
    """
    matched = base.match(adapter) if base else {}
    found = {}
    for name, module in adapter.modules.items():
        pair = "A" in module.keys and "B" in module.keys and "mid" not in module.keys
        if pair and math.isfinite(module.trained_scale):
            energy = pair_energy(*adapter.tensors(name), module.trained_scale)
            if base and name in matched and energy.finite:
                norm = base.norm(matched[name])
                energy = energy.model_copy(update={"relative": energy.norm / norm if norm else None})
            found[name] = energy
    return found


def pair_energy(a: Tensor, b: Tensor, scale: float) -> ModuleEnergy:
    """Return the energy of scale * B @ A for a: [r, in, ...] and b: [out, r, ...].

    ||BA||_F^2 = tr((B^T B)(A A^T)); the singular values of BA are those of R_B R_A^T with B = Q_B R_B, A^T = Q_A R_A.
    """
    values = singular_values(a.flatten(1), b.flatten(1)) * abs(scale)
    norm = math.sqrt(float(values.square().sum()))
    if not math.isfinite(norm):
        return ModuleEnergy(norm=0.0, spectral=0.0, singular=(), effective_rank=0.0, finite=False)
    leading = tuple(values[:_LEADING].tolist())
    return ModuleEnergy(norm=norm, spectral=leading[0], singular=leading, effective_rank=_effective_rank(values))


def singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Return the r singular values of b @ a in float64, largest first, for a: [r, in] and b: [out, r].

    All of them are NaN when a or b has an element that is not finite.
    """
    values = _from_grams(_gram(a.t()), _gram(b))
    if values is not None and values[-1] > _TRUST_GRAM * values[0]:
        return values
    if torch.isfinite(a).all() and torch.isfinite(b).all():
        return _from_qr(a, b)
    return torch.full((a.shape[0],), math.nan, dtype=torch.float64)


def _gram(columns: Tensor) -> Tensor:
    """Return columns.T @ columns: [r, r] in float64; float32 products over a few thousand rows keep 7 digits."""
    total = torch.zeros(columns.shape[1], columns.shape[1], dtype=torch.float64)
    work = torch.float64 if columns.dtype == torch.float64 else torch.float32
    for start in range(0, columns.shape[0], _CHUNK):
        total += _square(columns[start : start + _CHUNK].to(work))
    return total


def _square(wide: Tensor) -> Tensor:
    """Return wide.T @ wide; numpy asks BLAS for the symmetric product, half the work, which torch has not."""
    if wide.shape[1] < _SYMMETRIC_PAYS:
        return wide.t() @ wide
    array = wide.numpy()
    return torch.from_numpy(array.T @ array)


def _from_grams(gram_a: Tensor, gram_b: Tensor) -> Tensor | None:
    """Return sqrt(eig(L^T (B^T B) L)) with A A^T = L L^T, or None when A has no full rank or is not finite."""
    root, failed = torch.linalg.cholesky_ex(gram_a)
    small = root.t() @ gram_b @ root
    if failed or not torch.isfinite(small).all():
        return None
    squares: Tensor = torch.linalg.eigvalsh(small)
    return squares.clamp_min(0).sqrt().flip(0)


def _from_qr(a: Tensor, b: Tensor) -> Tensor:
    """The same by QR of the halves in float64: small singular values keep their digits."""
    r_a = torch.linalg.qr(a.double().t(), mode="r").R
    r_b = torch.linalg.qr(b.double(), mode="r").R
    values = torch.linalg.svdvals(r_b @ r_a.t())
    full = torch.zeros(a.shape[0], dtype=torch.float64)
    full[: len(values)] = values
    return full


def _effective_rank(values: Tensor) -> float:
    """Return exp(entropy of the normalised singular values), 0 for a zero matrix (Roy and Vetterli, 2007)."""
    total = float(values.sum())
    if total == 0:
        return 0.0
    shares = values / total
    return math.exp(float(-torch.special.xlogy(shares, shares).sum()))
