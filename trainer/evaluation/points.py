"""Fixed questions to the model: pictures at stratified times in noise that never changes.

The same points are asked again and again, so that answers are compared in pairs and most of their chance cancels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from preprocessing.concepts import without_triggers
from trainer.cache import Cache
from trainer.config import JobSettings
from trainer.samples import Batch
from trainer.step import PRESERVED_EVERY, BatchMaker, TrainStep

SHARE = 0.05  # of a run's passes through the denoiser that may go into its points
BANDS = 4  # of time, each a quarter: from little noise to mostly noise
MOST = 256  # points
# What no subject has to do with; a base model may name its own (`draw: unrelated_prompts` of its recommendations).
UNRELATED = (
    "a photo of a dog on a lawn",
    "a city street at night in the rain",
    "a bowl of fruit on a wooden table",
    "an oil painting of a lighthouse in a storm",
    "a portrait of an old man reading a newspaper",
    "a red car parked in front of a house",
    "a mountain lake under a clear sky",
    "a drawing of a castle on a hill",
)


@dataclass(frozen=True)
class Points:
    """Batches of one picture each, `BANDS` times a whole number of points in a batch, in the order of their times."""

    batches: tuple[Batch, ...]
    class_words: dict[str, str]  # by trigger
    unrelated: tuple[str, ...]

    @classmethod
    def of(cls, cache: Cache, settings: JobSettings, pictures: Sequence[int], wanted: tuple[int, tuple[str, ...]]):
        """About `wanted[0]` points, on the CPU's noise whatever the device, and the unrelated prompts `wanted[1]`."""
        count, unrelated = wanted
        device = next(iter((cache.text[""] | cache.null).values())).device
        plain = settings.model_copy(update={"caption_dropout": 0.0})
        maker = BatchMaker(replace(cache, mirrored=[]), plain, device, ())
        each = max(1, round(count / (len(pictures) * BANDS))) * BANDS
        batches = [maker.make(f"evaluation/{i}", [i] * each, range(each), each) for i in pictures]
        return cls(tuple(map(_by_time, batches)), settings.class_words, unrelated)

    def prepared(self, step: TrainStep) -> Points:
        """The same with what the method adds to a batch, made once, so that every evaluation asks the same."""
        return replace(self, batches=tuple(map(step.prepared, self.batches)))

    @property
    def times(self) -> list[float]:
        """Of each point the share of times that lie before its own, in [0, 1): 1 is noise."""
        return [value for batch in self.batches for value in batch.uniform.tolist()]

    @property
    def pictures(self) -> list[int]:
        """Of each point the place of its picture among the points' pictures."""
        return [place for place, batch in enumerate(self.batches) for _ in batch.captions]

    @torch.no_grad()
    def losses(self, step: TrainStep) -> Tensor:
        """The loss at every point, captions as trained: fp64 [N]."""
        return _joined([step.losses(batch) for batch in self.batches])

    @torch.no_grad()
    def plain_losses(self, step: TrainStep) -> Tensor:
        """The loss at every point with the class word in the trigger's place: fp64 [N]."""
        return _joined([step.losses(self._plain(batch)) for batch in self.batches])

    @torch.no_grad()
    def base_losses(self, step: TrainStep) -> Tensor:
        """The base model's loss at every point, with the class word: fp64 [N]."""
        return _joined([step.base_losses(self._plain(batch)) for batch in self.batches])

    @torch.no_grad()
    def drift(self, step: TrainStep) -> Tensor:
        """How far predictions on unrelated prompts moved, as a share of their square: fp64 [D]; 0 is not at all."""
        found, asked = [], 0
        for batch in self.batches:
            rows = slice(0, len(batch.captions), 2)  # half the points: both models are asked
            count = len(batch.captions[rows])
            prompts = [self.unrelated[(asked + i) % len(self.unrelated)] for i in range(count)]
            # mostly noise: there the prompt decides what is drawn, later the picture itself does
            uniform = (1 - (1 - batch.uniform[rows]) ** 2).clamp(max=1 - 2**-24)
            fixed = {name: value[rows] for name, value in batch.conditioning.items()}
            part = replace(
                batch,
                data=batch.data[rows],
                noise=batch.noise[rows],
                uniform=uniform,
                captions=prompts,
                mask=None,
                conditioning=fixed,
            )
            found.append(step.drift(part))
            asked += count
        return _joined(found)

    def _plain(self, batch: Batch) -> Batch:
        captions = [without_triggers(caption, self.class_words) for caption in batch.captions]
        return replace(batch, captions=captions)


def affordable(settings: JobSettings, processes: int, evaluations: int) -> int:
    """How many points one evaluation may have, so that all together stay near SHARE of the run.

    Counted in passes through the denoiser, a backward pass being two; a point is asked with the trigger, with the class
    word, and half of them twice more for the drift.
    """
    sample = 3 + (4 / PRESERVED_EVERY if settings.preservation_weight else 0)
    pictures = settings.train_batch_size * settings.gradient_accumulation_steps * processes * settings.max_train_steps
    return max(4 * BANDS, min(MOST, round(SHARE * pictures * sample / (3 * evaluations))))


def _by_time(batch: Batch) -> Batch:
    order = torch.argsort(batch.uniform)
    mask = None if batch.mask is None else batch.mask[order]
    return replace(batch, data=batch.data[order], noise=batch.noise[order], uniform=batch.uniform[order], mask=mask)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.double().cpu() for part in parts])
