"""Save pictures: single files for the report, and contact sheets for the eye."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def to_bytes(image: Tensor) -> Any:
    """Return a picture `[3, height, width]` in 0..1 as a uint8 array `[height, width, 3]`; NaN becomes magenta."""
    shown = torch.where(image.isfinite(), image, torch.tensor([1.0, 0.0, 1.0])[:, None, None])
    return (shown.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def save_image(image: Tensor, path: Path) -> Path:
    """Write one picture `[3, height, width]` as PNG."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_bytes(image)).save(path, optimize=True)
    return path


def contact_sheet(rows: Mapping[str, Tensor], path: Path, *, scale: int = 2, label_width: int = 150) -> Path:
    """Write one labelled row of pictures per entry, `rows: label -> [n, 3, height, width]`, enlarged `scale` times."""
    from PIL import Image, ImageDraw, ImageFont

    first = next(iter(rows.values()))
    height, width = (edge * scale for edge in first.shape[-2:])
    gap = 2
    sheet = Image.new("RGB", (label_width + len(first) * (width + gap), len(rows) * (height + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for line, (label, images) in enumerate(rows.items()):
        top = line * (height + gap)
        pen.multiline_text((6, top + height // 2 - 16), label, fill="black", font=font)
        for column, image in enumerate(images):
            picture = Image.fromarray(to_bytes(image)).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (label_width + column * (width + gap), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
    return path
