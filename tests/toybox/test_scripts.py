"""The scripts that trained the toybox's models, and the benchmarks, are not run by tests: at least they can be."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    f"{folder}.{path.stem}"
    for folder, pattern in (("toybox", "train_*.py"), ("benchmarks", "*.py"))
    for path in sorted((ROOT / folder).glob(pattern))
    if "__main__" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_everything_that_a_script_imports_is_there(name: str) -> None:
    assert callable(importlib.import_module(name).main)
