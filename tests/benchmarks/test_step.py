"""The benchmark's own arithmetic; what it measures is the job's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks import step


def test_warm_up_and_other_stages_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now = step.Clock(), 0.0
    monkeypatch.setattr(step.time, "perf_counter", lambda: now)
    clock("cache", 1, 1)
    clock("train", 0, 9)
    for i in range(9):
        now += 100 if i < step.WARM_UP else 2
        clock("train", i + 1, 9)
    assert clock.step_seconds() == 2


def test_one_slow_step_does_not_move_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now = step.Clock(), 0.0
    monkeypatch.setattr(step.time, "perf_counter", lambda: now)
    for i in range(12):
        now += 50 if i == 8 else 2
        clock("train", i + 1, 12)
    assert clock.step_seconds() == 2


def test_peak_memory_is_in_mib() -> None:
    held = psutil.Process().memory_info().rss / 2**20
    assert held * 0.5 < step.peak_memory()["process_mib"] < psutil.virtual_memory().total / 2**20


def test_table_names_machine_and_stages() -> None:
    figures = {
        "settings": {"train_batch_size": 4},
        "machine": step.machine(),
        "images_per_second": 12.345,
        "peak": {"process_mib": 100.4},
        "stage_seconds": {"cache": 1.0, "train": 2.5},
    }
    lines = step.table(figures).splitlines()
    assert lines[0].startswith("cpu ") and len(lines[0].split()) > 1
    assert [line.split()[-2:] for line in lines[-4:]] == [
        ["images/s", "12.35"],
        ["100", "MiB"],
        ["1.00", "s"],
        ["2.50", "s"],
    ]


def test_too_few_steps_are_refused_from_any_folder(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "benchmarks" / "step.py"), "--steps", str(step.WARM_UP)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--steps should be more than" in done.stderr
