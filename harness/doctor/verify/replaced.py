"""Tensors that a file replaces, row by row, and the weights that PEFT's own merge makes of other methods."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.doctor.verify.measurement import MergeMeasurement, State
from harness.doctor.verify.rows import Damage, runs_of
from harness.doctor.verify.shared import CannotMergeError, ready, shared_keys
from harness.doctor.verify.vote import DTYPES, Flags, half_step
from harness.doctor.verify.weights import Weights
from harness.files import LoraAdapter

_CHUNK = 1 << 20  # elements
_BETWEEN = (torch.bfloat16, torch.float16)
_LITERAL = re.compile(r"[\w.]+")  # a pattern of a configuration that is no more than a name
_DEEPEST = 40
_SHARING = ("vera", "pvera", "randlora")  # methods whose layers share matrices of the largest layer's size
_SINGLE = ("psoft",)  # methods that begin in single precision, from factors of the weight
_LEAST_SINGLE = 2.0**-18  # of a row, which such factors lose from one machine to the next
_ROUGH = 3.0  # times the rounding of PEFT's own merge in the stored dtype, root mean square
_FOREIGN = (
    "base_model_name_or_path", "revision", "auto_mapping", "task_type", "exclude_modules", "layers_to_transform",
    "layers_pattern", "modules_to_save", "target_parameters", "peft_version", "parent_library", "loftq_config",
    "megatron_config", "megatron_core", "corda_config", "eva_config", "runtime_config",
)  # fmt: skip


@dataclass(frozen=True)
class ReplacedRows:
    """What each row of a merged tensor is: as wanted, the base's, and finite; [rows] each."""

    right: Flags
    base: Flags
    finite: Flags

    def measured(self, columns: int, *, what: str) -> MergeMeasurement:
        """Return the measurement that these rows make."""
        wrong = ~self.right
        still, odd = wrong & self.base, wrong & ~self.base & self.finite
        damaged = [Damage(*run, "other") for run in runs_of(odd)]
        damaged += [Damage(*run, "non-finite") for run in runs_of(wrong & ~self.finite)]
        return MergeMeasurement(
            state=self._state(wrong, still, odd),
            scale=1.0,
            interval=(1.0, 1.0),
            coverage=float(self.right.mean()),
            explained=float(self.right.mean()),
            changed=float((~self.base).mean()),
            overlap=0.0,
            product=0.0,
            aligned=0.0,
            elements=len(self.right) * columns,
            rows=len(self.right),
            unmerged=tuple(runs_of(still)),
            damaged=tuple(damaged),
            replaces=what,
        )

    def _state(self, wrong: Flags, still: Flags, odd: Flags) -> State:
        if not wrong.any():
            return "replaced"
        if (wrong & ~self.finite).any():
            return "not finite"
        told = ~(self.right & self.base)  # rows that the training changed
        if still[told].all():
            return "not merged"
        if odd[told].all():
            return "unexplained"
        return "damaged" if odd.any() else "partly"


def judge_saved(saved: Tensor, tensor: str, before: Weights, after: Weights) -> MergeMeasurement:
    """Compare a tensor with the one that the file saved, row by row and bit by bit, through the dtype of the merge.

    Of a vocabulary of another size the rows that both have are compared.
    """
    rows = min(len(saved), after.info(tensor).shape[0]) if saved.dim() else 1
    flat = saved.flatten(1) if saved.dim() > 1 else saved.reshape(-1, 1)

    def wanted(start: int, stop: int) -> Tensor:
        return flat[start:stop]

    return _compared(wanted, tensor, before, after, rows).measured(flat.shape[1], what="a saved tensor, bit by bit")


def judge_tokens(
    saved: Tensor, indices: Sequence[int], tensor: str, before: Weights, after: Weights
) -> MergeMeasurement:
    """Compare the rows of an embedding that the file replaces, and all others with the base's."""
    known, rows = before.info(tensor).shape[0], after.info(tensor).shape[0]

    def wanted(start: int, stop: int) -> Tensor:
        parts = [before.rows(tensor, start, min(stop, known))] if start < known else []
        parts += [after.rows(tensor, max(start, known), stop)] if stop > known else []  # new rows, of which only the
        found = torch.cat([part.to(parts[-1].dtype) for part in parts])  # trained ones can be compared
        for place, index in enumerate(indices):
            if start <= index < stop:
                found[index - start] = saved[place].to(found.dtype)
        return found

    return _compared(wanted, tensor, before, after, rows).measured(saved.shape[1], what="token rows, bit by bit")


