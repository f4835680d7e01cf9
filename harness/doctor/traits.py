"""What of a file decides what a tool makes of it: spelling of keys, architecture, where alpha is and how it varies."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

from harness.doctor.inspect.in_peft import peft_hazards, transformers_hazards
from harness.files import FORMATS, LoraAdapter, LoraModule
from harness.files.config import changing_init
from harness.files.keys import PAIRS
from harness.law.findings import Finding, Words, findings_for
from harness.law.known import distinct, is_text_encoder
from harness.law.reads import Place, layers_of, pattern_of, places_of
from harness.law.sizes import fitting
from harness.text import printable
from harness.verdict.file_record import Hazard

_WRAPPERS = ("_orig_mod", "_wrapped_module", "_forward_module", "module.", "base_model.model.base_model.")
_WRAPPED = re.compile(
    r"_orig_mod[._]|_wrapped_module\.|_forward_module\.|^(base_model\.model\.)?module\.|^base_model\.model\.base_model\."
)
_AUTOMODEL = (".lora_gate_and_up_A", ".lora_down_A")
_PREFIXES = {
    "lora_unet__": "lora_unet__", "lora_unet_": "lora_unet", "lora_transformer_": "lora_transformer",
    "lycoris_": "lycoris", "diffusion_model.": "diffusion_model", "text_encoders.": "text_encoders",
    "base_model.model.": "base_model", "": "bare",
}  # fmt: skip
_PAIRS = {
    "lora_A.weight": "A", "lora_A.default.weight": "default", "lora_down.weight": "down",
    "lora.down.weight": "lora.down", "lora_linear_layer.down.weight": "linear",
}  # fmt: skip
_LANGUAGE = re.compile(
    r"(((model|language_model|transformer|decoder|gpt_neox|text_model)_)*(layers|h)"
    r"|((model|language_model|transformer|decoder)_)+blocks?)_#_.*(self_attn|attention|mlp|self_attention|attn)_\w+$"
)
_DECODER = re.compile(r"(base_model_)?(model_)*(language_model_)?layers_#_(self_attn_[qkvo]|mlp_(gate|up|down))_proj$")
_OTHER_TOWER = re.compile(
    r"(^|_)(encoder|cross_attn|vision|visual|audio|speech|image|projector|transformer_blocks|to_[qkv]$|to_out|adaLN|adaln)"
)
_OTHER_PREFIX = re.compile(r"unet\.|transformer_\d\.")  # of a UNet alone; of a second denoiser
_OF_UNET = re.compile(r"down_blocks|up_blocks|mid_block|conv_(in|out)|time_embedding|add_embedding")
_FLATTENED = re.compile(r"_\d+_")
_LAYER = re.compile(r"(_#)+(_proj)?$")
_WHOLE = frozenset({"diff", "norm", "set", "tokens", "copy"})  # of norms and parameters too, which no LoRA has alone
_DENOISER = ("lora_unet_", "lora_transformer_", "diffusion_model.", "transformer.", "unet.")
_ROOT = "+rslora"  # how reads.json marks a header that says so
_UNREAD = 20
_DECLARED = frozenset(
    {"alora_invocation_tokens", "layer_replication"}
)  # what PEFT's configuration has a LoRA do, and no tensor shows
_NAMED = PAIRS["lora_A.default"][0].split("*")


@dataclass(frozen=True)
class Group:
    """The modules of one part of the pipeline: their layers by pattern, what they can belong to, spellings of keys.

    `named` are all whose layers are called so, `places` those that have them in these sizes too.
    `spelled` has the spellings as `reads.json` names them: with `+out`, `+in` or `+vector` where there are magnitudes.
    `ranks`, `alphas`: they differ between those of one component.
    """

    text_encoder: bool
    counts: Mapping[str, int]
    places: tuple[Place, ...]
    spelled: tuple[str, ...]
    named: tuple[Place, ...] = ()
    ranks: bool = False
    alphas: bool = False

    @property
    def schemes(self) -> tuple[str, ...]:
        """The spellings, whatever magnitudes stand beside them."""
        return tuple(sorted({spelling.partition("+")[0] for spelling in self.spelled}))


def _flat(key: str) -> str:
    return key.replace(".", "_")


@dataclass(frozen=True)
class Traits:
    """The traits of a parsed file."""

    adapter: LoraAdapter

    @cached_property
    def modules(self) -> list[LoraModule]:
        """One module for every combination of numbers that a scale depends on."""
        return distinct(self.adapter.modules.values())

    @cached_property
    def _keys(self) -> list[str]:
        return [key for module in self.adapter.modules.values() for key in module.keys.values()]

    @cached_property
    def wrapped(self) -> str:
        """Why no tool finds the layers of a file whose names are those of a wrapper, empty for other files."""
        every = "\n".join(self._keys)
        if not any(word in every for word in _WRAPPERS):
            return ""
        found = next(filter(_WRAPPED.search, self._keys), None)
        return f"looks for plain names, not for those of a wrapper ({printable(found, 70)})" if found else ""

    @cached_property
    def components(self) -> tuple[str, ...]:
        """The parts of the pipeline that it has modules for, as it calls them."""
        return tuple(dict.fromkeys(module.component for module in self.adapter.modules.values()))

    @property
    def is_wrapped_twice(self) -> bool:
        """Tell whether the wrapper in the names is PEFT's own, once more."""
        return all(key.startswith("base_model.model.base_model.model.") for key in self._keys)

    @property
    def alpha_is_beside(self) -> bool:
        """Tell whether alpha stands in an adapter_config.json that no reader of the format opens."""
        return self.adapter.alpha_source == "config" and not FORMATS[self.adapter.format].folder

    @cached_property
    def ignored_by_peft(self) -> tuple[Literal["raises", "nothing", "drops"], str] | None:
        """What PEFT does not take of the file, by its configuration or its names; None when nothing is known."""
        if any(key.endswith(_AUTOMODEL) for key in self._keys):
            return "nothing", "does not know AutoModel's names of experts"
        if unusable := next((each for each in self.adapter.problems if each.code == "LH727"), None):
            return "raises", f"refuses the configuration, or would try for ever: {printable(unusable.text(), 160)}"
        return self._passed_over(peft_hazards(self.adapter))

    @cached_property
    def ignored_by_transformers(self) -> tuple[Literal["raises", "nothing", "drops"], str] | None:
        """The same of transformers, which takes names without PEFT's prefix, and none with an adapter's."""
        refused = any(each.code == "LH727" for each in self.adapter.problems)
        if refused or not self.adapter.config or any(key.endswith(_AUTOMODEL) for key in self._keys):
            return self.ignored_by_peft
        return self._passed_over(transformers_hazards(self.adapter))

    def _passed_over(self, hazards: Iterable[Hazard]) -> tuple[Literal["raises", "nothing", "drops"], str] | None:
        found = next((hazard for hazard in hazards if hazard.code in ("LH720", "LH721")), None)
        if found is None:
            return None
        if found.code == "LH721":
            return "drops", found.what
        return "raises" if not self.adapter.config else "nothing", found.what

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The denoiser's modules, then those of text encoders."""
        by_part: dict[bool, list[LoraModule]] = {}
        for module in self.adapter.modules.values():
            by_part.setdefault(is_text_encoder(module.component), []).append(module)
        return tuple(self._group(part, modules) for part, modules in sorted(by_part.items()))

    def _group(self, text_encoder: bool, modules: list[LoraModule]) -> Group:
        modules = [module for module in modules if module.variant not in _WHOLE] or modules
        counts = Counter(pattern_of(module.name) for module in modules)
        named = tuple(place for place in places_of(counts) if (place[0] == "clip-text") == text_encoder)
        places = fitting(named, modules) if named else []
        places.sort(key=lambda place: place == ("sd-unet", "sgm"))  # these names are SDXL's in every trainer
        scaled = [module for module in modules if module.rank]
        ranks, alphas = (bool(_varied(scaled, what)) for what in ("rank", "alpha"))
        return Group(text_encoder, counts, tuple(places), tuple(sorted(self._schemes(modules))), named, ranks, alphas)

    def _schemes(self, modules: Iterable[LoraModule]) -> set[str]:
        if (row := FORMATS[self.adapter.format]).naming:
            keys = [next(iter(module.keys.values())) for module in modules]
            usual = [key.startswith(row.write_prefix or row.starts) == bool(row.write_prefix) for key in keys]
            return {row.name if fits else f"{row.name}.other" for fits in usual}
        source = "none" if self.alpha_is_beside else self.adapter.alpha_source
        found = set()
        for module in modules:
            key = module.keys.get("A") or next((k for r, k in module.keys.items() if r != "alpha"), "")
            before, _, after = key.partition(module.name) if module.name else ("", "", key)
            marks = self._dora(module) or (_ROOT if module.rslora and source == "header" else "")
            prefix = "control" if self.adapter.format == "bfl-control" else _prefix_name(before, module.name)
            found.add((prefix, after, "alpha" in module.keys, marks))
        return {
            f"{prefix}.{_pair_name(after)}."
            f"{'tensor' if tensor else source if source in ('header', 'config') else 'none'}{marks}"
            for prefix, after, tensor, marks in found
        }

    @cached_property
    def has_unknown_parts(self) -> bool:
        """Tell whether a key that nobody understands begins with the name of a module, as a part of it would."""
        stems = {_flat(key.rpartition(".lora")[0]) for key in self._keys if ".lora" in key}
        starts = (_flat(key).split("_")[:-1] for key in self.adapter.unused_keys)
        return any(not stems.isdisjoint(accumulate(words, "{}_{}".format)) for words in starts)

    @cached_property
    def plans(self) -> dict[Hashable, Traits | None]:
        """What repairs of this file would give, kept by what was asked (`doctor/mending.py`)."""
        return {}

    @cached_property
    def is_written(self) -> bool:
        """Tell whether a repair to the file's own format would change no name in it."""
        from harness.doctor.repair.preview import is_plain, is_written

        return is_plain(self.adapter) and is_written(self.adapter)

    @cached_property
    def alphas(self) -> frozenset[str]:
        """Words about alpha: where it is, and how it varies."""
        scaled = [module for module in self.modules if module.rank]
        known = [module for module in scaled if module.alpha is not None]
        values = {module.alpha for module in known if module.alpha is not None}
        words = {
            "some-missing": 0 < len(known) < len(scaled),
            "several": len(values) > 1,
            "mixed": len({round(module.trained_scale, 6) for module in known}) > 1,
            "ranks": len({module.rank for module in scaled}) > 1,
            "negative": any(value < 0 for value in values),
            "zero": 0.0 in values,
            "inexact": any(math.frexp(module.trained_scale)[0] not in (0.0, 0.5, -0.5) for module in known),
            "rslora": any(module.rslora for module in scaled),
            "scaled": any(not math.isclose(module.trained_scale, 1) for module in known),
            "pattern": any(value != self.adapter.config.get("lora_alpha", value) for value in values),
            self.adapter.alpha_source if known else "none": bool(scaled),
        }
        parts = {f"several:{part}" for part in _varied(known, "alpha")}
        return frozenset(word for word, holds in words.items() if holds) | parts

    @cached_property
    def variants(self) -> tuple[str, ...]:
        """What its modules are made of."""
        return tuple(sorted({module.variant for module in self.adapter.modules.values()}))

    @cached_property
    def is_language(self) -> bool:
        """Tell whether every layer is called as those of a language model's decoder are, none as another tower's."""
        patterns = self._patterns
        return bool(patterns) and all(_LANGUAGE.match(each) and not _OTHER_TOWER.search(each) for each in patterns)

    @cached_property
    def is_decoder(self) -> bool:
        """Tell whether every layer is called as transformers calls those of a decoder, and no prefix as a denoiser."""
        named = bool(self._patterns) and all(map(_DECODER.match, self._patterns))
        return named and not any(key.startswith(_DENOISER) for key in self._keys)

    @property
    def _patterns(self) -> list[str]:
        return [pattern for group in self.groups for pattern in group.counts]

    @property
    def is_placed(self) -> bool:
        """Tell whether architectures are known that have the layers of every group."""
        return all(group.places for group in self.groups)

    @property
    def varied(self) -> bool:
        """Tell whether ranks or alphas differ between modules."""
        return bool(self.alphas & {"several", "ranks"})

    @cached_property
    def words(self) -> Words:
        """The traits that predicates of findings name."""
        adapter, modules = self.adapter, self.adapter.modules.values()
        places = [place for group in self.groups if not group.text_encoder for place in group.places]
        kernels = {"x".join(map(str, module.kernel)) for module in modules if module.kernel}
        lists = {
            "format": [adapter.format],
            "scheme": [scheme for group in self.groups for scheme in group.schemes],
            "component": {module.component for module in modules},
            "family": [family for family, _ in places],
            "names": [names for _, names in places],
            "variant": {module.variant for module in modules},
            "alpha": self.alphas,
            "layer": [pattern for group in self.groups for pattern in group.counts],
            "text_encoder": [name for group in self.groups if group.text_encoder for name in group.counts],
            "dtype": {module.dtype for module in modules},
            "magnitude": set(self._magnitudes()),
            "kernel": kernels,
            "init": [found] if (found := changing_init(adapter.config)) else [],
            "declares": {name for name, value in adapter.config.items() if value and name in _DECLARED},
            "unread": adapter.unused_keys[:_UNREAD],
            "beside": {role for module in modules if module.variant == "lora_diff" for role in module.keys},
        }
        return {trait: frozenset(values) for trait, values in lists.items()}

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """The findings that the file meets, in any tool and release."""
        return tuple(finding for finding in findings_for(self.adapter.format) if finding.hits(self.words))

    def _magnitudes(self) -> Iterable[str]:
        """Yield of every DoRA magnitude its tail, and its axis: one number per `out` row or per `in` column."""
        for module in self.adapter.modules.values():
            if key := module.keys.get("magnitude"):
                yield "dora_scale" if key.endswith("dora_scale") else "magnitude"
                yield self._axis(module, key)

    def _axis(self, module: LoraModule, key: str) -> str:
        shape = self.adapter.file.tensors[key].shape
        return "out" if shape and shape[0] == module.out_features else "in"

    def _dora(self, module: LoraModule) -> str:
        """Return how `reads.json` marks a spelling with such magnitudes, empty for modules without."""
        if not (key := module.keys.get("magnitude")):
            return ""
        if key.endswith("dora_scale"):
            return f"+{self._axis(module, key)}"
        return "+vector" if "lora_magnitude_vector" in key else "+magnitude"


