"""Sweeps as strips: one column per strength, pictures above, curves and numbers below."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from markupsafe import Markup

from harness.outputs import replace_file
from harness.report.models import LoraFacts, SweepRecord
from harness.report.records import Run
from harness.report.summary import OUTCOMES, badness, digest
from harness.report.svg import Curve, available, sweep_figure

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
        replace_file(target, path.read_bytes(), durable=False)
        path = target
    return quote(os.path.relpath(path, out).replace(os.sep, "/"))


_CURVES = (
    ("SSIM", ("ssim_reference", "ssim_base", "ssim"), 2, False),
    ("noise", ("noise_sigma_ratio", "sigma", "noise"), 1, True),
    ("variance", ("variance_ratio", "variance"), 1, True),
)
_MOST_ROWS = 6
_MOST = 6  # metrics in the table of a strip that has no curve; all of them are in the records
_WANTED_ROWS = 2
_SIDES = (192, 128, 96, 64)
_BUDGET = 3_000_000  # bytes of thumbnails
_PER_PIXEL = 0.8  # bytes, measured on noise, the worst case
_ROW_OF = 3  # a row is drawn as candidate, reference and difference
_AS_TRAINED = 1.0
_FINE = ("passed", "skipped")
_RIGHT = (len(OUTCOMES), 0.0, 0.0)


@dataclass(frozen=True)
class Size:
    """How many prompts of a strip are shown and how large, so that the page stays under 5 MB."""

    rows: int
    side: int


@dataclass(frozen=True)
class PictureTile:
    """One picture of a strip: its thumbnail, its full-size file, and the difference to what it is compared with."""

    strength: float
    thumbnail: str
    link: str
    compared: str | None = None
    difference: str | None = None


@dataclass(frozen=True)
class StripRow:
    """The pictures of one prompt and seed, one per strength (None where there is none)."""

    prompt: str
    seed: int | None
    tiles: tuple[PictureTile | None, ...]
    against: str | None = None
    gain: int | None = None

    @property
    def shown(self) -> PictureTile | None:
        """The tile that the slider starts with: the one nearest to strength 1 that has something to compare."""
        usable = [tile for tile in self.tiles if tile and tile.compared]
        return min(usable, key=lambda tile: abs(tile.strength - _AS_TRAINED), default=None)


@dataclass(frozen=True)
class Strip:
    """A sweep of one loader over one LoRA."""

    loader: str
    lora: LoraFacts
    device: str
    dtype: str
    pipeline: str | None
    records: tuple[SweepRecord, ...]
    rows: tuple[StripRow, ...] = ()
    figures: tuple[tuple[list[str], Markup], ...] = ()
    metrics: tuple[str, ...] = field(default=())
    left_out: int = 0

    @property
    def compared(self) -> StripRow | None:
        """The row that the slider starts with."""
        return next((row for row in self.rows if row.shown), None)

    @property
    def anchor(self) -> str:
        """The strip's stable id inside a report."""
        return "sweep-" + digest(self.loader, self.lora.name, self.device, self.dtype, self.pipeline)


def strips(run: Run, out: Path) -> list[Strip]:
    """Return the run's sweeps, wrong loaders first, with their pictures read from disk (missing ones left out)."""
    groups: dict[tuple[object, ...], list[SweepRecord]] = {}
    for record in run.of(SweepRecord):
        key = (record.loader, record.lora.name, record.lora.format, record.device, record.dtype, record.pipeline)
        groups.setdefault(key, []).append(record)
    size = _size(list(groups.values()), _natural(run))
    wrong = {v.loader: badness(v) for v in run.verdicts if v.check == "images" and v.outcome not in _FINE}
    worst_first = sorted(groups.values(), key=lambda group: wrong.get(group[0].loader, _RIGHT))
    ordered = (sorted(group, key=lambda record: record.strength) for group in worst_first)
    return [_strip(group, size, run.folder, out) for group in ordered]


