"""The zoo: the rows of `harness.benches.table` that diffusers loads LoRA into, as the measured tables read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from harness.benches.table import ArchitectureRow, Parts, original_names, rows


@dataclass(frozen=True)
class Animal(ArchitectureRow):
    """One architecture of the zoo: a row of the table, with the real one's widths where it `is_wide`."""

    is_wide: bool = False

    def build(self) -> Any:
        """Return a fresh model; its weights do not matter, and those of a wide one are never touched."""
        import torch

        if not self.is_wide:
            return self.make().eval().requires_grad_(False)
        with torch.device("meta"):
            model = self.make()
        return model.to_empty(device="cpu").eval().requires_grad_(False)

    def of_width(self, naming: str) -> Animal:
        """Return the model on which files with these names are measured."""
        if not self.wide or naming == "own":
            return self
        return replace(self, config={**self.config, **self.wide}, is_wide=True)

    @cached_property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Shape of the weight of every linear layer, and in a UNet of every convolution."""
        import torch

        kinds = (torch.nn.Linear, torch.nn.Conv2d) if "UNet" in self.class_name else (torch.nn.Linear,)
        every = self.build().named_modules()
        return {name: tuple(module.weight.shape) for name, module in every if isinstance(module, kinds)}

    def names(self, naming: str) -> Parts:
        """Return {name in a file: layers} under the model's `own` or the authors' `original` names."""
        if naming == "own":
            return {name: [name] for name in self.layers}
        if naming == "sgm":
            return {_sgm(name, self.config): [name] for name in self.layers}
        rules = dict(self.original or {})
        return original_names(list(self.layers), {**rules, "only": rules.get("measured", rules.get("only", ""))})


def zoo() -> dict[str, Animal]:
    """Return every architecture by name."""
    found = (row for row in rows().values() if row.library == "diffusers")
    return {row.family: Animal(**{each.name: getattr(row, each.name) for each in fields(row)}) for row in found}


_INNER = {
    "time_emb_proj": "emb_layers.1",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
}  # fmt: skip


def _sgm(name: str, config: Mapping[str, Any]) -> str:
    """Return the name of a UNet's layer in the original Stable Diffusion code, which SDXL files of kohya have."""
    parts, each = name.split("."), config["layers_per_block"]
    if parts[0] == "mid_block":
        head = f"middle_block.{1 if parts[1] == 'attentions' else 2 * int(parts[2])}"
        return ".".join([head, *(_INNER.get(part, part) for part in parts[3:])])
    if parts[0] not in ("down_blocks", "up_blocks"):
        return _OUTER.get(name, name)
    block, down = int(parts[1]), parts[0] == "down_blocks"
    if parts[2] == "downsamplers":
        return f"input_blocks.{(block + 1) * (each + 1)}.0.op"
    if parts[2] == "upsamplers":
        place = 2 if "CrossAttn" in config["up_block_types"][block] else 1
        return f"output_blocks.{block * (each + 1) + each}.{place}.conv"
    number = block * (each + 1) + int(parts[3]) + int(down)
    head = f"{'input' if down else 'output'}_blocks.{number}.{int(parts[2] == 'attentions')}"
    return ".".join([head, *(_INNER.get(part, part) for part in parts[4:])])
