"""Measure the releases of docs/releases.md again: `python -m benchmarks.releases [LOADER...]` (fetches what it needs).

`--resume` goes on with a run that was cut; `--merge FILE...` takes what `lora-harness releases --out DIR` wrote to
DIR/releases.json instead of measuring.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from packaging.version import Version

from harness.law.released import TABLE as DATA
from harness.loaders.releases import beside, unpacked

OUT = Path("reports/out/measured")
_FORMATS = ("--format", "kohya", "--format", "diffusers")
_BENCHES = ("--bench", "sd-unet", "--bench", "flux", "--bench", "qwen-image")
WHAT: dict[str, tuple[str, ...]] = {
    "peft": ("--from", "0.6.2", "--bench", "qwen-image"),
    "diffusers": ("--from", "0.31.0", *_FORMATS, *_BENCHES),
    "diffsynth": ("--from", "1.0.0", "--every", "--bench", "qwen-image"),
    "lycoris": ("--from", "3.0.0", "--bench", "qwen-image"),
    "loralib": ("--every", "--bench", "qwen-image"),
}


def measured(loader: str, *options: str) -> list[dict[str, Any]]:
    """Return the tables of one loader, measured now."""
    folder = OUT / loader
    command = [sys.executable, "-m", "harness", "releases", loader, *WHAT[loader], "--install", "--out", str(folder)]
    subprocess.run([*command, *options], check=True)
    return read(folder / "releases.json")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the tables of a file, with the bytes of the releases that lie here."""
    tables: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return [{"bytes": _sizes(table["package"]), **table} for table in tables]


def _sizes(package: str) -> dict[str, int]:
    """Return the bytes of every release of a package that lies in a folder of its own, and of what they need."""
    own = unpacked(package)
    pins = {pin.split("==")[0] for release in own for pin in beside(package, release.version)}
    every = [*own, *(release for name in sorted(pins) for release in unpacked(name))]
    return {f"{release.name} {release.version}": _bytes_in(release.folder) for release in every}


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def merged(tables: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one table per loader: of each release what was measured last, oldest release first."""
    found: dict[str, dict[str, Any]] = {}
    for table in tables:
        releases = {each["version"]: each for each in found.get(table["loader"], {}).get("releases", ())}
        releases |= {each["version"]: each for each in table["releases"]}
        sizes = found.get(table["loader"], {}).get("bytes", {}) | table.get("bytes", {})
        ordered = sorted(releases.values(), key=lambda each: Version(each["version"]))
        found[table["loader"]] = {key: table[key] for key in ("loader", "package", "created", "versions")}
        found[table["loader"]]["releases"] = ordered
        found[table["loader"]]["bytes"] = sizes
    return [found[name] for name in WHAT if name in found]


def main(words: Sequence[str]) -> None:
    """Measure, or take what was measured, and write the data."""
    old = read(DATA) if DATA.exists() else []
    if words[:1] == ["--merge"]:
        new = [table for name in words[1:] for table in read(Path(name))]
    else:
        options = [word for word in words if word == "--resume"]
        names = [word for word in words if word not in options] or list(WHAT)
        new = [table for name in names for table in measured(name, *options)]
    DATA.write_text(json.dumps(merged([*old, *new]), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
