"""The models under test as live loaders need them: their family, what loads left on them, and other names for them.

ComfyUI and DiffSynth make their own classes for original checkpoints (`input_blocks.1.1.proj_in`,
`double_blocks.0.img_attn.qkv`), and aliases of keys lead there. Here the diffusers model stays and its layers are put
into a tree of those names, which the shipped tables give; where the original has one layer for several, the weights of
these become rows of one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Rows = tuple[int, "torch.nn.Module"]  # where they begin in the merged layer, and whose they are


_FAMILIES = {
    "QwenImageTransformer2DModel": "qwen-image",
    "FluxTransformer2DModel": "flux",
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "clip",
    "CLIPTextModelWithProjection": "clip",
}
_HELD = "_lora_harness_held"


def family(model: torch.nn.Module) -> str | None:
    """Return what `model` is, `qwen-image`, `flux`, `unet` or `clip`, or None when it is something else."""
    return next((_FAMILIES[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in _FAMILIES), None)


def held(model: torch.nn.Module) -> list[Any]:
    """Return the list, kept on `model`, of what a loader needs of its earlier loads, the last one last.

    In a list nothing becomes a submodule of the model.
    """
    kept: list[Any] = vars(model).setdefault(_HELD, [])
    return kept


def unet_config(model: Any) -> dict[str, Any]:
    """Return what ComfyUI's detection finds in the original checkpoint of a diffusers UNet."""
    config, each = model.config, model.config.layers_per_block
    depth = [int("CrossAttn" in kind) for kind in config.down_block_types for _ in range(each)]
    depth_out = [int("CrossAttn" in kind) for kind in config.up_block_types for _ in range(each + 1)]
    widths = config.block_out_channels
    return {
        "num_res_blocks": [each] * len(widths),
        "channel_mult": [width // widths[0] for width in widths],
        "transformer_depth": depth,
        "transformer_depth_middle": 1,
        "transformer_depth_output": depth_out[::-1],
    }


def flux_config(model: Any) -> dict[str, Any]:
    """Return what ComfyUI's detection finds in the original checkpoint of a diffusers FLUX transformer."""
    config = model.config
    hidden = config.num_attention_heads * config.attention_head_dim
    return {"depth": config.num_layers, "depth_single_blocks": config.num_single_layers, "hidden_size": hidden}


def renamed(model: torch.nn.Module, names: Mapping[str, Any]) -> torch.nn.Module:
    """Return a tree that holds the layers of `model` under other names; a change of its weights changes `model`.

    `names` maps `<layer>.weight` to `<other name>.weight`, or to that and a place (0, first row, rows) in it.
    """
    import torch

    tree = torch.nn.Module()
    stacked: dict[str, list[Rows]] = {}
    layers = dict(model.named_modules())
    for name, target in names.items():
        layer = layers.get(name.removesuffix(".weight"))
        if not name.endswith(".weight") or layer is None:
            continue
        if isinstance(target, str):
            put(tree, target.removesuffix(".weight"), layer)
        elif target[1] is not None:  # rows in another order (norm_out) are left out
            stacked.setdefault(target[0].removesuffix(".weight"), []).append((target[1][1], layer))
    for path, parts in stacked.items():
        put(tree, path, _stack([layer for _, layer in sorted(parts, key=lambda part: part[0])]))
    return tree


def put(tree: torch.nn.Module, path: str, layer: torch.nn.Module) -> None:
    """Set `layer` at `path` below `tree`, with empty modules on the way."""
    import torch

    *way, last = path.split(".")
    for name in way:
        if not hasattr(tree, name):
            tree.add_module(name, torch.nn.Module())
        tree = getattr(tree, name)
    tree.add_module(last, layer)


def _stack(layers: list[torch.nn.Module]) -> torch.nn.Module:
    """Return one layer whose weight and bias stack those of `layers`, which become views of its rows."""
    import torch

    stack = torch.nn.Module()
    for kind in ("weight", "bias"):
        parts = [getattr(layer, kind) for layer in layers]
        whole = torch.nn.Parameter(torch.cat([part.data for part in parts]), requires_grad=False)
        start = 0
        for part in parts:
            part.data = whole.data[start : start + len(part)]
            start += len(part)
        stack.register_parameter(kind, whole)
    return stack
