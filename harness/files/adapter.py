"""What every format becomes: a `LoraAdapter` of `LoraModule`s, and what was wrong with the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import LoraFileError
from harness.files.config import method_of
from harness.files.formats import FORMATS
from harness.files.keys import OTHER_VARIANTS
from harness.files.tensor_file import TensorFile
from harness.law.scale import trained_scale
from harness.text import printable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a file: a stable code, the key at fault, one clause, and whether a module is lost by it."""

    code: str
    key: str
    what: str
    fatal: bool = False

    def text(self) -> str:
        """Return the problem on one line, with the key when there is one."""
        return f"{self.key}: {self.what}" if self.key else self.what


@dataclass(frozen=True)
class LoraModule:
    """One adapted module of a file.

    `name` is the module path as the file says it, without the format's prefix: dotted, or flattened with `_` (kohya).
    `component` is the part of the pipeline that the prefix named (`transformer`, `unet`, `te1`, ...), empty when none.
    `alpha` is None when the file carries none; `rslora` says alpha is divided by sqrt(rank).
    `keys` maps a role (`A`, `B`, `alpha`, `magnitude`, ...) to the key in the file.
    `kernel` is the convolution kernel of A: [r, in, *kernel], empty for a linear layer.
    `flipped` are the roles that the file stores transposed (mlx-lm). `rank` is 0, and the scale 1, where alpha scales
    nothing: a LoKr of two full factors, whole tensors (`diff`, `norm`, `set`, `tokens`), whose `in_features` is 0 when
    only a vector is changed, and the modules of other methods (`ia3`, `oft`, …), known by name only. `experts` matrices
    of that rank each are stacked in the tensors of a module of the variant `experts`. `unscaled` says that its writer
    trains at scale 1 and never saves an alpha. `stacked` projections of a merged layer were trained apart, each with
    its share of the rank under an alpha that the file keeps as it was: sd-scripts' `split_qkv`.
    """

    name: str
    rank: int
    in_features: int
    out_features: int
    alpha: float | None
    rslora: bool
    dtype: str
    keys: Mapping[str, str]
    variant: str = "lora"
    component: str = ""
    kernel: tuple[int, ...] = ()
    flipped: tuple[str, ...] = ()
    experts: int = 1
    unscaled: bool = False
    stacked: int = 1

    def changed(self, **fields: Any) -> LoraModule:
        """Return what `replace` does, several times quicker: files have hundreds of modules."""
        module = object.__new__(LoraModule)
        values = self.__dict__.copy()
        values.update(fields)
        object.__setattr__(module, "__dict__", values)
        return module

    @property
    def trained_scale(self) -> float:
        """The factor on B @ A in training: alpha / rank, alpha / sqrt(rank), or 1.0 when the file has no alpha.

        Of `stacked` projections the rank is that of each.
        """
        return trained_scale(self.alpha, self.rank // self.stacked, rslora=self.rslora)


@dataclass(frozen=True)
class LoraAdapter:
    """A parsed LoRA file.

    `path` is what a loader gets: the folder for `peft` and `mlx`, else the file. `modules` is keyed by module name,
    preceded by `component:` for every component but the first when the file adapts several. `unused_keys` are the keys
    that no module has a part for. `alpha_source` is `tensor`, `config` (adapter_config.json), `header`
    (lora_adapter_metadata, or GGUF's key), `option` (see `with_alpha`) or `none`. `flattened` names must be matched
    against a model with `match_modules`. `config` is the adapter configuration as far as the file has one.
    """

    path: Path
    format: str
    modules: Mapping[str, LoraModule]
    metadata: Mapping[str, str]
    unused_keys: tuple[str, ...]
    alpha_source: str
    flattened: bool
    file: TensorFile = field(repr=False)
    problems: tuple[Problem, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def dialect(self) -> str:
        """A hint at the kind of model or the trainer within the format (`flux`, `musubi`, ...), empty without one."""
        return FORMATS[self.format].dialect(self.file)

    @cached_property
    def plain(self) -> Callable[[str], str]:
        """Give a key as the tables write it, without what wrappers (`torch.compile`, FSDP, DDP) put into it."""
        return self.file.plain

    @cached_property
    def kind(self) -> str:
        """The method: `lora`, or PEFT's `peft_type` in lower case (`ia3`, `oft`, `vera`, …) as far as one is named."""
        if "peft_type" in self.config:
            return method_of(self.config)
        variants = {module.variant for module in self.modules.values()}
        return next(iter(variants)) if len(variants) == 1 and variants <= OTHER_VARIANTS else "lora"

    @property
    def alpha_by_release(self) -> tuple[float, int] | None:
        """Return alpha and rank where one release of the tool multiplies by alpha, another by alpha / rank."""
        alpha, rank = self.config.get("alpha"), self.config.get("rank")
        if self.format != "mlx-vlm" or not isinstance(alpha, int | float) or not isinstance(rank, int) or rank < 2:
            return None
        return (float(alpha), rank) if self.alpha_source == "config" else None

    @property
    def is_unscaled(self) -> bool:
        """Tell whether no module has a scale that a tool could take a share of: PEFT's methods without a rank."""
        return self.format == "peft" and not any(module.rank for module in self.modules.values())

    def token_indices(self, name: str) -> tuple[int, ...]:
        """Return the rows of an embedding that `token_rows` of this module replace; empty where no configuration says.

        Raises:
            KeyError: the file has no such module.
        """
        module, named = self.modules[name].name, self.config.get("trainable_token_indices")
        named = self.config.get("token_indices") if named is None else named
        if isinstance(named, dict):
            named = next((rows for layer, rows in named.items() if f".{module}".endswith(f".{layer}")), None)
        rows = named if isinstance(named, list) else []
        return tuple(row for row in rows if isinstance(row, int) and not isinstance(row, bool))

    def tensors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A: [r, in] and B: [out, r] of one module in the dtype of the file, whichever way they are stored.

        Convolutions have [r, in, *kernel] and [out, r, 1, 1], experts (mlx-lm, PEFT's parameters) [e, r, in] and
        [e, out, r].

        Raises:
            KeyError: the file has no such module.
            LoraFileError: the module's variant has no A and B (LoHa, LoKr), or the file changed.
        """
        module = self.modules[name]
        if "A" not in module.keys or "B" not in module.keys:
            raise LoraFileError(self.path, f"a {module.variant} module has no A and B", key=printable(name))
        return self.part(name, "A"), self.part(name, "B")

    def part(self, name: str, role: str) -> Tensor:
        """Return one tensor of a module by its role (`A`, `magnitude`, `hada_w1_a`, ...), in the dtype of the file.

        Raises:
            KeyError: the file has no such module, or the module no such part.
            LoraFileError: the file changed.
        """
        module = self.modules[name]
        tensor = self.file.tensor(module.keys[role])
        if module.variant == "experts" and tensor.ndim == 2:  # PEFT's: A [e r, in] by expert, B [out, r e] by rank
            stacked = (module.experts, module.rank, -1) if role == "A" else (-1, module.rank, module.experts)
            return tensor.reshape(stacked) if role == "A" else tensor.reshape(stacked).permute(2, 0, 1)
        return tensor.mT if role in module.flipped else tensor


def with_alpha(adapter: LoraAdapter, alpha: float | None) -> LoraAdapter:
    """Return `adapter` with the alpha of the training in the modules that have none, or 0; as it is for None."""
    if alpha is None:
        return adapter
    modules = {
        name: module.changed(alpha=float(alpha), unscaled=False) if module.rank and not module.alpha else module
        for name, module in adapter.modules.items()
    }
    if all(module.alpha == adapter.modules[name].alpha for name, module in modules.items()):
        return adapter
    return replace(adapter, modules=modules, alpha_source="option")


@dataclass(frozen=True)
class LoraParts:
    """One module of any variant in memory, to be written: role -> tensor (see `keys.EXTRAS`), and alpha.

    `experts` is how many the pair stacks that adapts a parameter, 0 where it adapts a module.
    """

    parts: Mapping[str, Tensor]
    alpha: float | None = None
    experts: int = 0

    @property
    def rank(self) -> int:
        """The rank, from the shapes of the parts.

        Raises:
            ValueError: none of the parts has a rank.
        """
        for role in ("A", "embedding_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if role in self.parts:
                return int(self.parts[role].shape[0]) // (self.experts or 1)
        raise ValueError(f"PEFT has no configuration for parts {', '.join(self.parts)}")


@dataclass(frozen=True)
class LoraWeights:
    """One module in memory, to be written: a: [r, in], b: [out, r], and alpha (None: the file shall carry none)."""

    a: Tensor
    b: Tensor
    alpha: float | None

    @property
    def rank(self) -> int:
        """The rank, from the shape of `a`."""
        return int(self.a.shape[0])

    @property
    def parts(self) -> Mapping[str, Tensor]:
        """The halves by role."""
        return {"A": self.a, "B": self.b}


def match_modules(
    adapter: LoraAdapter, model_names: Iterable[str], *, component: str | None = None
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return {name in the file: name in the model} and the names in the file that fit no single module.

    Flattened names (kohya) are compared with the model's names flattened; a flattened name that several modules share,
    or that several modules of the file would claim, is left unmatched (see `flattened_collisions`). `component` limits
    the match to one part of the pipeline, such as `te1`.
    """
    wanted = {name: m.name for name, m in adapter.modules.items() if component in (None, m.component)}
    index = _index(model_names, adapter.flattened)
    found = {name: index[key][0] for name, key in wanted.items() if len(index.get(key, ())) == 1}
    claims = Counter(found.values())
    matched = {name: model_name for name, model_name in found.items() if claims[model_name] == 1}
    return matched, tuple(name for name in wanted if name not in matched)


def flattened_collisions(model_names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the flattened names that stand for more than one module of a model, with those modules."""
    return {key: names for key, names in _index(model_names, True).items() if len(names) > 1}


def _index(model_names: Iterable[str], flattened: bool) -> dict[str, tuple[str, ...]]:
    index: dict[str, tuple[str, ...]] = {}
    for name in dict.fromkeys(model_names):
        key = name.replace(".", "_") if flattened else name
        index[key] = (*index.get(key, ()), name)
    return index