def _compared(
    wanted: Callable[[int, int], Tensor], tensor: str, before: Weights, after: Weights, rows: int
) -> ReplacedRows:
    found: list[tuple[Flags, Flags, Flags]] = []
    columns = max(1, after.info(tensor).elements // max((*after.info(tensor).shape, 1)[0], 1))
    known = tensor in before.names and _fits(before, after, tensor)
    limit = (*before.info(tensor).shape, 1)[0] if known else 0
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        merged = after.rows(tensor, start, stop)
        right = _equal(wanted(start, stop), merged)
        base = np.zeros(stop - start, bool)
        if start < limit:
            old = before.rows(tensor, start, min(stop, limit))
            base[: len(old)] = _equal(old, merged[: len(old)])
        finite = torch.isfinite(merged if merged.dtype.itemsize > 1 else merged.float()).all(dim=1).numpy()
        found.append((right, base, finite))
    return ReplacedRows(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _fits(before: Weights, after: Weights, tensor: str) -> bool:
    return before.info(tensor).shape[1:] == after.info(tensor).shape[1:]


def _equal(wanted: Tensor, merged: Tensor) -> Flags:
    """Tell which rows are `wanted` in the dtype of the merge, also by way of a type of 16 bits."""
    ways = [wanted.to(merged.dtype)]
    if wanted.dtype != merged.dtype:
        ways += [wanted.to(between).to(merged.dtype) for between in _BETWEEN]
    same = torch.zeros(len(merged), dtype=torch.bool)
    for way in ways:
        wide = (way, merged) if merged.dtype.itemsize > 1 else (way.float(), merged.float())
        same |= ((wide[0] == wide[1]) | (wide[0].isnan() & wide[1].isnan())).all(dim=1)
    found: Flags = same.numpy()
    return found


@dataclass(frozen=True)
class MethodLayer:
    """One layer that another method than low-rank pairs adapts: module `name`, and its tensors as {`weight`: name, …}.

    `largest` is the size [out, in] that the adapted layers of the model have at most: VeRA draws matrices of that size
    and takes the part that fits each layer.
    """

    adapter: LoraAdapter
    name: str
    tensors: Mapping[str, str]
    largest: tuple[int, int]

    def judged(self, before: Weights, after: Weights) -> Iterator[tuple[str, MergeMeasurement]]:
        """Yield the tensors that PEFT's own merge of the layer changes, each compared row by row.

        PEFT merges the layer alone, in double precision and in the dtype of the base: a row may be off by what these
        two differ, and by its rounding.

        Raises:
            CannotMergeError: PEFT does not know the method, cannot merge it, or the tensors do not fit.
        """
        base = {what: before.whole(tensor) for what, tensor in self.tensors.items()}
        single = self.adapter.kind in _SINGLE
        exact = self._merged(base, torch.float32 if single else torch.float64)
        dtype = base["weight"].dtype
        rough = self._merged(base, dtype if dtype.itemsize > 1 else torch.float32)
        changed = [what for what in base if not torch.equal(exact[what], base[what].to(exact[what].dtype))]
        for what, tensor in self.tensors.items():
            if what in (changed or ["weight"]):
                if before.info(tensor).shape != after.info(tensor).shape:
                    raise CannotMergeError("the merged weight has another shape than the base's")
                parts = base[what], exact[what], rough[what], after.whole(tensor)
                what = f"{self.adapter.kind}, as PEFT merges it"
                yield tensor, _method_rows(*parts, what=what, least=_LEAST_SINGLE if single else 0.0)

    @torch.no_grad()
    def _merged(self, base: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Return what PEFT's merge makes of the layer, in a model that has it alone."""
        import peft

        adapter = self.adapter
        module = adapter.modules[self.name].name
        own = {f"base_model.model.{module}.{key.rpartition(f'{module}.')[2]}": tensor for key, tensor in self._own()}
        shared = self._shared()
        turned = bool(adapter.config.get("fan_in_fan_out"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = _Alone(module, _layer(base, dtype, turned=turned), self._largest())
                wrapped: Any = peft.get_peft_model(model, _config(adapter, module, own), autocast_adapter_dtype=False)
                found = peft.set_peft_model_state_dict(wrapped, {**shared, **own})
                ready(adapter.kind, wrapped.get_submodule(f"base_model.model.{module}"))
                layer = wrapped.to(dtype).merge_and_unload().get_submodule(module)
        except (ValueError, TypeError, LookupError, RuntimeError, AttributeError, AssertionError) as error:
            why = str(error) or type(error).__name__
            raise CannotMergeError(f"PEFT cannot merge {adapter.kind} in this layer ({why})") from error
        if unexpected := getattr(found, "unexpected_keys", None):
            raise CannotMergeError(f"PEFT does not use {unexpected[0]}")
        return {what: getattr(layer, what).detach().reshape(base[what].shape) for what in base}

    def _own(self) -> Iterator[tuple[str, Tensor]]:
        for key in self.adapter.modules[self.name].keys.values():
            yield key, self.adapter.file.tensor(key)

    def _shared(self) -> dict[str, Tensor]:
        """Return the tensors that all layers share, or that this one shares with others.

        Raises:
            CannotMergeError: nothing tells which of them.
        """
        adapter = self.adapter
        keys = [key for other in adapter.modules.values() if not other.name for key in other.keys.values()]
        chosen = shared_keys(adapter.kind, adapter.config, adapter.modules[self.name].name, keys)
        return {name: adapter.file.tensor(key) for key, name in chosen.items()}

    def _largest(self) -> nn.Module | None:
        out, columns = self.largest
        return nn.Linear(columns, out, bias=False) if self.adapter.kind in _SHARING else None


def _method_rows(
    base: Tensor, exact: Tensor, rough: Tensor, merged: Tensor, *, what: str, least: float
) -> MergeMeasurement:
    flat = [part.reshape(len(part), -1) for part in (base, exact, rough, merged)]
    name = str(merged.dtype).removeprefix("torch.")
    wanted, also, new = (part.double().numpy() for part in flat[1:])
    rounding = half_step(wanted, name) if name in DTYPES else np.zeros_like(wanted)
    allowed = np.sqrt(np.square(rounding).mean(axis=1)) + _ROUGH * np.sqrt(np.square(also - wanted).mean(axis=1))
    allowed += least * np.sqrt(np.square(wanted).mean(axis=1))
    with np.errstate(invalid="ignore"):
        off = np.sqrt(np.square(new - wanted).mean(axis=1))
        far = np.abs(new - wanted).max(axis=1)
    most = np.sqrt(new.shape[1]) + 4  # one element alone may carry all that its row may be off, and no more
    right = (off <= allowed) & (far <= most * allowed)
    stored = [part.to(merged.dtype).double() for part in flat]
    same, finite = (stored[0] == stored[3]).all(dim=1), torch.isfinite(stored[3]).all(dim=1)
    settled = (stored[1] == stored[0]).all(dim=1) | (stored[2] == stored[0]).all(dim=1)
    rows = ReplacedRows(right & (settled | ~same).numpy(), same.numpy(), finite.numpy())
    found = rows.measured(new.shape[1], what=what)
    return replace(found, state="hidden") if bool((same & settled).all()) else found


class _Alone(nn.Module):
    """A model of one layer under its own name, beside one as large as the largest of the real model if need be."""

    def __init__(self, name: str, layer: nn.Module, largest: nn.Module | None) -> None:
        super().__init__()
        parts = name.split(".")
        if len(parts) > _DEEPEST:
            raise ValueError("its name is too deep")
        parent: nn.Module = self
        for part in parts[:-1]:
            parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(parts[-1], layer)
        if largest is not None:
            self.add_module("the_largest_layer", largest)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


def _layer(base: Mapping[str, Tensor], dtype: torch.dtype, *, turned: bool) -> nn.Module:
    """Return a layer with these tensors: a norm, linear, Conv1D where `turned`, or a convolution, by their shapes."""
    weight = base["weight"]
    made: nn.Module
    if weight.dim() == 1:
        made = nn.LayerNorm(len(weight), bias="bias" in base)
    elif weight.dim() == 2 and turned:
        from transformers.pytorch_utils import Conv1D

        made = Conv1D(weight.shape[1], weight.shape[0])
    elif weight.dim() == 2:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in base)
    else:
        kind: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.dim()]
        made = kind(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias="bias" in base)
    made = made.to(dtype)
    for what, tensor in base.items():
        getattr(made, what).data = tensor.to(dtype, copy=True)  # PEFT merges in place
    return made


def _config(adapter: LoraAdapter, module: str, own: Mapping[str, Tensor]) -> Any:
    """Return the configuration for one layer: patterns are kept where they are plain names.

    Raises:
        CannotMergeError: PEFT has no such method, or a pattern that chooses its size would have to be tried.
    """
    import peft

    fields = {key: value for key, value in adapter.config.items() if key not in _FOREIGN}
    for key in ("rank_pattern", "alpha_pattern"):
        if any(not _LITERAL.fullmatch(str(pattern)) for pattern in fields.get(key) or {}):
            raise CannotMergeError(f"{key} holds regular expressions, which are not tried")
    kind = str(fields.pop("peft_type", "")).upper()
    if "progressbar" in fields:
        fields["progressbar"] = False
    fields["target_modules"] = [module, "the_largest_layer"]
    if "feedforward_modules" in fields:
        scale = next((tensor for key, tensor in own.items() if key.endswith("ia3_l")), None)
        fields["feedforward_modules"] = [module] if scale is not None and scale.shape[0] == 1 else []
    try:
        made = peft.PeftConfig.from_peft_type(**{**fields, "peft_type": kind, "inference_mode": True})
    except (KeyError, TypeError, ValueError) as error:
        raise CannotMergeError(f"PEFT does not take this configuration ({error})") from error
    return made
