"""What a format is: one row that says how keys begin, how the two halves end, and where alpha lives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from harness.files.keys import Split, split, tails
from harness.files.safetensors_file import SafetensorsFile

AlphaHome = Literal["tensor", "config", "header"]
HEADER_KEY = "lora_adapter_metadata"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


@dataclass(frozen=True)
class Source:
    """An opened LoRA file before its format is known; `config` is the raw adapter_config.json beside it."""

    path: Path
    file: SafetensorsFile
    config: Mapping[str, Any] | None = None

    @cached_property
    def splits(self) -> tuple[tuple[str, Split | None], ...]:
        """Every key with its cut, in file order."""
        return tuple((key, split(key)) for key in self.file.keys)

    @property
    def has_header_config(self) -> bool:
        """Tell whether the safetensors header carries an adapter configuration."""
        return HEADER_KEY in self.file.metadata


@dataclass(frozen=True)
class Format:
    """One row of the format table.

    A key reads `<prefix><module><separator><tail>`. `prefixes` maps what a key may start with to the component it
    names; `pairs` are spellings of the halves (see `keys.PAIRS`), the first is written. `bare` says when a name without
    a prefix belongs here: never, always, or only beside an adapter configuration (in the folder or in the header).
    `alpha` lists where alpha may live, the first is where it is written.
    """

    name: str
    example: str
    prefixes: Mapping[str, str]
    pairs: tuple[str, ...]
    alpha: tuple[AlphaHome, ...]
    bare: Literal["never", "always", "config", "header"] = "never"
    flattened: bool = False
    folder: bool = False
    write_prefix: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def tails(self) -> dict[str, str]:
        """Tail -> role of the keys that belong to this format."""
        return tails(self.pairs)

    @cached_property
    def _longest_first(self) -> list[tuple[str, str]]:
        return sorted(self.prefixes.items(), key=lambda item: -len(item[0]))

    def bare_fits(self, source: Source) -> bool:
        """Tell whether names without a prefix belong to this format in this source."""
        return {
            "never": False,
            "always": True,
            "config": source.config is not None,
            "header": source.has_header_config,
        }[self.bare]

    def locate(self, split: Split, bare: bool) -> tuple[str, str] | None:
        """Return (component, module name) when the cut key belongs to this format."""
        if split.tail not in self.tails or (self.flattened and "." in split.stem):
            return None
        for prefix, component in self._longest_first:
            if split.stem.startswith(prefix) and len(split.stem) > len(prefix):
                return component, split.stem[len(prefix) :]
        return ("", split.stem) if bare else None
