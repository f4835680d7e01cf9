"""Photograph what `diagnose` and `inspect` show: `python tests/report/photograph_commands.py docs/screenshots`.

The terminal is Rich's rendering of the real output, the page is the one that `inspect --html` writes.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops
from rich.console import Console
from rich.text import Text

from benchmarks.first_answer import founding_file

ROOT = Path(__file__).parents[2]
COLUMNS = 158
TERMINAL = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: #14171c; color: #d7dae0; }}
pre {{ margin: 14px 18px; font: 12px/1.45 "DejaVu Sans Mono", monospace; }}
</style><pre>{code}</pre>"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUESTIONS = {
    "diagnose": ("diagnose", "my_lora.safetensors", "--tool", "diffsynth", "--tool-version", "2.0.4", "--saw", "noise"),
    "inspect": ("inspect", "kohya.safetensors"),
}


def terminal(words: tuple[str, ...], folder: Path) -> str:
    """Return a page that looks like a terminal in which the command was typed."""
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "FORCE_COLOR": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "harness", *words]
    shown = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False).stdout
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ lora-harness {' '.join(words)}", style="bold green"))
    for line in Text.from_ansi(shown).split():
        line.rstrip()
        console.print(line)
    return console.export_html(inline_styles=True, code_format=TERMINAL)


def photograph(page: Path, target: Path, size: tuple[int, int]) -> None:
    """Write a small PNG of a page, without the empty rows below."""
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
    shot = page.with_suffix(".png")
    wanted = [f"--screenshot={shot}", f"--window-size={size[0]},{size[1]}", page.as_uri()]
    subprocess.run([str(browser), *flags, *wanted], check=True, capture_output=True, timeout=300)
    image = Image.open(shot).convert("RGB")
    ground = Image.new("RGB", image.size, image.getpixel((0, image.height - 1)))
    _, _, _, lowest = ImageChops.difference(image, ground).getbbox() or (0, 0, 0, image.height)
    kept = image.crop((0, 0, image.width, min(image.height, lowest + 16)))
    kept.quantize(64).save(target, optimize=True)


def main(out: Path) -> None:
    """Photograph the commands, and the page of `inspect`."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        founding_file(folder / "my_lora.safetensors")
        shutil.copy(ROOT / "fixtures" / "loras" / "r8_a16" / "kohya.safetensors", folder)
        for name, words in QUESTIONS.items():
            page = folder / f"{name}.html"
            page.write_text(terminal(words, folder), encoding="utf-8")
            photograph(page, out / f"{name}.png", (1190, 900))
        page = folder / "page.html"
        words = [sys.executable, "-m", "harness", "inspect", "kohya.safetensors", "--html", str(page)]
        subprocess.run(words, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, capture_output=True)
        photograph(page, out / "inspect-page.png", (1060, 1000))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