def _prefix_name(before: str, name: str) -> str:
    """Return how `reads.json` calls what stands before a name; a flattened name behind no prefix for such is none."""
    if before[-1:] in ("", ".") and "." not in name and _FLATTENED.search(name):
        return "flattened"
    if before.startswith("lora_te"):
        return "lora_te"
    if _OTHER_PREFIX.fullmatch(before) and not (before == "unet." and _OF_UNET.match(name)):
        return "other"
    return _PREFIXES.get(before, "transformer" if before.endswith(".") else "other")


def _pair_name(after: str) -> str:
    tail = after.lstrip(".")
    if tail in _PAIRS:
        return _PAIRS[tail]
    for start, kind in (("lokr_", "lokr"), ("hada_", "loha")):
        if tail.startswith(start):
            return kind
    return "named" if tail.startswith(_NAMED[0]) and tail.endswith(_NAMED[1]) else "other"


def _varied(modules: Iterable[LoraModule], what: Literal["rank", "alpha"]) -> set[str]:
    """Return the parts of the pipeline whose own modules differ in rank or alpha."""
    found: dict[str, set[float | None]] = {}
    for module in modules:
        found.setdefault(module.component, set()).add(getattr(module, what))
    return {part for part, values in found.items() if len(values) > 1}


def untargeted(traits: Traits) -> list[str]:
    """Return the kinds of layers of the model that the file leaves alone everywhere."""
    for group in traits.groups:
        if group.places:
            return sorted(_kinds(layers_of(group.places[0])) - _kinds(group.counts))
    return []


def _kinds(patterns: Iterable[str]) -> set[str]:
    """Return what layers are called behind the numbers of their blocks."""
    found = (_LAYER.sub("", pattern.partition("#_")[2]).rpartition("#_")[2] for pattern in patterns)
    return {kind for kind in found if kind.strip("#")}
