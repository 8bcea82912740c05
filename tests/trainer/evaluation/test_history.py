"""What follows from the answers: closed forms on made-up losses."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.evaluation import history
from trainer.evaluation.bootstrap import interval
from trainer.evaluation.history import Answers, History
from trainer.evaluation.summary import HELD_OUT, SEEN, Measured, Summary, curve

POINTS = 32
NOISE = np.linspace(-0.05, 0.05, POINTS)


def made(losses: list[float], base: float = 1.0, unseen: bool = True) -> History:
    """A run whose mean losses are given, at steps 0, 10, 20, ...; single points scatter, each alike in all steps."""
    answers = tuple(
        Answers(10 * i, loss + NOISE, 1.25 * (loss + NOISE), np.full(8, 0.01 * i), seconds=0.5)
        for i, loss in enumerate(losses)
    )
    times = tuple(np.arange(POINTS) / POINTS)
    return History(base + NOISE, times, (0, 1) * (POINTS // 2), unseen, answers)


def test_an_interval_of_equal_values_is_a_point():
    assert interval([0.3] * 9, [0] * 9) == pytest.approx((0.3, 0.3, 0.3))


def test_an_interval_holds_the_true_mean_about_as_often_as_it_says():
    random, hits = np.random.default_rng(5), 0
    for _ in range(200):
        found = interval(random.normal(2.0, 1.0, 40), [0, 1] * 20)
        hits += found.low <= 2.0 <= found.high
    assert 0.88 < hits / 200 <= 0.99


def test_what_differs_between_pictures_does_not_widen_the_interval():
    together = interval([0.0] * 10 + [1.0] * 10, [0] * 10 + [1] * 10)
    assert together == pytest.approx((0.5, 0.5, 0.5))


def test_gain_contrast_drift_and_bands_are_their_closed_forms():
    run = made([1.0, 0.8])
    assert run.gain(10) == pytest.approx((0.2, 0.2, 0.2))  # in pairs, so that the scatter of points cancels
    assert run.contrast(10).mean == pytest.approx(0.2)
    assert run.drift(10) == pytest.approx((0.01, 0.01, 0.01))
    assert [band.mean for band in run.bands(10)] == pytest.approx(
        [0.8 + NOISE[8 * k : 8 * k + 8].mean() for k in range(4)]
    )


def test_risen_is_in_units_of_the_best_gain():
    run = made([1.0, 0.6, 0.7, 1.1])
    assert run.risen(10).mean == 0
    assert run.risen(20).mean == pytest.approx(0.25)
    assert run.risen(30).mean == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("losses", "delivered"),
    [
        ([1.0, 0.8, 0.6], 20),  # still falling
        ([1.0, 0.6, 0.8], 20),  # turned, but better than the base model: usual
        ([1.0, 0.6, 1.1], 10),  # worse than the base model
        ([1.0, 1.2, 1.5], 10),  # never better, and ever worse
        ([1.0, 1.2, 1.1], 20),
    ],
)
def test_the_last_step_is_delivered_unless_it_lost_all_that_was_gained(losses, delivered):
    run = made(losses)
    assert run.chosen_step() == delivered
    assert run.overfitted(20) == (delivered == 10)
    assert made(losses, unseen=False).chosen_step() == 20  # pictures that were trained on cannot tell


def test_a_run_is_stopped_only_when_it_goes_on_to_be_overfitted():
    assert not made([1.0, 0.6, 1.1]).turned()
    assert made([1.0, 0.6, 1.1, 1.2]).turned()
    assert not made([1.0, 0.6, 1.1, 0.7]).turned()


def test_a_rise_within_chance_is_no_overfitting():
    run = made([1.0, 0.9])
    scatter = np.random.default_rng(1).normal(0, 1.0, POINTS)
    scatter -= scatter.mean() - 0.12  # the mean is worse than the base model's, by less than can be told
    noisy = Answers(20, run.answers[1].losses + scatter, run.answers[1].plain, run.answers[1].drift)
    again = History(run.base, run.times, run.pictures, True, (*run.answers, noisy))
    assert again.at(20).losses.mean() > again.base.mean() and not again.overfitted(20)


def test_a_dead_adapter_is_one_whose_losses_stay():
    assert made([1.0, 1.0]).is_dead(10)
    assert not made([1.0, 1.0 - 1e-4]).is_dead(10)
    one = made([1.0, 1.0])
    one.answers[1].losses[3] += 1e-3  # a single point is life
    assert not one.is_dead(10)


def test_folds_are_joined_at_the_steps_that_both_have():
    one, two = made([1.0, 0.8, 0.6]), made([1.0, 0.6])
    whole = history.merged([one, two])
    assert whole.steps == [0, 10] and len(set(whole.pictures)) == 4
    assert whole.at(10).losses.mean() == pytest.approx(0.7)
    assert len(whole.base) == len(whole.times) == len(whole.pictures) == 2 * POINTS


def test_a_history_is_read_as_it_was_written_up_to_a_step(tmp_path):
    run, path = made([1.0, 0.8, 0.6]), tmp_path / "folder" / "history.jsonl"
    history.write(path, run)
    again = history.read(path, 10)
    assert again.steps == [0, 10] and again.unseen and again.pictures == run.pictures
    assert np.array_equal(again.at(10).losses, run.at(10).losses) and np.array_equal(again.base, run.base)
    assert history.read(tmp_path / "none", 10) is None


def told(run: History, **changes: object) -> Summary:
    end = run.steps[-1]
    values = {"judged_by": HELD_OUT, "held_out": ("a.png", "b.png"), "planned_steps": end, "last_step": end}
    values |= {"delivered_step": run.chosen_step(), "best_step": run.best_step, "risen": Measured.of(run.risen(end))}
    values |= {"overfitted": run.overfitted(end), "base_loss": float(run.base.mean()), "curve": curve(run)}
    return Summary(**values | changes)


def test_the_sentences_say_which_step_and_why():
    overfitted = " ".join(told(made([1.0, 0.6, 1.1])).sentences())
    assert "weights are those of step 10; training ended at step 20" in overfitted
    assert "Probably overfitted after step 10" in overfitted and "a.png, b.png" in overfitted
    assert "predicted 40.0 % (40.0 to 40.0 %) better than by the base model" in overfitted
    turned = " ".join(told(made([1.0, 0.6, 0.7])).sentences())
    assert (
        "those of the last step, 20." in turned
        and "best after step 10; since then the loss has risen by 25.0 %" in turned
    )
    assert "no sign of overfitting" in " ".join(told(made([1.0, 0.6])).sentences())
    worse = " ".join(told(made([1.0, 1.2, 1.5])).sentences())
    assert "risen by 30.0 % (30.0 to 30.0 %) of the base model's loss" in worse and "predicted worse than" in worse
    stopped = told(made([1.0, 0.6, 0.5]), planned_steps=80)
    assert "ended after step 20 of 80" in stopped.sentences()[0]
    seen = " ".join(told(made([1.0, 0.6], unseen=False), judged_by=SEEN, held_out=()).sentences())
    assert "nothing can be said of unseen ones" in seen and "overfitt" not in seen


def test_a_summary_goes_through_json_and_scores_its_delivered_step():
    summary = told(made([1.0, 0.6, 1.1]), near_copies=0.25)
    assert Summary.model_validate_json(summary.model_dump_json()) == summary
    assert summary.scores() == pytest.approx(
        {"held_out_gain": 0.4, "trigger_contrast": 0.2, "drift": 0.01, "near_copies": 0.25}
    )
