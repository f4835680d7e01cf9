"""What a format is: one row that says how keys begin, how the two halves end, and where alpha lives."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from harness.files.config import method_of
from harness.files.keys import METHOD_WORD, cut, tails
from harness.files.tensor_file import TensorFile

Place = tuple[str, str]  # component, module name
AlphaHome = Literal["tensor", "config", "header", "beside", "scale", "releases", "kv", "none"]
HEADER_KEY = "lora_adapter_metadata"
CONFIG_NAME = "adapter_config.json"
_DENOISER = re.compile(
    r"(model\.)?diffusion_model\.|unet\.(down_blocks|up_blocks|mid_block)\.|transformer\.\w+_blocks\.\d"
)  # no name in PEFT's files of models of transformers
WEIGHTS_NAME = "adapter_model.safetensors"
MLX_WEIGHTS_NAME = "adapters.safetensors"


@dataclass(frozen=True)
class Source:
    """An opened LoRA file before its format is known; `config` is the raw adapter_config.json beside it."""

    path: Path
    file: TensorFile
    config: Mapping[str, Any] | None = None

    @cached_property
    def plain(self) -> Callable[[str], str]:
        """Give a key as the tables write it, without what wrappers (`torch.compile`, FSDP, DDP) put into it."""
        return self.file.plain

    @cached_property
    def method(self) -> str:
        """PEFT's method in lower case: as the configuration says, else as the parameters of its layers are called."""
        if self.config is not None:
            return method_of(self.config)
        if not any(key.startswith("base_model.") for key in self.file.keys):
            return method_of({})
        words = {word for key in self.file.keys for word in key.split(".")}
        found = {hit[1] for word in words if (hit := METHOD_WORD.match(word))}
        return found.pop() if len(found) == 1 and found.isdisjoint(("lora", "hada", "lokr")) else method_of({})

    @cached_property
    def stems(self) -> dict[str, list[tuple[str, str]]]:
        """The keys that can be cut as (tail, key), by what stands before the tail; in file order."""
        found: dict[str, list[tuple[str, str]]] = {}
        keys = self.file.keys
        for key, plain in zip(keys, keys if self.file.is_plain else map(self.plain, keys), strict=True):
            if parts := cut(plain):
                found.setdefault(parts[0], []).append((parts[1], key))
        return found


def unwritten(name: str) -> None:
    """Return no spelling: files of the format are read alone."""


@dataclass(frozen=True)
class Naming:
    """How a format spells module paths where it is not the model's own way; None: it has no such module.

    `read` takes what stands between prefix and tail, and the tail; `write` takes a module path.
    """

    read: Callable[[str, str], str | None]
    write: Callable[[str], str | None]
    example: str


