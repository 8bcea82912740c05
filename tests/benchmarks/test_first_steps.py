"""The first steps' own parts; what they measure is the job's and the oracle's."""

from __future__ import annotations

import pytest

from benchmarks import first_steps


def test_the_steps_looked_at_are_evaluated_and_the_job_ends_behind_the_last() -> None:
    assert all(step % first_steps.EVERY == 0 for step in first_steps.STEPS)
    for stage, done in (("cache", 999), ("train", 0), ("train", first_steps.STEPS[-1])):
        first_steps.stop_after(stage, done, 450)
    with pytest.raises(first_steps.Enough):
        first_steps.stop_after("train", first_steps.STEPS[-1] + 1, 450)


def test_the_table_has_a_row_for_each_step() -> None:
    found = {"subject": 0.0, "likeness": 0.75, "background": 0.5, "position": 1.0}
    lines = first_steps.table({"default": {"10": found, "25": found | {"subject": 0.25}}}).splitlines()
    assert lines[2:] == ["| default | 10 | 0.00 | 0.75 | 0.50 | 1.00 |", "| default | 25 | 0.25 | 0.75 | 0.50 | 1.00 |"]
