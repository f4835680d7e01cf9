"""What a loader is: one function that puts a LoRA file into a model, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from harness.benches import bench_names, own_benches
from harness.isolation.elsewhere import Elsewhere
from harness.loaders.declaration import NOTHING, Declaration

if TYPE_CHECKING:
    import torch

CORE_FORMATS = ("peft", "kohya", "diffusers", "diffsynth")
CORE_BENCHES = ("qwen-image", "qwen-image-fused")
CORE_VARIANTS = ("lora",)
IMPLIED_BENCHES = {"qwen-image-deep": "qwen-image"}
"""Benches that who declares another is tried on too, in one format: the same model with another number of blocks."""
IMPLIED_VARIANTS = {"lokr-full": "lokr"}
"""Variants that who declares another is tried on too: the same keys, some of them left out by other settings."""
OUTPUT_BENCHES, OUTPUT_FORMATS = ("tiny-llama",), ("peft",)
"""What an engine that gives only outputs is tried on where nobody says."""
EVERY_BENCH = tuple(name for name in bench_names() if name not in IMPLIED_BENCHES and name not in OUTPUT_BENCHES)


class Load(Protocol):
    """Put the LoRA file `lora` into `model`, in place or returning a new model.

    `lora` is the folder for the `peft` format and the `.safetensors` file for every other one;
    `strength` is the number a user passes (1.0 reproduces the training when the loader is right).
    """

    def __call__(self, model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> torch.nn.Module | None:
        """Return the model to use, or None when `model` was changed in place."""


class Outputs(Protocol):
    """Answer `inputs` with the model in the folder `base` (config.json, model.safetensors) and the LoRA `lora` on it.

    `inputs` are what the bench's model is called with, by argument (`input_ids: [1, 6]`); the answer is what the model
    gives, such as logits `[1, 6, 40]`.
    """

    def __call__(self, base: Path, lora: Path, *, strength: float, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the output."""


@dataclass(frozen=True)
class Defaults:
    """What a subject gets when nobody says: random examples per cell, and seconds for one call of it.

    `slow`: a call takes seconds, so that it is told how long all of them will take.
    """

    examples: int = 200
    seconds: float = 20.0
    slow: bool = False

    def examples_in(self, *, quick: bool) -> int:
        """Return the number of examples per cell, at most 30 in a `quick` run."""
        return min(QUICK_EXAMPLES, self.examples) if quick else self.examples


QUICK_EXAMPLES = 30
FUNCTION = Defaults()
OUTPUTS = Defaults(examples=10, seconds=120.0)
COMMAND = Defaults(examples=10, seconds=120.0, slow=True)  # it starts a process each time
SERVER = Defaults(seconds=60.0)


@dataclass(frozen=True)
class Subject:
    """A loader ready to be tested: `spec` is the string that names it everywhere, `name` how it is shown instead.

    The code of one that is `elsewhere` runs in another interpreter, or among other packages. One that is named with a
    release or a checkout is `known_as` the live loader that it is a release of.
    """

    spec: str
    load: Load
    version: str | None = None
    declaration: Declaration = NOTHING
    defaults: Defaults = FUNCTION
    name: str | None = None
    elsewhere: Elsewhere | None = field(default=None, compare=False)
    known_as: str | None = None

    @property
    def title(self) -> str:
        """What it is called in reports."""
        return self.name or self.spec

    @property
    def outputs(self) -> Outputs | None:
        """Its `load` as what it is where it gives outputs, no models; else None."""
        return cast("Outputs", self.load) if self.declaration.outputs else None

    def prepare(self) -> None:
        """Import, or start, what runs only where the loader does."""
        getattr(self.load, "prepare", lambda: None)()

    def is_over(self) -> bool:
        """Whether what `prepare` started has ended, so that the next call would have to start it again."""
        return bool(getattr(self.load, "is_over", lambda: False)())

    def close(self) -> None:
        """End what it started in this process."""
        getattr(self.load, "close", lambda: None)()

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats it declares, the core formats first and in their own order."""
        return _ordered(self.declaration.formats, OUTPUT_FORMATS if self.declaration.outputs else CORE_FORMATS)

    @property
    def benches(self) -> tuple[str, ...]:
        """The names of the benches it declares, the core benches first and in their own order."""
        said = self.declaration.benches
        names = None if said is None else frozenset(map(str, said))
        return _ordered(names, OUTPUT_BENCHES if self.declaration.outputs else CORE_BENCHES)

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants it declares, plain LoRA first."""
        said = _ordered(self.declaration.variants, CORE_VARIANTS)
        implied = (name for name, other in IMPLIED_VARIANTS.items() if other in said and name not in said)
        return (*said, *implied)

    @property
    def cells(self) -> tuple[tuple[str, str], ...]:
        """The (format, bench) pairs it declares for plain LoRA, in the order of `formats`, then `benches`."""
        pairs = ((form, bench) for form in self.formats for bench in self.benches)
        return tuple(pair for pair in pairs if self.unsupported(*pair) is None)

    def unsupported(self, form: str, bench: str, variant: str = "lora") -> str | None:
        """Return why this loader does not claim the cell, or None when it does, or declares nothing about it."""
        said = self.declaration
        named = bench in (said.benches or ())
        cell = {"format": form, "bench": bench if named else IMPLIED_BENCHES.get(bench, bench), "variant": variant}
        open_to = bench in own_benches() or bench in said.also  # who asks for a bench of his own declares it so
        benches, variants = None if open_to else said.benches, None if said.variants is None else self.variants
        for (kind, name), names in zip(cell.items(), (said.formats, benches, variants), strict=True):
            if names is not None and name not in names:
                return f"{self.spec} does not declare the {kind} {name}"
        cell["implied by"] = IMPLIED_VARIANTS.get(variant, variant)
        return next((why for names, why in said.unsupported.items() if set(names) <= set(cell.values())), None)

    @property
    def strength_argument(self) -> str | None:
        """The name under which users of this loader pass the strength (`alpha`, `scale`, ...), None where none can."""
        return self.declaration.strength_argument


def _ordered(declared: frozenset[str] | None, core: tuple[str, ...]) -> tuple[str, ...]:
    if declared is None:
        return core
    return tuple(name for name in core if name in declared) + tuple(sorted(declared - set(core)))
