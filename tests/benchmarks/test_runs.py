"""Runs of benchmarks: kept as they come, made once, several at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import runs
from tests.benchmarks.one_run import spoken


def test_what_is_kept_is_read_again_and_nothing_is_there_at_first(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    assert runs.read_kept(path) == {}
    runs.keep(path, {"a": {"b": 0.5}})
    assert runs.read_kept(path) == {"a": {"b": 0.5}} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("jobs", "apart", "processes"), [(1, False, 1), (1, True, 3)])
def test_only_missing_runs_are_made(jobs: int, apart: bool, processes: int, tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    runs.keep(path, {"a": "old"})
    found = runs.run_missing(path, spoken, {name: (name + "!",) for name in "acde"}, jobs, apart)
    assert found == runs.read_kept(path) and found.pop("a") == "old"
    assert {name: one["said"] for name, one in found.items()} == {"c": "C!", "d": "D!", "e": "E!"}
    assert {one["threads"] for one in found.values()} == {1}
    assert len({one["process"] for one in found.values()} - {os.getpid()}) == processes


def test_a_run_that_fails_ends_the_benchmark_and_loses_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="b is refused"):
        runs.run_missing(tmp_path / "runs.json", spoken, {name: (name,) for name in "abc"}, 1, apart=False)
    kept = json.loads((tmp_path / "runs.json").read_text())
    assert kept["a"]["said"] == "A" and "b" not in kept


def test_the_runs_of_a_benchmark_that_is_killed_end_with_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from benchmarks import runs; from tests.benchmarks import one_run\n"
        "if __name__ == '__main__': runs.run_missing(Path(sys.argv[1]), one_run.endless, {'a': ()}, 1, apart=False)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "runs.json")]
    # what a run inherits stays open for as long as it lives
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=runs.ROOT) as benchmark:
        assert benchmark.stdout.readline() == b"begun\n"
        benchmark.kill()
        assert benchmark.communicate(timeout=30)[0] == b""
