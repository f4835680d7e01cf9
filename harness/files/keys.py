"""The grammar of tensor names: `<prefix><module path>.<tail>`, where the tail says what the tensor is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
    "weight.lora_a": ("weight.lora_a", "weight.lora_b"),
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
    "oft_blocks": "oft", "oft_R.weight": "oft", "oft_diag": "oft", "rescale": "oft",
    "on_input": "ia3", "ia3_l": "ia3",
    **dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"), "glora"),
    "lora_E": "adalora", "ranknum": "adalora",
}  # fmt: skip
"""Roles of other methods than low-rank pairs, with the variant of the module that has one."""

OTHER_NAMES = {"oft": "OFT / BOFT", "boft": "BOFT", "ia3": "IA3", "glora": "GLoRA", "adalora": "AdaLoRA"}
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

WHOLE_ROLES = frozenset({*FULL_PARTS, "set_bias", "token_rows", "query_norm", "key_norm"})
COPIES = frozenset({"base_copy", "base_copy_bias"})
"""Roles of what is a copy of the base's own tensor."""

OTHER_METHODS: Mapping[str, str] = {
    "vera": "vera_", "pvera": "pvera_", "prefix_tuning": "prompt_", "prompt_tuning": "prompt_", "p_tuning": "prompt_",
    "multitask_prompt_tuning": "prompt_", "cpt": "prompt_", "adaption_prompt": "adaption_", "bone": "bone_",
    "adalora": "lora_", "loha": "hada_",
}  # fmt: skip
"""PEFT's methods whose parameters do not begin with the method's own name, and how they begin."""

WEIGHT_ROLES = frozenset({"A", "B", *_LYCORIS, *OTHER_PARTS})


def tails(pairs: Iterable[str]) -> dict[str, str]:
    """Return tail -> role for the given spellings of the halves and everything in `EXTRAS`."""
    halves = {half: role for name in pairs for half, role in zip(PAIRS[name], "AB", strict=True)}
    return {**EXTRAS, **halves}


EVERY_TAIL: Mapping[str, str] = {**NOT_LORA, **tails(PAIRS)}
Parts = tuple[str, str]  # stem, tail
_LONGER = frozenset(tail.rpartition(".")[2] for tail in EVERY_TAIL if "." in tail)
_BEFORE_TWO = tuple({f".{tail.split('.')[0]}" for tail in EVERY_TAIL if tail.count(".") == 2})


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
