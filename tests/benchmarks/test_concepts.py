"""The benchmark's own arithmetic; what it measures is the job's and the oracle's."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import concepts
from trainer.config import JobSettings


def run(subject: float, background: float = 1.0, position: float = 1.0) -> dict:
    return {
        "subject": subject,
        "likeness": subject / 2,
        "background": background,
        "position": position,
        "drift": 0.02,
        "bleed": 0.0,
        "seconds": 100.0,
        "parameters": 1000,
    }


RUNS = {
    "baseline/robot/0": run(0.9),
    "baseline/robot/1": run(0.5),
    "baseline/snail/0": run(0.1),
    "rank 8/robot/0": run(0.8, background=0.5),
    "rank 8/robot/1": run(0.4, background=0.5),
}


def test_every_variant_is_a_job_that_can_be_asked_for() -> None:
    for variant in concepts.VARIANTS:
        JobSettings(input_images="pictures.zip", **concepts.settings_of(variant))
    assert len(concepts.SPRITES) >= 4 and concepts.VARIANTS[concepts.BASELINE] == {}


def test_a_variant_is_compared_with_the_baseline_of_the_same_sprite_and_seed() -> None:
    found = concepts.against_baseline(RUNS, "rank 8", lambda one: one["subject"])
    assert found.mean == pytest.approx(-0.1) and found.low == pytest.approx(found.high)
    prompt = concepts.against_baseline(RUNS, "rank 8", concepts.prompt_score)
    assert prompt.mean == pytest.approx(-0.25)
    assert concepts.against_baseline(RUNS, "DoRA", concepts.prompt_score) is None


def test_the_table_has_a_row_for_each_variant_that_ran() -> None:
    lines = concepts.table(RUNS).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| baseline", "| rank 8"]
    assert "| 0.50 (" in lines[2] and lines[2].endswith("|  |  |  |")
    assert "-0.100 (-0.100 to -0.100) | -0.050 (-0.050 to -0.050) | -0.250" in lines[3]
    assert len({line.count("|") for line in lines}) == 1


def test_a_variant_that_is_no_more_keeps_its_row() -> None:
    lines = concepts.table({"its switch is gone/robot/0": run(0.2)} | RUNS).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| baseline", "| rank 8", "| its switch is gone"]


def test_the_prompt_that_a_variant_is_aligned_to_is_the_one_that_is_drawn() -> None:
    from toybox.captions import compose
    from toybox.world import Background

    pattern, colour, position = concepts.SCENE
    asked = concepts.VARIANTS["aligned to a prompt"]["alignment_prompt"]
    assert asked == compose("{trigger}", Background(pattern, colour), position)


def test_the_scenes_table_has_the_variants_that_drew_it() -> None:
    scene = {"subject": 0.25, "background": 1.0, "position": 0.75}
    runs = {"baseline/robot/0": run(0.9) | {"scene": scene}, "rank 8/robot/0": run(0.8)}
    lines = concepts.scene_table(runs).splitlines()
    assert len(lines) == 3 and lines[2].startswith("| baseline | 1 | 0.25 (0.25 to 0.25) | 1.00")


def test_the_spread_is_that_over_the_seeds_and_not_over_the_sprites() -> None:
    baseline = concepts.of_variant(RUNS, concepts.BASELINE)
    assert concepts.seed_spread(baseline) == pytest.approx((0.2**2 / 2) ** 0.5)  # 0.9 and 0.5; the snail ran once


def test_more_seeds_of_a_sprite_stand_in_a_table_of_their_own() -> None:
    more = RUNS | {f"baseline/robot/{seed}": run(0.1) for seed in range(2, 8)}
    assert "| baseline | 4 | 0.40 (" in concepts.table(more)  # robot 0.9, 0.5, 0.1 and the snail's 0.1
    assert len(concepts.spread_table(RUNS).splitlines()) == 2
    lines = concepts.spread_table(more).splitlines()
    assert lines[2:] == ["| robot | baseline | 8 | 0.250 | 0.100 | 0.278 | 0.125 | 0.050 | 0.139 |"]


def test_the_plot_is_the_same_for_the_same_runs(tmp_path: Path) -> None:
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    concepts.plot(RUNS, first)
    concepts.plot(RUNS, second)
    assert first.read_bytes() == second.read_bytes() and b"rank 8" in first.read_bytes()


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(SystemExit) as error:
        concepts.main(["--out", "x.json", "--variant", "rank 9"])
    assert error.value.code == 2
