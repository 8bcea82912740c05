"""docs/inputs.md says what Cog's signatures and the settings say: the same names, values, defaults and words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import predict
from tests.cog.schema import openapi
from trainer.config import JobSettings

HEAD = ["| name | values | default | what it is |", "|---|---|---|---|"]
KINDS = {"string": "text", "boolean": "true, false", "array": "list"}
FORMATS = {"uri": "file", "path": "path"}
BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}


def row(name: str, spec: dict[str, Any], required: bool, text: str) -> str:
    """One line of a table, from a property of a JSON schema."""
    default = spec.get("default")
    if isinstance(default, bool):
        default = str(default).lower()
    shown = "required" if required else "none" if default is None else f"`{default}`" if default != "" else '`""`'
    return f"| `{name}` | {values(spec)} | {shown} | {text} |"


def values(spec: dict[str, Any]) -> str:
    one = next((part for part in spec.get("anyOf", []) if part["type"] != "null"), spec)
    if "enum" in one:
        return ", ".join(one["enum"])
    kind = FORMATS.get(one.get("format")) or KINDS.get(one["type"], one["type"])
    return " ".join([kind, *(f"{word} {one[bound]:g}" for bound, word in BOUNDS.items() if bound in one)])


def input_rows(component: str, model: type[BaseModel], renamed: dict[str, str]) -> Iterator[str]:
    """A row for each input as Cog shows it, with the setting's own words."""
    schemas = openapi()["components"]["schemas"]
    for name, spec in schemas[component]["properties"].items():
        field = model.model_fields.get(renamed.get(name, name))
        shown = spec | (schemas[name] if "allOf" in spec else {})
        required = name in schemas[component]["required"]
        yield row(name, shown, required, field.description if field else spec["description"])


def config_rows() -> Iterator[str]:
    """A row for each setting that only the input `config` can hold."""
    inputs = openapi()["components"]["schemas"]["TrainingInput"]["properties"]
    for name, spec in JobSettings.model_json_schema()["properties"].items():
        if name not in inputs:
            yield row(name, spec, False, spec["description"])


TABLES = {
    "Training": lambda: input_rows("TrainingInput", JobSettings, {}),
    "Settings for `config`": config_rows,
    "Drawing": lambda: input_rows("Input", predict.PredictSettings, {"replicate_weights": "weights"}),
}


@pytest.mark.parametrize("title", TABLES)
def test_the_table_is_that_of_the_code(title: str, root: Path) -> None:
    page = (root / "docs" / "inputs.md").read_text(encoding="utf-8")
    section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
    found = [line for line in section.splitlines() if line.startswith("|")]
    assert found == [*HEAD, *TABLES[title]()]
