"""Judging in the middle of real runs on the tiny models: it changes nothing, and what it says is true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from preprocessing.errors import UserError
from trainer import fitting, methods
from trainer.cache import build
from trainer.evaluation import history
from trainer.evaluation.judge import BEST, LAST, MIDDLE, rule
from trainer.evaluation.points import BANDS, Points, affordable
from trainer.step import TrainStep

RUN = {"max_train_steps": 6, "evaluate_every": 2, "holdout": 1, "train_batch_size": 2}


def log_of(output_dir: Path) -> history.History:
    return history.read(output_dir / "evaluation" / "history.jsonl", 10**6)


@pytest.fixture
def asked(lab, settings, dataset, tiny_model):
    """A method attached to a fresh model, the module that answers, and points on two pictures."""

    def made(method: str = "pivotal", points: int = 16, **changes: object):
        chosen = settings(base_model=str(tiny_model), method=method, class_word="dog", **changes)
        text = [item.caption for item in dataset.items] + [item.caption.replace("TOK", "dog") for item in dataset.items]
        unrelated = ("a lake", "a street at night")
        cached = build(lab.family, dataset, [*text, *unrelated], lambda *_: None)
        way = methods.create(chosen)
        return way, TrainStep(lab.family, way, cached, chosen), Points.of(cached, chosen, (1, 3), (points, unrelated))

    return made


def test_points_are_even_in_time_and_always_the_same(asked):
    _, _, points = asked(points=24)
    _, _, again = asked(points=24, caption_dropout=0.9)
    assert len(points.times) == 24 and points.pictures == [0] * 12 + [1] * 12
    for batch, other in zip(points.batches, again.batches, strict=True):
        assert torch.equal(batch.noise, other.noise) and torch.equal(batch.data, other.data)
        assert batch.captions == other.captions and "" not in batch.captions
        assert torch.equal(torch.bincount((batch.uniform * BANDS).long(), minlength=BANDS), torch.full((BANDS,), 3))
        assert torch.equal(batch.uniform, batch.uniform.sort().values)


@pytest.mark.parametrize("method", ["pivotal", "lora", "full"])
def test_fresh_is_the_base_model_and_trained_is_not(method, asked, lab):
    way, step, points = asked(method)
    trained = lab.train(way, steps=0)
    base = points.base_losses(step)
    torch.testing.assert_close(points.plain_losses(step), base, rtol=1e-5, atol=1e-6)  # no trigger: nothing is new
    assert points.drift(step).abs().max() < 1e-9
    assert torch.equal(points.losses(step), points.losses(step))
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(points.base_losses(step), base, rtol=1e-5, atol=1e-6)
    assert points.drift(step).min() > 1e-6
    assert (points.losses(step) - base).abs().max() > 1e-4


def test_losses_are_those_that_training_minimises(asked, lab):
    way, step, points = asked("lora", caption_dropout=0.0)
    way.attach(lab.family)
    batch = points.batches[0]
    assert step.losses(batch).mean().item() == pytest.approx(step(batch).item(), rel=1e-6)


def test_a_larger_run_affords_more_points(settings):
    counts = [affordable(settings(max_train_steps=steps), 1, 9) for steps in (2, 400, 4000, 10**6)]
    assert counts == sorted(counts) and counts[0] == 4 * BANDS and counts[-1] == 256
    assert affordable(settings(max_train_steps=2000), 2, 9) == 2 * affordable(settings(max_train_steps=2000), 1, 9)


def test_evaluations_come_evenly_and_at_the_end(settings):
    assert rule(settings(max_train_steps=450, evaluate_every=None)).steps == (57, 114, 171, 228, 285, 342, 399, 450)
    assert rule(settings(max_train_steps=1, evaluate_every=None)).steps == (1,)
    assert rule(settings(max_train_steps=10, evaluate_every=4)).steps == (4, 8, 10)


def test_judging_changes_nothing_of_the_training(settings, train_on, dataset, tmp_path):
    often = train_on(settings(**RUN | {"evaluate_every": 1}), dataset)
    once = train_on(settings(**RUN | {"evaluate_every": 6, "output_dir": tmp_path / "once"}), dataset)
    assert often.losses == once.losses
    assert often.tensors.keys() == once.tensors.keys()
    assert all(torch.equal(value, once.tensors[name]) for name, value in often.tensors.items())
    assert log_of(tmp_path / "out").steps == [0, 1, 2, 3, 4, 5, 6] and log_of(tmp_path / "once").steps == [0, 6]


def test_held_out_pictures_are_never_trained_on(settings, train_on, dataset, monkeypatch):
    seen: list[str] = []
    original = fitting.BatchMaker.make
    made = lambda self, step, *rest: record(original(self, step, *rest), step)  # noqa: E731

    def record(batch, step):
        if isinstance(step, int):
            seen.extend(batch.captions)
        return batch

    monkeypatch.setattr(fitting.BatchMaker, "make", made)
    train_on(settings(**RUN | {"caption_dropout": 0.0}), dataset)
    assert len(seen) == 12 and len(set(seen)) == 3


def test_a_resumed_run_goes_on_judging(settings, train_on, dataset, tmp_path):
    whole = train_on(settings(**RUN, checkpoint_every=3), dataset)
    broken = settings(**RUN, checkpoint_every=3, output_dir=tmp_path / "broken")

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "train" and done == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train_on(broken, dataset, stop)
    resumed = train_on(broken.model_copy(update={"resume": True}), dataset)
    one, other = log_of(tmp_path / "out"), log_of(tmp_path / "broken")
    assert one.steps == other.steps == [0, 2, 4, 6]
    for step in one.steps:
        assert (one.at(step).losses == other.at(step).losses).all() and (
            one.at(step).drift == other.at(step).drift
        ).all()
    assert all(torch.equal(value, whole.tensors[name]) for name, value in resumed.tensors.items())


def test_an_overfitted_run_is_ended_and_its_best_step_delivered(settings, train_on, dataset, tmp_path, monkeypatch):
    """With a rule that finds every step after the first overfitted: what is delivered are that step's weights."""
    monkeypatch.setattr(history.History, "overfitted", lambda self, step: step > 2)
    monkeypatch.setattr(history.History, "best_step", property(lambda self: 2))
    run = {"max_train_steps": 20, "evaluate_every": 2, "holdout": 1, "learning_rate": 0.01}
    trained = train_on(settings(**run), dataset)
    assert len(trained.losses) == 6  # two evaluations after the best
    assert json.loads((trained.weights / "manifest.json").read_text())["step"] == 2
    short = train_on(settings(**run, output_dir=tmp_path / "short", early_stop=False), dataset)
    assert len(short.losses) == 20 and short.losses[:6] == trained.losses
    assert all(torch.equal(value, short.tensors[name]) for name, value in trained.tensors.items())
    assert {path.name for path in (tmp_path / "out" / "weights").iterdir()} == {
        BEST,
        LAST,
    }  # it ended before the middle
    assert {path.name for path in (tmp_path / "short" / "weights").iterdir()} == {BEST, MIDDLE, LAST}


