"""The live loader `litgpt`: litgpt's own LoRA layers and `merge_lora_weights`, on a Llama of transformers.

litgpt has models of its own and a converter for both directions (`convert_hf_checkpoint`, `convert_lit_checkpoint`);
both run here, so that what is merged can be read as the weights of the model under test. Its LoRA files are pickles
without alpha or rank, which stand in `hyperparameters.yaml`: both are read from a PEFT folder here, and A and B are put
under litgpt's names, q, k and v below each other, without any arithmetic. In between are the lines of `merge_lora` in
`scripts/merge_lora.py`. It has no strength.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.loaders.declaration import loader
from harness.loaders.live import LiveLoader, quiet

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Pairs = dict[str, dict[str, Tensor]]  # layer of the model -> "A": [rank, in], "B": [out, rank]

_QKV = {"q_proj": "lora_query", "k_proj": "lora_key", "v_proj": "lora_value"}
_PLACES = {
    "self_attn.o_proj": ("attn.proj", "lora_projection"),
    "mlp.gate_proj": ("mlp.fc_1", "lora_mlp"),
    "mlp.up_proj": ("mlp.fc_2", "lora_mlp"),
    "mlp.down_proj": ("mlp.proj", "lora_mlp"),
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")


@loader(formats={"peft"}, benches={"tiny-llama"}, uniform={"rank", "alpha"}, strength_argument=None)
def load(model: torch.nn.Module, lora: Path, *, strength: float = 1.0) -> None:
    """Merge the PEFT folder `lora` into `model`, which becomes a model of litgpt and then one of transformers again.

    Raises:
        NotImplementedError: litgpt has no LoRA layer for a module of the file, or the file is no plain LoRA.
    """
    from litgpt.lora import GPT, lora_filter, merge_lora_weights
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama

    said, pairs = _read(lora)
    with quiet(""):
        config = _config(model, said, pairs)
        checkpoint: dict[str, Tensor] = {}
        copy_weights_hf_llama(config, {}, checkpoint, {name: w.clone() for name, w in model.state_dict().items()})
        lit = GPT(config)
        trained = _named(pairs, {name: w for name, w in lit.state_dict().items() if lora_filter(name, w)}, config)
        lit.load_state_dict({**checkpoint, **trained}, assign=True)
        lit.to(dtype=next(iter(next(iter(pairs.values())).values())).dtype)  # it gives the merge the dtype of the LoRA
        merge_lora_weights(lit)
        weights = {k.replace("linear.", ""): v for k, v in lit.state_dict().items() if not lora_filter(k, v)}
        merged: dict[str, Tensor] = {}
        copy_weights_llama(config, merged, weights)
    model.load_state_dict(merged, strict=True)


def _read(lora: Path) -> tuple[dict[str, Any], Pairs]:
    from safetensors.torch import load_file

    said: dict[str, Any] = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
    pairs: Pairs = {}
    for key, value in load_file(str(lora / "adapter_model.safetensors")).items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise NotImplementedError(f"{key}: litgpt has lora_A and lora_B only")
        pairs.setdefault(found[1], {})[found[2]] = value
    if said.get("use_rslora") or said.get("use_dora"):
        raise NotImplementedError("litgpt's scaling is lora_alpha / lora_r, and nothing is normalised")
    return said, pairs


def _config(model: Any, said: dict[str, Any], pairs: Pairs) -> Any:
    """Return litgpt's configuration of the model and of the LoRA, as `hyperparameters.yaml` has it."""
    from litgpt.lora import Config

    has, flags = model.config, dict.fromkeys(_flag(layer) for layer in pairs)
    return Config(
        block_size=has.max_position_embeddings,
        n_layer=has.num_hidden_layers,
        n_embd=has.hidden_size,
        vocab_size=has.vocab_size,
        padded_vocab_size=has.vocab_size,
        n_head=has.num_attention_heads,
        n_query_groups=has.num_key_value_heads,
        intermediate_size=has.intermediate_size,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        bias=False,
        parallel_residual=False,
        lora_r=said["r"],
        lora_alpha=said["lora_alpha"],
        **dict.fromkeys(flags, True),
    )


def _flag(layer: str) -> str:
    """Return the option of litgpt that adapts a layer."""
    found = _LAYER.fullmatch(layer)
    part = found[2].removeprefix("self_attn.") if found else ""
    flag = _QKV.get(part) or (_PLACES[found[2]][1] if found and found[2] in _PLACES else None)
    if flag is None:
        raise NotImplementedError(f"{layer}: litgpt has no LoRA for it")
    return flag


def _named(pairs: Pairs, empty: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Return A and B under litgpt's names; what the file lacks of a kind that it adapts is as before training."""
    for name, value in empty.items():
        value.data.mul_(name.endswith("lora_A"))  # B begins as zeros; so it does wherever `GPT` left it
    for layer, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise NotImplementedError(f"{layer}: half of a pair")
        found = _LAYER.fullmatch(layer)
        assert found is not None, layer
        part = found[2].removeprefix("self_attn.")
        place = "attn.qkv" if part in _QKV else _PLACES[found[2]][0]
        rows = _rows(part, config) if part in _QKV else (slice(None), slice(None))
        for kind, where in zip("AB", rows, strict=True):
            empty[f"transformer.h.{found[1]}.{place}.lora_{kind}"][where] = pair[kind]
    return empty


def _rows(part: str, config: Any) -> tuple[slice, slice]:
    """Return the rows of q, k or v in the A and in the B that litgpt has for those of them that are adapted."""
    kept = [name for name, flag in _QKV.items() if getattr(config, flag)]
    high = {name: config.head_size * (config.n_head if name == "q_proj" else config.n_query_groups) for name in kept}
    before, rank = kept[: kept.index(part)], config.lora_r
    start = sum(high[name] for name in before)
    return slice(len(before) * rank, (len(before) + 1) * rank), slice(start, start + high[part])


LIVE = (LiveLoader("litgpt", load, ("litgpt",), imports=("litgpt",)),)
