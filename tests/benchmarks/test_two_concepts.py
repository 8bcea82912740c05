"""How two concepts in a picture are counted; training and finding are the job's and the oracle's."""

from __future__ import annotations

from benchmarks import two_concepts
from trainer.config import JobSettings


def test_every_run_is_a_job_that_can_be_asked_for() -> None:
    for changes in two_concepts.RUNS.values():
        JobSettings(input_images="pictures.zip", **two_concepts.SHARED | changes)


def test_only_the_run_that_shows_both_asks_for_pictures_of_both() -> None:
    asked = {name: two_concepts.archive_options(settings) for name, settings in two_concepts.RUNS.items()}
    assert asked.pop("both shown, 900 steps") == ["--together", "12"]
    assert asked.pop("masks, attention in them") == ["--masks"] and not any(asked.values())


def test_presence_counts_each_and_both() -> None:
    found = two_concepts.presence([True, True, False, False], [True, False, True, False])
    assert found == {"own": 0.5, "other": 0.5, "both": 0.25}


def test_the_table_leaves_empty_what_was_not_asked() -> None:
    alone = {"own": 1.0, "other": 0.0, "both": 0.0, "background": 1.0, "position": 0.5}
    both = {"own": 0.5, "other": 0.25, "both": 0.25, "background": 1.0}
    lines = two_concepts.table({"default, seed 0": {"ROB": alone, "ROB beside TEA": both}}).splitlines()
    assert lines[2:] == [
        "| default, seed 0 | ROB | 1.00 | 0.00 | 0.00 | 1.00 | 0.50 |",
        "| default, seed 0 | ROB beside TEA | 0.50 | 0.25 | 0.25 | 1.00 |  |",
    ]