def _size(groups: Sequence[Sequence[SweepRecord]], natural: int) -> Size:
    """Choose the largest thumbnails with which a few rows fit the budget, none larger than the pictures are."""
    columns = sum(map(len, groups)) or 1
    drawn = max((len(_subjects(group)) for group in groups), default=0) or 1
    for side in _SIDES:
        pictures = _BUDGET / (min(side, natural) ** 2 * _PER_PIXEL)
        rows = int(pictures // (columns * _ROW_OF))
        if rows >= min(_WANTED_ROWS, drawn):
            return Size(min(rows, drawn, _MOST_ROWS), side)
    return Size(1, _SIDES[-1])


def _natural(run: Run) -> int:
    """Return the longer side of the run's first picture that can be read."""
    images = (image for record in run.of(SweepRecord) for image in record.images)
    found = next((picture for image in images if (picture := open_picture(run.folder / image.path))), None)
    return max(found.size) if found else _SIDES[0]


def _strip(records: list[SweepRecord], size: Size, folder: Path, out: Path) -> Strip:
    first, subjects = records[0], _subjects(records)
    names = list(dict.fromkeys(name for record in records for name in record.metrics))
    drawn = [name for _, stems, most, _ in _CURVES for name in _matching(names, stems)[:most]] or names[:_MOST]
    facts = first.loader, first.lora, first.device, first.dtype, first.pipeline
    bare = Strip(*facts, tuple(records), metrics=tuple(drawn))
    rows = tuple(_row(records, prompt, seed, size.side, folder, out) for prompt, seed in subjects[: size.rows])
    return replace(bare, rows=rows, figures=_figures(bare), left_out=max(len(subjects) - size.rows, 0))


def _subjects(records: Sequence[SweepRecord]) -> list[tuple[str, int | None]]:
    images = (image for record in records for image in record.images if image.role == "candidate")
    return list(dict.fromkeys((image.prompt, image.seed) for image in images))


def _row(records: Sequence[SweepRecord], prompt: str, seed: int | None, side: int, folder: Path, out: Path) -> StripRow:
    pictures = [_pictures(record, prompt, seed, folder) for record in records]
    role = "reference" if any("reference" in found for found in pictures) else "base"
    fallback = next((found["base"] for found in pictures if "base" in found), None) if role == "base" else None
    pairs = [(found.get("candidate"), found.get(role, fallback)) for found in pictures]
    whole = [(a[1], b[1]) for a, b in pairs if a and b]
    gain = difference_gain(whole) if whole else None
    draw = _Draw(side, gain, out)
    tiles = tuple(draw.tile(record.strength, a, b) for record, (a, b) in zip(records, pairs, strict=True))
    return StripRow(prompt, seed, tiles, role if whole else None, gain)


def _pictures(record: SweepRecord, prompt: str, seed: int | None, folder: Path) -> dict[str, tuple[Path, Image]]:
    """Return what can be read of one prompt and seed, by role."""
    paths = {i.role: folder / i.path for i in record.images if (i.prompt, i.seed) == (prompt, seed)}
    return {role: (path, picture) for role, path in paths.items() if (picture := open_picture(path))}


@dataclass(frozen=True)
class _Draw:
    side: int
    gain: int | None
    out: Path

    def tile(self, strength: float, a: tuple[Path, Image] | None, b: tuple[Path, Image] | None) -> PictureTile | None:
        """Return the tile of a picture `a` that is compared with `b`."""
        if a is None:
            return None
        own, link = data_uri(a[1], self.side), link_beside(a[0], self.out)
        if b is None:
            return PictureTile(strength, own, link)
        shown = data_uri(difference(a[1], b[1], self.gain), self.side) if self.gain else None
        return PictureTile(strength, own, link, data_uri(b[1], self.side), shown)


def _figures(strip: Strip) -> tuple[tuple[list[str], Markup], ...]:
    found: list[tuple[list[str], Markup]] = []
    for title, stems, most, log in _CURVES:
        names = _matching(strip.metrics, stems)[:most]
        curves = [Curve(name, [record.metrics.get(name) for record in strip.records]) for name in names]
        if available() and any(value is not None for curve in curves for value in curve.values):
            labels = [name.replace("_", " ") for name in names]
            alt = f"{title} over strength: {' and '.join(labels)}; the numbers are in the table below"
            found.append((labels, sweep_figure(strip.anchor + title, curves, len(strip.records), log=log, title=alt)))
    return tuple(found)


def _matching(names: Sequence[str], stems: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name for stem in stems for name in names if stem in name.lower()))
