"""Which pictures are kept from training."""

from __future__ import annotations

from pathlib import Path

import pytest

from preprocessing.prepared import PreparedDataset, PreparedItem
from trainer.config import JobSettings
from trainer.evaluation.split import FEWEST, Split, split


def dataset(hashes: list[int], sources: list[str] | None = None) -> PreparedDataset:
    items = [
        PreparedItem(
            image=f"{i}.png",
            caption="TOK",
            caption_source="user",
            source=sources[i] if sources else f"{i}.jpg",
            original_size=(8, 8),
            resized_size=(8, 8),
            crop=(0, 0),
            size=(8, 8),
            perceptual_hash=f"{value:016x}",
            blur=0.1,
        )
        for i, value in enumerate(hashes)
    ]
    return PreparedDataset(items=items, trigger_word="TOK", resolution=8, dataset_hash="x", folder=Path())


def different(count: int) -> list[int]:
    """Hashes no two of which are near."""
    return [0xFF << 8 * i if i < 8 else 0xF0F0 << 4 * i for i in range(count)]


def parted(data: PreparedDataset, **changes: object) -> Split:
    return split(data, JobSettings(input_images="x", **changes))


@pytest.mark.parametrize(("pictures", "held"), [(FEWEST, 1), (12, 1)])
def test_a_few_of_enough_pictures_are_held_out(pictures, held):
    found = parted(dataset(different(pictures)))
    assert len(set(found.held_out)) == held and not found.folds
    assert set(found.held_out) < set(range(pictures))
    assert found == parted(dataset(different(pictures)))  # always the same ones
    others = {parted(dataset(different(pictures)), seed=seed).held_out for seed in range(20)}
    assert len(others) > 5


@pytest.mark.parametrize("pictures", [2, 3, FEWEST - 1])
@pytest.mark.parametrize("folds", [2, 3])
def test_few_pictures_are_left_out_in_turn_each_once(pictures, folds):
    found = parted(dataset(different(pictures)), validation_folds=folds)
    assert len(found.folds) == min(folds, pictures) and not found.held_out
    assert sorted(sum(found.folds, ())) == list(range(pictures))


@pytest.mark.parametrize("changes", [{"holdout": 0}, {"validation_folds": 0}, {"validation_folds": 1}])
def test_everything_may_be_trained_on(changes):
    assert parted(dataset(different(5)), **changes) == Split()


def test_one_picture_is_trained_on():
    assert parted(dataset([1])) == Split()
    assert parted(dataset([1]), holdout=5) == Split()


def test_as_many_as_asked_but_one_is_left_to_train_on():
    assert len(parted(dataset(different(12)), holdout=5).held_out) == 5
    assert len(parted(dataset(different(4)), holdout=9).held_out) == 3


def test_near_duplicates_and_crops_of_one_picture_stay_together():
    near = [value ^ bit for value in different(4) for bit in (0, 1, 3)]
    for seed in range(10):
        held = set(parted(dataset(near), holdout=1, seed=seed).held_out)
        assert held in [{3 * group, 3 * group + 1, 3 * group + 2} for group in range(4)]
    crops = dataset(different(6), ["a", "b", "a", "b", "a", "c"])
    for seed in range(10):
        assert set(parted(crops, holdout=1, seed=seed).held_out) in [{0, 2, 4}, {1, 3}, {5}]


def test_copies_of_one_picture_are_not_split():
    assert parted(dataset([7] * 12)) == Split()