def test_delivered_weights_answer_as_they_did_when_they_were_judged(settings, train_on, dataset, load_family, tiny_sd):
    chosen = settings(**RUN, learning_rate=0.01, class_word="dog")
    trained = train_on(chosen, dataset)
    judged = log_of(chosen.output_dir)
    family = load_family(tiny_sd)
    cached = build(family, dataset, [], lambda *_: None)
    way = methods.create(chosen)
    way.load(trained.weights, family)
    fitted_on = fitting.split(dataset, chosen).held_out
    points = Points.of(cached, chosen, fitted_on, (len(judged.times), ("a lake",)))
    found = points.losses(TrainStep(family, way, cached, chosen)).numpy()
    assert found == pytest.approx(judged.at(6).losses, rel=1e-5)
    assert abs(found - judged.at(0).losses).max() > 1e-4


@pytest.mark.parametrize("method", ["pivotal", "lora", "textual_inversion", "full"])
def test_a_run_that_learns_nothing_fails_and_keeps_what_there_is(method, settings, train_on, dataset):
    still = {"learning_rate": 0.0, "text_embedding_lr": 0.0, "weight_decay": 0.0, "max_train_steps": 2}
    chosen = settings(method=method, **still)
    with pytest.raises(UserError, match=r"no measurable effect.*learning_rate"):
        train_on(chosen, dataset)
    assert (chosen.output_dir / "weights" / "last" / "manifest.json").is_file()


def test_few_pictures_are_cross_validated_and_all_trained_on(settings, train_on, dataset, tmp_path):
    plain = train_on(settings(max_train_steps=4), dataset)
    folded = settings(max_train_steps=4, holdout=None, validation_folds=2, output_dir=tmp_path / "folds")
    stages: list[tuple[str, int, int]] = []
    trained = train_on(folded, dataset, lambda *told: stages.append(told))
    assert trained.losses == plain.losses  # the folds leave no trace in the job's own run
    assert all(torch.equal(value, plain.tensors[name]) for name, value in trained.tensors.items())
    assert [told for told in stages if told[0] == "cross-validate" and told[2] == 8][-1][1] == 8
    for number in (1, 2):
        run = history.read(folded.output_dir / "evaluation" / f"fold_{number}" / "history.jsonl", 4)
        assert run.unseen and run.steps[-1] == 4
    assert not log_of(folded.output_dir).unseen


def test_a_step_that_cross_validation_finds_ends_the_run(settings, train_on, dataset, monkeypatch):
    monkeypatch.setattr(history.History, "chosen_step", lambda self: 2)
    chosen = settings(max_train_steps=6, evaluate_every=2, holdout=None)
    trained = train_on(chosen, dataset)
    assert len(trained.losses) == 2
    assert json.loads((trained.weights / "manifest.json").read_text())["step"] == 2
