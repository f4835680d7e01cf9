"""One generated LoRA and how it is loaded: what Hypothesis draws and what a reproduce line repeats."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes of models and files, the plainest first."""

Patterns = Literal["names", "tails", "regex", "overlapping"]
"""How a configuration names modules of another rank or alpha: paths, ends of paths, expressions, several that fit."""


@dataclass(frozen=True)
class Target:
    """One layer of the LoRA: its path in the model, rank and alpha (None: the file carries no alpha for it)."""

    name: str
    rank: int
    alpha: float | None


@dataclass(frozen=True)
class Example:
    """A LoRA over `targets`, its keys permuted by `key_seed` (0: not), loaded at `strength` into a model of `dtype`.

    `patterns`: how its configuration names modules, where it has one.
    """

    targets: tuple[Target, ...]
    strength: float = 1.0
    dtype: str = "float32"
    file_dtype: str = "float32"
    key_seed: int = 0
    value_seed: int = 0
    patterns: Patterns = "names"

    def as_json(self) -> dict[str, Any]:
        """Return the counterexample as it stands in a verdict."""
        modules = {t.name: {"rank": t.rank, "alpha": t.alpha} for t in self.targets}
        rest: dict[str, Any] = {"strength": self.strength, "dtype": self.dtype, "file_dtype": self.file_dtype}
        rest |= {"patterns": self.patterns} if self.patterns != "names" else {}
        return {"modules": modules, **rest, "key_seed": self.key_seed, "seed": self.value_seed}

    def as_options(self, *, everything: bool = False) -> str:
        """Return the command line options that repeat exactly this example.

        `everything`: the targets are all layers of the bench, so one rank and alpha for all can be said at once.
        """
        shapes = {(t.rank, t.alpha) for t in self.targets}
        if everything and len(shapes) == 1 and None not in next(iter(shapes)):
            modules = "--rank {} --alpha {:g}".format(*shapes.pop())
        else:
            modules = " ".join(f"--module {t.name}={t.rank}:{_alpha(t.alpha)}" for t in self.targets)
        options = [modules, f"--strength {self.strength:g}", f"--dtype {self.dtype}"]
        options += [f"--file-dtype {self.file_dtype}"] if self.file_dtype != self.dtype else []
        options += [f"--key-seed {self.key_seed}"] if self.key_seed else []
        options += [f"--patterns {self.patterns}"] if self.patterns != "names" else []
        return " ".join([*options, f"--seed {self.value_seed}"])

    def key_order(self) -> random.Random | None:
        """Return the generator that permutes the file's keys, or None for the model's own order."""
        return random.Random(self.key_seed) if self.key_seed else None


def _alpha(alpha: float | None) -> str:
    return "none" if alpha is None else f"{alpha:g}"
