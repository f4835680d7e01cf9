"""The JSON schema of a run's lines; `python -m harness.report.schema reports/schema.json` writes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue
from pydantic_core import core_schema

from harness.outputs import replace_file
from harness.report.models import ADAPTER, SCHEMA_VERSION

_MODE: JsonSchemaMode = "serialization"


class _Schema(GenerateJsonSchema):
    """JSON has no NaN and no infinity: they are written as these strings."""

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        return {"anyOf": [super().float_schema(schema), {"enum": ["NaN", "Infinity", "-Infinity"]}]}


def run_schema() -> dict[str, Any]:
    """Return the schema of one line of a run file, as a JSON Schema 2020-12 document."""
    body = ADAPTER.json_schema(schema_generator=_Schema, mode=_MODE)
    about = {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "One line of a lora-harness run file",
        "description": f"Version {SCHEMA_VERSION}: a header, then records, then a footer, one JSON object per line.",
    }
    schema: dict[str, Any] = about | _reflowed(body)
    return schema


def _reflowed(node: Any) -> Any:
    """Take the line breaks of docstrings out of descriptions, so that reformatting one leaves the schema alone."""
    if isinstance(node, list):
        return [_reflowed(value) for value in node]
    if isinstance(node, dict):
        described = isinstance(node.get("description"), str)
        one_line = {"description": " ".join(node["description"].split())} if described else {}
        return {key: _reflowed(value) for key, value in node.items()} | one_line
    return node


def main(argv: list[str] | None = None) -> int:
    """Write the schema to the path given, or print it."""
    argv = sys.argv[1:] if argv is None else argv
    text = json.dumps(run_schema(), indent=1, sort_keys=True) + "\n"
    if argv:
        replace_file(Path(argv[0]), text.encode())
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
