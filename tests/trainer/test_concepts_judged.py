"""How several concepts are judged: what is drawn of each, what is held out, and whose gain is whose."""

from __future__ import annotations

import numpy as np
import pytest

from tests.trainer.two_concepts import TWO, of_two
from trainer import preview
from trainer.evaluation.exhibit import Exhibit
from trainer.evaluation.history import Answers, History
from trainer.evaluation.split import Split, split


def test_previews_show_each_concept_and_both(settings):
    chosen = settings(concepts=TWO)
    prompts = preview.prompts_of(chosen)
    assert prompts[:3] == ["a photo of ROB", "ROB on a beach at sunset", "a painting of ROB"]
    assert prompts[3:6] == ["a photo of TEA", "TEA on a beach at sunset", "a painting of TEA"]
    assert prompts[6:] == ["a photo of ROB and TEA", "a photo of a dog"]
    own = chosen.model_copy(update={"preview_prompts": ("{trigger} here", "TEA and ROB")})
    assert preview.prompts_of(own) == ["ROB here", "TEA here", "TEA and ROB"]
    exhibit = Exhibit.of(prompts, chosen, 2, True)
    assert exhibit.pairs == (("a photo of ROB", "a photo of dog"), ("a photo of TEA", "a photo of cat"))
    assert list(exhibit.rows(0)) == ["a photo of ROB", "a photo of dog", "a photo of TEA", "a photo of cat"]


@pytest.mark.parametrize("seed", range(4))
def test_of_each_concept_something_is_left_to_train_on(seed, dataset, settings):
    two = of_two(dataset)
    for holdout in (1, 2, 9):
        parting = split(two, settings(concepts=TWO, holdout=holdout, seed=seed))
        assert 3 not in parting.held_out and len(parting.held_out) == min(holdout, 2)
        assert parting.asked(two) == parting.held_out
    items = [item.model_copy(update={"concept": i % 2}) for i, item in enumerate(two.items)]
    even = two.model_copy(update={"items": tuple(items)})
    folds = split(even, settings(concepts=TWO, holdout=None, seed=seed)).folds
    assert len(folds) == 2 and all({i % 2 for i in fold} == {0, 1} for fold in folds)
    assert {i % 2 for i in split(even, settings(concepts=TWO, holdout=2, seed=seed)).held_out} == {0, 1}
    ten = even.model_copy(
        update={"items": tuple(items[i % 4].model_copy(update={"source": str(i)}) for i in range(10))}
    )
    assert {i % 2 for i in split(ten, settings(concepts=TWO, holdout=None, seed=seed)).held_out} == {0, 1}
    many = even.model_copy(update={"items": tuple(one for one in items if one.concept == 0) * 5 + tuple(items[1::2])})
    asked = Split().asked(many)
    assert len(asked) == 8 and set(asked) >= {10, 11}  # the second concept's are the last of all
    assert Split().asked(two.model_copy(update={"concepts": ()})) == (0, 1, 2, 3)


def test_a_history_of_some_pictures_is_that_of_their_points():
    answers = [Answers(step, np.arange(4.0) + 1 - step, np.arange(4.0), np.zeros(2)) for step in (0, 1)]
    whole = History(np.full(4, 2.0), (0.1, 0.2, 0.3, 0.4), (0, 1, 0, 1), True, tuple(answers))
    part = whole.of([1])
    assert part.pictures == (1, 1) and part.times == (0.2, 0.4)
    assert part.gain(1).mean == pytest.approx(((2 - 1) + (2 - 3)) / 2 / 2) and part.steps == [0, 1]
    assert whole.of([0, 1]).gain(1) == whole.gain(1)
