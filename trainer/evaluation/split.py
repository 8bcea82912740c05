"""Which pictures are kept from training, so that the adapter can be judged by what it has not seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from preprocessing.pairs import record_of
from preprocessing.prepared import PreparedDataset
from preprocessing.quality import near_duplicates
from trainer.config import JobSettings
from trainer.draws import generator

FEWEST = 8  # of fewer pictures none can be spared: cross-validation
# Of the pictures, those kept from training: few, since each one is missed (docs/evaluation.md); at least, which is of
# each concept, and at most.
SHARE, LEAST, MOST = 0.1, 1, 16
MOST_SEEN = 8  # training pictures that are asked about where none is held out


@dataclass(frozen=True)
class Split:
    """Picture indices. `held_out` are never trained on. `folds` are the other way: each is left out of one further run,
    and together they are all pictures. Both are empty where nothing is judged by unseen pictures.
    """

    held_out: tuple[int, ...] = ()
    folds: tuple[tuple[int, ...], ...] = ()

    def asked(self, dataset: PreparedDataset) -> tuple[int, ...]:
        """What the job's own run is judged by: the pictures held out, or some of those that it is trained on."""
        every = [[index] for index in range(len(dataset.items))]
        return self.held_out or tuple(sorted(index for (index,) in _in_turn(every, dataset)[:MOST_SEEN]))


def split(dataset: PreparedDataset, settings: JobSettings) -> Split:
    """The split that the settings ask for, the same for the same pictures, settings and seed.

    Crops of one picture, the two of a pair and near-duplicates stay together, for a picture whose like is trained on is
    not unseen.
    """
    groups = _groups(dataset)
    order = torch.randperm(len(groups), generator=generator(settings.seed, "split")).tolist()
    shuffled = [groups[i] for i in order]
    if settings.holdout is None and len(groups) < FEWEST:
        shuffled.sort(key=lambda group: dataset.items[group[0]].concept or 0)  # each fold has something of every one
        count = min(settings.validation_folds, len(groups))
        folds = tuple(tuple(sorted(i for group in shuffled[k::count] for i in group)) for k in range(count))
        return Split(folds=folds) if count > 1 else Split()
    wanted = settings.holdout
    if wanted is None:
        concepts = {item.concept for item in dataset.items}
        wanted = min(MOST, max(LEAST * len(concepts), round(SHARE * len(groups))))
    return Split(held_out=tuple(sorted(i for group in _spared(shuffled, dataset)[:wanted] for i in group)))


def _spared(groups: list[list[int]], dataset: PreparedDataset) -> list[list[int]]:
    """The groups but the last one of each concept, for one at least is left to train on; the concepts in turn."""
    last = {dataset.items[i].concept: number for number, group in enumerate(groups) for i in group}
    return _in_turn([group for number, group in enumerate(groups) if number not in last.values()], dataset)


def _in_turn(groups: Sequence[list[int]], dataset: PreparedDataset) -> list[list[int]]:
    """The first group of each concept, then the second of each, ...: as they are where there is one concept."""
    met: Counter[int | None] = Counter()
    turns = []
    for group in groups:
        concept = dataset.items[group[0]].concept
        turns.append(met[concept])
        met[concept] += 1
    return [groups[place] for place in sorted(range(len(groups)), key=turns.__getitem__)]


def _groups(dataset: PreparedDataset) -> list[list[int]]:
    """Indices of items that must not be parted, in order of their first."""
    places: dict[str, list[int]] = {}
    for index, item in enumerate(dataset.items):
        places.setdefault(record_of(item.source), []).append(index)
    # the hash of a picture of one colour says nothing
    told = [name for name, indices in places.items() if dataset.items[indices[0]].blur is not None]
    hashes = [int(dataset.items[places[name][0]].perceptual_hash or "0", 16) for name in told]
    for group in near_duplicates(hashes):
        first, *others = (told[i] for i in group)
        for other in others:
            places[first] += places.pop(other)
    return [sorted(indices) for indices in places.values()]
