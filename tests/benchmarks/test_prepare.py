"""The benchmark of preparing: its pictures all differ, and its figures are those of the run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import prepare


def test_no_two_pictures_are_the_same(tmp_path: Path) -> None:
    prepare.make(tmp_path, 3 * prepare.DIFFERENT, 32)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 3 * prepare.DIFFERENT


def test_figures_are_those_of_the_run(root: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.prepare", "--pictures", "70", "--side", "120", "--resolution", "64"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=280, check=True)
    figures = json.loads(done.stdout)
    assert figures["pictures"] == figures["used"] == 70 and figures["rejected"] == 0
    assert 30 < figures["peak_mib"] < 4000
    assert figures["seconds"]["first"] > figures["seconds"]["unchanged"] >= 0
