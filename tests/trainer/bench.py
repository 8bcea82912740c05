"""A method attached to a base model, ready to take a step, set up as the job does it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from preprocessing.prepared import PreparedDataset
from trainer import cache, methods
from trainer.cache import Cache
from trainer.config import JobSettings
from trainer.families.base import Family
from trainer.fitting import preserved_prompts, texts
from trainer.methods.base import Method, ParameterGroup
from trainer.samples import Batch
from trainer.step import BatchMaker, TrainStep


@dataclass
class Bench:
    """What a step is taken with."""

    family: Family
    method: Method
    cached: Cache
    settings: JobSettings
    batches: BatchMaker
    module: TrainStep
    groups: list[ParameterGroup]

    def batch(self, step: int = 0, indices: tuple[int, ...] = (0, 1, 2, 3)) -> Batch:
        return self.batches.make(step, list(indices), range(len(indices)), len(indices))


def set_up(family: Family, settings: JobSettings, dataset: PreparedDataset) -> Bench:
    """Encode the data set and attach the method that the settings name."""
    method = methods.create(settings)
    preserved = preserved_prompts(settings, method, dataset)
    captions = [item.caption for item in dataset.items]
    cached = cache.build(family, dataset, [*texts(settings, method, captions), *preserved], lambda *_: None)
    groups = method.attach(family)
    batches = BatchMaker(cached, settings, torch.device("cpu"), preserved)
    module = TrainStep(family, method, cached, settings)
    return Bench(family, method, cached, settings, batches, module, groups)
