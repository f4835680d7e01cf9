"""Experts that answer otherwise than by their parameters: what a loader adds beside those cannot be read."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from harness.benches import Bench
from harness.measure.compare import norm
from harness.measure.effective import module_at
from harness.measure.tolerance import UNIT_ROUNDOFF

if TYPE_CHECKING:
    import torch

_ROUNDINGS = 64  # of an answer: two products and what stands between them


class UnreadableExpertsError(RuntimeError):
    """A loader adds something to experts in a way that their parameters do not show."""


def check_experts(model: torch.nn.Module, bench: Bench, names: Collection[str], dtype: str, times: float = 1.0) -> None:
    """Ask experts none of whose parameters changed what they answer to what the base's were asked in its forward.

    `names` are the parameters that are as before. A base whose weights were multiplied is not asked.

    Raises:
        UnreadableExpertsError: they answer something else.
    """
    changed = {_owner(name) for name, layer in bench.layers.items() if layer.kind == "experts" and name not in names}
    owners = [owner for owner in dict.fromkeys(map(_owner, names)) if owner not in changed] if times == 1 else []
    for path, (args, kwargs, wanted) in _calls(bench, owners, dtype).items():
        answer = _first(module_at(model, path)(*args, **kwargs)).double()
        if not norm(answer - wanted) <= _ROUNDINGS * UNIT_ROUNDOFF[dtype] * norm(wanted):
            raise UnreadableExpertsError(
                f"the experts {path} answer otherwise than by their parameters, which are as before: what is added "
                "beside stacked experts cannot be read, and is not judged"
            )


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _calls(bench: Bench, owners: Collection[str], dtype: str) -> dict[str, Any]:
    """Return, by module, what the base's forward gives it and gets from it."""
    import torch

    found: dict[str, Any] = {}
    if not owners:
        return found
    base = bench.build(getattr(torch, dtype))

    def keep(path: str, args: Any, kwargs: Any, answer: Any) -> None:
        found.setdefault(path, (args, kwargs, _first(answer).double()))

    for path in owners:
        base.get_submodule(path).register_forward_hook(
            lambda module, args, kwargs, answer, path=path: keep(path, args, kwargs, answer), with_kwargs=True
        )
    bench.forward(base)
    return found


def _first(answer: Any) -> torch.Tensor:
    while isinstance(answer, (tuple, list)):
        answer = answer[0]
    tensor: torch.Tensor = answer
    return tensor.detach().clone()
