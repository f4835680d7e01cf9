"""The live loader `transformers`: `model.load_adapter`, which puts layers of PEFT into a model without its wrapper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.benches import more_benches
from harness.benches.table import rows
from harness.loaders.declaration import loader
from harness.loaders.live import LiveLoader, quiet
from harness.loaders.models import held

if TYPE_CHECKING:
    import torch


def unload(model: torch.nn.Module) -> None:
    """Take the adapter loaded last away (`delete_adapter`)."""
    loaded: Any = model
    loaded.delete_adapter(held(model).pop())


@loader(
    formats={"peft"},
    benches={"clip-text", "gpt2", "tiny-llama"},
    strength_argument=None,  # `load_adapter` takes none
    unload=unload,
    also=(name for name in more_benches() if rows()[name].library == "transformers"),
)
def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Load the PEFT folder `lora` under a name of its own, beside what was loaded before; there is no strength.

    Raises:
        ValueError: `lora` is no folder with an adapter.
    """
    name, loaded = f"adapter_{len(held(model))}", model
    with quiet("transformers", "peft"):
        load_adapter: Any = loaded.load_adapter
        load_adapter(str(lora), adapter_name=name)
    held(model).append(name)


LIVE = (LiveLoader("transformers", load, ("transformers", "peft")),)
