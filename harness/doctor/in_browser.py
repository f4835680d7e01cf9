"""`diagnose` for a page: files that a browser mounts, their headers alone, the answer as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.doctor.answer import Question
from harness.doctor.causes import Saw
from harness.doctor.diagnose import diagnose
from harness.doctor.told import as_data
from harness.errors import UserError
from harness.files.format import CONFIG_NAME

_UNSEEN = "the numbers themselves: only the header was read, so NaN and factors that are zero are not seen"
_WITHOUT = f"; and {CONFIG_NAME}, which has alpha and the rank: drop it with the file"
_ONE = "one file at a time, or a PEFT adapter with its adapter_config.json"


def answer(
    folder: str, names: Sequence[str], tool: str = "", saw: Saw | None = None, lora_alpha: float | None = None
) -> str:
    """Return what is said of the files `names` in `folder`, as JSON: `lines`, or an `error` in one sentence.

    One file is diagnosed as it is, several as a PEFT folder.
    """
    whole = CONFIG_NAME in names
    if len(names) > 1 and not whole:
        return json.dumps({"error": _ONE})
    before = os.getcwd()
    os.chdir(folder)  # so that paths and commands that are shown are those of whoever stands beside the file
    try:
        return json.dumps(_told(Path() if whole else Path(names[0]), tool, saw, lora_alpha))
    finally:
        os.chdir(before)


def _told(path: Path, tool: str, saw: Saw | None, lora_alpha: float | None) -> dict[str, Any]:
    try:
        asked = Question(lora_alpha=lora_alpha)
        found = diagnose(path, tool=tool or None, asked=asked, saw=saw or None, headers_only=True)
    except UserError as error:
        return {"error": str(error)}
    alone = found.traits.adapter.format == "peft" and path.name
    unseen = _UNSEEN + (_WITHOUT if alone else "")
    return {"lines": as_data(found)["lines"], "unseen": unseen, "exit_code": found.exit_code}
