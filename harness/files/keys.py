"""The grammar of tensor names: `<prefix><module path>.<tail>`, where the tail says what the tensor is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

PAIRS: Mapping[str, tuple[str, str]] = {
    "lora_A": ("lora_A.weight", "lora_B.weight"),
    "lora_A.default": ("lora_A.*.weight", "lora_B.*.weight"),
    "lora_down": ("lora_down.weight", "lora_up.weight"),
    "lora.down": ("lora.down.weight", "lora.up.weight"),
    "lora_linear_layer.down": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "lora_embedding_A": ("lora_embedding_A", "lora_embedding_B"),
    "bare": ("lora_A", "lora_B"),
    "down": ("down.weight", "up.weight"),
    "lora_a": ("lora_a", "lora_b"),
    "A": ("A", "B"),
    "weight.lora_a": ("weight.lora_a", "weight.lora_b"),
    "lora_a.weight": ("lora_a.weight", "lora_b.weight"),
    "bare.down": ("down", "up"),
    "adapter.linear_in": ("adapter.linear_in.weight", "adapter.linear_out.weight"),
}
"""Spellings of the two halves, A: [r, in] first; `*` stands for an adapter's name."""

_LYCORIS = (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
)  # fmt: skip
FULL_PARTS: Mapping[str, str] = {
    "diff": "full weight difference",
    "diff_b": "full bias difference",
    "w_norm": "norm weight difference",
    "b_norm": "norm bias difference",
    "set_weight": "replaced weight",
    "reshape_weight": "reshaped weight",
}
"""Roles of whole tensors, which no alpha scales; readers of low-rank pairs ignore them."""

OTHER_PARTS: Mapping[str, str] = {
    **dict.fromkeys(("oft_blocks", *(f"oft_blocks.{part}" for part in range(8))), "oft"),
    "oft_R.weight": "oft", "oft_diag": "oft", "rescale": "oft",
    "on_input": "ia3", "ia3_l": "ia3", "ia3_weight": "ia3",
    **dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"), "glora"),
    "lora_down": "nunchaku", "lora_up": "nunchaku", "lora_E": "adalora", "ranknum": "adalora",
    "embedded_vectors": "textual_inversion", "lambda_layer": "tlora",
}  # fmt: skip
"""Roles of other methods than low-rank pairs, with the variant of the module that has one."""

OTHER_NAMES = {
    "oft": "OFT / BOFT",
    "boft": "BOFT",
    "ia3": "IA3",
    "glora": "GLoRA",
    "tlora": "T-LoRA",
    "adalora": "AdaLoRA",
    "textual_inversion": "embedded textual inversion",
    "nunchaku": "nunchaku's packed layout",
}
OTHER_VARIANTS = frozenset(OTHER_NAMES)

EXTRAS: Mapping[str, str] = {
    "alpha": "alpha",
    "lora_mid.weight": "mid",
    "dora_scale": "magnitude",
    "magnitude": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.*.weight": "magnitude",
    "lora_B.bias": "bias",
    "lora_B.*.bias": "bias",
    **{tail: tail for tail in _LYCORIS},
    **{tail: tail for tail in FULL_PARTS},
    **{tail: tail for tail in OTHER_PARTS},
    "q_layer.weight": "q_layer",
    "p_layer.weight": "p_layer",
}
"""Tails that belong to a module in any format, with their role."""

NOT_LORA: Mapping[str, str] = {
    **FULL_PARTS,
    "scale": "A1111 scale, which replaces alpha / rank there",
    "base_layer.weight": "a copy of the base weight",
    "base_layer.bias": "a copy of the base bias",
    "m": "mlx-lm magnitude",
    "query_norm.scale": "replaced norm scale",
    "key_norm.scale": "replaced norm scale",
}
"""Tails whose meaning is known but which are no low-rank pair: named when they are reported as not understood."""

TWICE = {"set_weight": "set_weight_again", "set_bias": "set_bias_again"}
"""Roles of a saved tensor, and of the same one under its second name."""

WHOLE_ROLES = frozenset({*FULL_PARTS, "set_bias", "token_rows", "query_norm", "key_norm", *TWICE.values()})
COPIES = frozenset({"base_copy", "base_copy_bias"})
"""Roles of what is a copy of the base's own tensor."""

OTHER_METHODS: Mapping[str, str] = {
    "vera": "vera_", "pvera": "pvera_", "prefix_tuning": "prompt_", "prompt_tuning": "prompt_", "p_tuning": "prompt_",
    "multitask_prompt_tuning": "prompt_", "cpt": "prompt_", "adaption_prompt": "adaption_", "bone": "bone_",
    "adalora": "lora_", "loha": "hada_", "kasa": "lora_", "monteclora": "lora_", "velora": "lora_", "bdlora": "lora_",
    "qalora": "lora_",
}  # fmt: skip
"""PEFT's methods whose parameters do not begin with the method's own name, and how they begin."""

