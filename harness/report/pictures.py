"""Pictures of a sweep as small data URIs, with the difference maps; the full-size files stay beside the report."""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from harness.report.summary import digest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

_QUALITY = 84
_GAINS = (32, 16, 8, 4, 2, 1)
_ONE_LEVEL = 1 / 255
_MOST_PIXELS = 64_000_000


def open_picture(path: Path) -> Image | None:
    """Return the picture as RGB, or None when it is missing, too large, no picture, or Pillow is not installed."""
    if find_spec("PIL") is None:
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.width * image.height > _MOST_PIXELS:
                return None
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def data_uri(image: Image, side: int) -> str:
    """Return the picture, at most `side` pixels wide and high, as a WebP data URI."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def difference_gain(pairs: Sequence[tuple[Image, Image]]) -> int | None:
    """Return the gain at which the typical pair that differs stays below white in 99 % of its pixels.

    None: no pair differs by a whole grey level anywhere.
    """
    import numpy as np

    distances = [_distance(a, b) for a, b in pairs]
    seen = [float(np.percentile(distance, 99)) for distance in distances if distance.max() >= _ONE_LEVEL]
    if not seen:
        return None
    typical = float(np.median(seen))
    return next((gain for gain in _GAINS if typical * gain <= 1.0), 1)


def difference(a: Image, b: Image, gain: int) -> Image:
    """Return |a - b| * gain, clipped, at the smaller of the two sizes."""
    import numpy as np
    from PIL import Image

    scaled = np.clip(_distance(a, b) * gain, 0.0, 1.0)
    return Image.fromarray(np.asarray(np.round(scaled * 255), dtype=np.uint8))


def _distance(a: Image, b: Image) -> NDArray[np.float32]:
    import numpy as np

    size = (min(a.width, b.width), min(a.height, b.height))
    left, right = (np.asarray(image.resize(size), dtype=np.float32) / 255 for image in (a, b))
    return np.abs(left - right)


def link_beside(path: Path, out: Path) -> str:
    """Return the URL of `path` relative to `out`, with the file copied to `out/images` if it lies elsewhere."""
    path, out = path.resolve(), out.resolve()
    if not path.is_relative_to(out):
        target = out / "images" / f"{digest(path)}-{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        path = target
    return quote(os.path.relpath(path, out).replace(os.sep, "/"))
