"""Photograph a page: `python tests/report/screenshots.py reports/out/index.html docs/screenshots`.

With a third word only the top of the page, under that name: `... reports/out/site/index.html docs/screenshots site`.
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import chromium_browser

DESKTOP, PHONE = (1280, 1000), (390, 1000)
VIEWS: tuple[tuple[str, tuple[int, int], dict[str, str], str], ...] = (
    ("desktop", DESKTOP, {}, "#verdict"),
    ("dark", DESKTOP, {"prefers-color-scheme": "dark"}, "#verdict"),
    ("phone", PHONE, {}, "#verdict"),
    ("images", DESKTOP, {}, "#sweeps"),
    ("matrix", DESKTOP, {}, "#matrix"),
)


def photograph(page: Path, out: Path, name: str | None = None) -> None:
    """Write one small PNG per view of `page` into `out`; a view whose part the page lacks is left out.

    With a `name` only the top is photographed, and called so.
    """
    with tempfile.TemporaryDirectory() as profile:
        browser = chromium_browser.start(Path(profile))
        try:
            browser.get(page.resolve().as_uri())
            if name:
                _save(_view(browser, DESKTOP, {}, "#verdict"), out / f"{name}.png")
                return
            for view, size, media, part in VIEWS:
                if browser.execute_script("return document.querySelector(arguments[0])", part):
                    _save(_view(browser, size, media, part), out / f"{view}.png")
            _save(_first_printed_page(browser), out / "print.png")
        finally:
            browser.quit()


def _view(browser: Any, size: tuple[int, int], media: dict[str, str], part: str) -> bytes:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    features = [{"name": name, "value": value} for name, value in media.items()]
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
    top = "scrollTo({top: 0, behavior: 'instant'})"
    to = "document.querySelector(arguments[0]).scrollIntoView({behavior: 'instant'})"
    browser.execute_script(top if part == "#verdict" else to, part)
    time.sleep(0.5)
    return base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"])


def _first_printed_page(browser: Any) -> bytes:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": []})
    metrics = {"width": 720, "height": 1018, "deviceScaleFactor": 1, "mobile": False}  # A4 at 96 dpi within its margins
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_script("scrollTo({top: 0, behavior: 'instant'})")
    time.sleep(0.5)
    return base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"])


def _save(png: bytes, path: Path) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(io.BytesIO(png)) as image:
        image.convert("P", palette=Image.Palette.ADAPTIVE, colors=48).save(path, optimize=True)


if __name__ == "__main__":
    photograph(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