METHOD_WORD = re.compile(
    r"(lora|hada|lokr|ia3|oft|boft|hra|vera|pvera|fourierft|ln_tuning|vblora|randlora|shira|miss|bone|c3a|road|gralora|"
    r"hira|waveft|delora|poly|osf|unilora|tinylora|psoft|glora|lily|beft|deft|frod|peanut|supertuning|adamss)_"
)
"""How the parameters begin that PEFT's methods put into a layer; the method is called so."""

WEIGHT_ROLES = frozenset({"A", "B", *_LYCORIS, *OTHER_PARTS})


def tails(pairs: Iterable[str]) -> dict[str, str]:
    """Return tail -> role for the given spellings of the halves and everything in `EXTRAS`."""
    halves = {half: role for name in pairs for half, role in zip(PAIRS[name], "AB", strict=True)}
    return {**EXTRAS, **halves}


_SPELLINGS = (  # what is in such a key, its pattern, what is written instead
    ("_module.", re.compile(r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."), ""),
    ("_orig_mod", re.compile(r"(?:(?<![^.])|(?<=_))(_orig_mod)[._]"), ""),
    ("module.", re.compile(r"(?:^|(?<=^base_model\.model\.))(module)\."), ""),
    ("_lora_", re.compile(r"^([^.]+)_(lora_(?:down|up)\.weight)$"), r"\1.\2"),
    (":", re.compile(r"^(\w+:\d+):(down|up)$"), r"\1.\2.weight"),
    (
        ".default",
        re.compile(r"\.(lora_(?:[ABE]|embedding_[AB]|magnitude_vector)|hada_\w+|lokr_\w+|ia3_l)\.default$"),
        r".\1",
    ),
    ("lora_down_", re.compile(r"\.lora_(gate_and_up|down)_([AB])$"), r".\1_projs.lora_\2"),
    (".on_input", re.compile(r"^([^.]+)\.weight$"), r"\1.ia3_weight"),
)
_WRAPPERS = 3  # so many of them strip what `torch.compile`, FSDP, DeepSpeed and DDP put into names
_ALL_OR_NONE = 2  # `module.` may be a name of the model's own


class Spelling:
    """How the keys of one file say what the tables say otherwise: wrappers to leave out, other separators."""

    def __init__(self, keys: Sequence[str], text: str | None = None) -> None:
        text = "\n".join(keys) if text is None else text
        able = [place for place, (word, _, _) in enumerate(_SPELLINGS) if word in text]
        found = [place for place in able if any(map(_SPELLINGS[place][1].search, keys))]
        every = _ALL_OR_NONE in found and all(map(_SPELLINGS[_ALL_OR_NONE][1].search, keys))
        self._rules = [place for place in found if place != _ALL_OR_NONE or every]

    @property
    def changes(self) -> bool:
        """Tell whether the tables write any key otherwise."""
        return bool(self._rules)

    def plain(self, key: str) -> str:
        """Return a key as the tables write it."""
        for place in self._rules:
            _, pattern, instead = _SPELLINGS[place]
            key = pattern.sub(instead, key)
        return key

    def wrappers(self, keys: Sequence[str]) -> dict[str, list[str]]:
        """Return the names of the wrappers that are left out, with the keys that have them."""
        found: dict[str, list[str]] = {}
        for place in (place for place in self._rules if place < _WRAPPERS):
            for key in keys:
                for word in dict.fromkeys(_SPELLINGS[place][1].findall(key)):
                    found.setdefault(word, []).append(key)
        return found


EVERY_TAIL: Mapping[str, str] = {**NOT_LORA, **tails(PAIRS)}
Parts = tuple[str, str]  # stem, tail
_LONGER = frozenset(tail.rpartition(".")[2] for tail in EVERY_TAIL if "." in tail)
_BEFORE_TWO = tuple({f".{tail.split('.')[0]}" for tail in EVERY_TAIL if tail.count(".") == 2})


@lru_cache(maxsize=1 << 15)  # the files of a library share most of their keys
def cut(key: str) -> Parts | None:
    """Cut `key` at its longest known tail, given as in the tables (`*` for an adapter's name); None without one."""
    stem, dot, tail = key.rpartition(".")
    if tail in _LONGER and (found := _longer(stem, tail)):
        return found
    return (stem, tail) if dot and tail in EVERY_TAIL else None


def _longer(stem: str, last: str) -> Parts | None:
    """Cut `<stem>.<last>` at a tail of three components, or of two."""
    stem, dot, second = stem.rpartition(".")
    if not dot:
        return None
    if stem.endswith(_BEFORE_TWO):
        start, _, first = stem.rpartition(".")
        for tail in (f"{first}.{second}.{last}", f"{first}.*.{last}"):
            if tail in EVERY_TAIL:
                return start, tail
    return (stem, tail) if (tail := f"{second}.{last}") in EVERY_TAIL else None
