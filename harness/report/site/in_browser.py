"""The page that diagnoses a file where it lies: Python in WebAssembly and this very package lie beside it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError
from harness.outputs import replace_file, saying
from harness.report.html import asset
from harness.report.site.page import Page
from harness.text import printable

ADDRESS = "diagnose.html"
HOW = "`npm pack pyodide`, unpacked, and `pip download` of pydantic for it (docs/nightly.md has the commands)"
_PYODIDE = ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip", "pyodide-lock.json")
_WHEELS = ("pydantic", "pydantic_core", "typing_extensions", "typing_inspection", "annotated_types")
_PACKAGE = Path(__file__).parents[2]
_FIXTURES = "_fixtures"  # which only an installed package has
_KINDS = (".py", ".toml", ".json")
_THEN = (1980, 1, 1, 0, 0, 0)  # the least that zip can say: the same package gives the same bytes


@dataclass(frozen=True)
class Parts:
    """What the page needs and this package does not have: Python for WebAssembly, and five wheels for it."""

    pyodide: Sequence[Path]
    wheels: Sequence[Path]

    @classmethod
    def within(cls, folder: Path) -> Parts:
        """Find them below a folder.

        Raises:
            UserError: something is not there.
        """
        home = next((found.parent for found in sorted(folder.rglob(_PYODIDE[0]))), None)
        if home is None:
            raise UserError(f"{printable(folder, 300)}: has no {_PYODIDE[0]}; it takes {HOW}")
        every = sorted(folder.rglob("*.whl"))
        wheels = {name: [path for path in every if path.name.startswith(f"{name}-")] for name in _WHEELS}
        absent = [name for name in _PYODIDE if not (home / name).is_file()]
        absent += [f"{name}-*.whl" for name, found in wheels.items() if not found]
        if absent:
            raise UserError(f"{printable(folder, 300)}: has no {', '.join(absent)}; it takes {HOW}")
        return cls([home / name for name in _PYODIDE], [found[-1] for found in wheels.values()])

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yield what lies beside the page: address and content."""
        for path in self.pyodide:
            yield f"diagnose/pyodide/{path.name}", path.read_bytes()
        for path in self.wheels:
            yield f"diagnose/wheels/{path.name}", path.read_bytes()
        yield "diagnose/wheels.json", json.dumps([path.name for path in self.wheels]).encode()
        yield "diagnose/harness.zip", _this_package()
        yield "diagnose/worker.mjs", str(asset("diagnose_worker.mjs")).encode()

    def write(self, out: Path) -> None:
        """Write them below the folder of a site.

        Raises:
            UserError: one cannot be read or written.
        """
        with saying(out, "the page that diagnoses cannot be written"):
            for address, content in self.files():
                (out / address).parent.mkdir(parents=True, exist_ok=True)
                replace_file(out / address, content, durable=False)


def page(tools: Mapping[str, str]) -> Page:
    """Return the page; `tools` are names and titles to choose from."""
    words = "diagnose a file in the browser: what it is, what to pass"
    data = {"kind": "diagnose", "tools": dict(tools)}
    return Page(ADDRESS, "tool", "Diagnose a file here", "diagnose.html.j2", {"choices": tools}, data, words)


def _this_package() -> bytes:
    kept = io.BytesIO()
    with zipfile.ZipFile(kept, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for path in _PACKAGE.rglob("*") if path.suffix in _KINDS and path.is_file()):
            if _FIXTURES in path.parts:
                continue
            name = Path("harness", path.relative_to(_PACKAGE)).as_posix()
            archive.writestr(zipfile.ZipInfo(name, _THEN), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return kept.getvalue()
