"""Runs of benchmarks: kept as they come, made once, several at a time."""

from __future__ import annotations

import json
import subprocess
import threading
from pathlib import Path

import pytest

from benchmarks import runs


def test_what_is_kept_is_read_again_and_nothing_is_there_at_first(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    assert runs.read_kept(path) == {}
    runs.keep(path, {"a": {"b": 0.5}})
    assert runs.read_kept(path) == {"a": {"b": 0.5}} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("jobs", [1, 3])
def test_only_missing_runs_are_made(jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, made, lock = tmp_path / "runs.json", [], threading.Lock()

    def run_apart(module: str, options: list[str]) -> str:
        with lock:
            made.append((module, *options))
        return options[0].upper()

    monkeypatch.setattr(runs, "run_apart", run_apart)
    runs.keep(path, {"a": "old"})
    found = runs.run_missing(path, "benchmarks.x", {"a": ["a"], "b": ["b"], "c": ["c"], "d": ["d"]}, jobs)
    assert found == runs.read_kept(path) == {"a": "old", "b": "B", "c": "C", "d": "D"}
    assert sorted(made) == [("benchmarks.x", name) for name in "bcd"]


def test_a_run_that_fails_ends_the_benchmark_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_apart(module: str, options: list[str]) -> str:
        if options[0] == "b":
            raise subprocess.CalledProcessError(2, options)
        return options[0]

    monkeypatch.setattr(runs, "run_apart", run_apart)
    with pytest.raises(subprocess.CalledProcessError):
        runs.run_missing(tmp_path / "runs.json", "benchmarks.x", {"a": ["a"], "b": ["b"], "c": ["c"]}, 1)
    kept = json.loads((tmp_path / "runs.json").read_text())
    assert kept["a"] == "a" and "b" not in kept


def test_a_run_apart_is_a_process_of_its_own_on_one_thread() -> None:
    found = runs.run_apart("tests.benchmarks.one_run", ["--say", "hello"])
    assert found == {"said": "hello", "threads": "1"}