@dataclass(frozen=True)
class Format:
    """One row of the format table.

    A key reads `<prefix><module><separator><tail>`. `prefixes` maps what a key may start with to the component it
    names; `roots` has a condition on what follows one whose last word is also the root of a model. `pairs` are
    spellings of the halves (see `keys.PAIRS`), the first is written; `extras` are tails that only this format has, with
    their roles. `bare` says when a name without a prefix belongs here: never, always, or only
    beside an adapter configuration (in the folder or in the header). `trait` says which files can have the format at
    all, where keys alone do not. `alpha` lists where alpha may live, the first is where it is written: a tensor per
    module, `config` and `header` (PEFT's configuration), `beside` (that in a folder which readers of the format do not
    open: diffusion-pipe), `scale` (mlx-lm: one factor for the file, instead of alpha),
    `releases` (mlx-vlm: one alpha for the file, which its releases read in two ways), `kv` (GGUF: one alpha for the
    file), `none`. `flips` gives the roles of a module that are stored transposed.
    `dialects` are hints at the trainer: name -> pattern that some key, or some `#metadata=value`, begins with. `marks`
    are keys that only say which format this is; beside them other keys replace weights. `trainer` are the metadata in
    which trainers say rank and alpha of a network, whatever its modules have.
    """

    name: str
    example: str
    pairs: tuple[str, ...]
    alpha: tuple[AlphaHome, ...]
    prefixes: Mapping[str, str] = field(default_factory=dict)
    roots: Mapping[str, str] = field(default_factory=dict)
    bare: Literal["never", "always", "config", "header"] = "never"
    flattened: bool = False
    folder: bool = False
    write_prefix: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    extras: Mapping[str, str] = field(default_factory=dict)
    naming: Naming | None = None
    trait: Callable[[Source], bool] | None = None
    flips: Callable[[str], tuple[str, ...]] = lambda name: ()
    dialects: Mapping[str, str] = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    trainer: tuple[str, str] | None = None
    weights_name: str = WEIGHTS_NAME
    suffix: str = ".safetensors"

    @cached_property
    def tails(self) -> dict[str, str]:
        """Tail -> role of the keys that belong to this format."""
        return {**tails(self.pairs), **self.extras}

    @cached_property
    def starts(self) -> tuple[str, ...]:
        """What the keys of this format may start with."""
        return tuple(self.prefixes)

    @cached_property
    def _start(self) -> re.Pattern[str]:
        """Match the longest prefix that leaves something of a name."""
        longest_first = sorted(self.prefixes, key=len, reverse=True)
        able = "|".join(re.escape(prefix) + self.roots.get(prefix, "") for prefix in longest_first)
        return re.compile(f"(?:{able or '(?!)'})(?=.)", re.DOTALL)

    @cached_property
    def _dialect(self) -> re.Pattern[str]:
        return re.compile("|".join(f"(?P<_{place}>{pattern})" for place, pattern in enumerate(self.dialects.values())))

    @property
    def general(self) -> bool:
        """Tell whether any module name, with any rank and alpha of its own, can be written in this format."""
        return self.naming is None and self.trait is None and self.alpha[0] in ("tensor", "config", "header")

    @property
    def is_written(self) -> bool:
        """Tell whether files of this format can be made at all."""
        return self.naming is None or self.naming.write is not unwritten

    def bare_fits(self, source: Source) -> bool:
        """Tell whether names without a prefix belong to this format here; in a PEFT folder all have one, or none."""
        return {
            "never": False,
            "always": True,
            "config": source.config is not None and not any(map(self._is_of_another, source.stems)),
            "header": HEADER_KEY in source.file.metadata,
        }[self.bare]

    def _is_of_another(self, stem: str) -> bool:
        return stem.startswith(self.starts) or bool(_DENOISER.match(stem))

    @cached_property
    def locate(self) -> Callable[[str, str, bool], Place | None]:
        """Return (component, module name) when a key `<stem>.<tail>`, whose tail is one of these, belongs here.

        Called as `locate(stem, tail, bare)`. Kept, because a file is asked twice and a library has most names often.
        """
        return lru_cache(maxsize=1 << 14)(self._located)

    def _located(self, stem: str, tail: str, bare: bool) -> Place | None:
        if self.flattened and "." in stem:
            return None
        if stem.startswith(self.starts) and (found := self._start.match(stem)):
            return self._named(self.prefixes[found[0]], stem[found.end() :], tail)
        return self._named("", stem, tail) if bare else None

    def _named(self, component: str, stem: str, tail: str) -> tuple[str, str] | None:
        name = self.naming.read(stem, tail) if self.naming else stem
        return (component, name) if name else None

    def dialect(self, file: TensorFile) -> str:
        """Return the first dialect that some key or metadata entry fits, empty when none does."""
        if not self.dialects:
            return ""
        texts = (f"#{key}={value[:200]}" for key, value in file.metadata.items())
        places: set[str | None] = set()
        for found in filter(None, map(self._dialect.match, chain(file.keys, texts))):
            places.add(found.lastgroup)
            if found.lastgroup == "_0":
                break
        return next((name for place, name in enumerate(self.dialects) if f"_{place}" in places), "")
