"""The pictures by which weights are judged: which are drawn, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from preprocessing.concepts import trigger_pattern, without_triggers
from preprocessing.errors import UserError
from preprocessing.prepared import PreparedDataset
from trainer.config import JobSettings
from trainer.evaluation.gallery import Drawn, Wish
from trainer.evaluation.pictures import NEAR_COPY, Neighbour, diversity, is_blank, nearest, thumbnail

STRENGTHS = (0.5, 1.0, 1.5)
SHARE = 0.03  # of a run's passes through the denoiser that may go into pictures beyond the previews
GRID_SEEDS, VARIETY_SEEDS = 2, 4  # at the most
MOST_COMPARED = 500  # pictures of the data set


@dataclass(frozen=True)
class Exhibit:
    """Prompts with the trigger and without, the seeds of the grid, and further seeds that show variety."""

    previews: tuple[Wish, ...]  # as the settings ask for them, at full strength
    pairs: tuple[tuple[str, str], ...]  # for each concept a prompt, and the same with the class word
    grid_seeds: tuple[int, ...]
    variety_seeds: tuple[int, ...]
    strengths: tuple[float, ...]

    @classmethod
    def of(cls, prompts: Sequence[str], settings: JobSettings, steps: int, scalable: bool) -> Exhibit:
        """What a run that large can afford; `steps` are a picture's, `scalable` whether weights have a strength."""
        chosen = dict.fromkeys(_prompt_of(trigger, prompts) for trigger in settings.class_words)
        pairs = tuple((prompt, without_triggers(prompt, settings.class_words)) for prompt in chosen)
        strengths = STRENGTHS if scalable else (1.0,)
        passes = 3 * settings.max_train_steps * settings.train_batch_size * settings.gradient_accumulation_steps
        affordable = int(SHARE * passes / (2 * steps))  # two passes a step: guidance
        each = 2 * len(strengths) * len(pairs)
        grid = max(1, min(GRID_SEEDS, affordable // each))
        more = max(0, min(VARIETY_SEEDS, grid + (affordable - grid * each) // (2 * len(pairs))) - grid)
        first = settings.preview_seeds[0]
        seeds = [*settings.preview_seeds, *(first + 1000 + i for i in range(VARIETY_SEEDS))]
        return cls(
            previews=tuple(Wish(one, seed) for one in prompts for seed in settings.preview_seeds),
            pairs=pairs,
            grid_seeds=tuple(seeds[:grid]),
            variety_seeds=tuple(seeds[grid : grid + more]),
            strengths=strengths,
        )

    def wishes(self) -> list[Wish]:
        """All that has to be drawn."""
        grid = [wish for seed in self.grid_seeds for row in self.rows(seed).values() for wish in row]
        variety = [
            Wish(prompt, seed, strength)
            for prompt, _ in self.pairs
            for seed in self.variety_seeds
            for strength in (None, 1.0)
        ]
        pairs = [wish for preview in self.previews for wish in (_base_of(preview), preview)]
        return [*pairs, *grid, *variety]

    def rows(self, seed: int) -> dict[str, list[Wish]]:
        """A row of the grid for each prompt: the base model, then each strength."""
        prompts = dict.fromkeys(prompt for pair in self.pairs for prompt in pair)
        return {prompt: [Wish(prompt, seed, strength) for strength in (None, *self.strengths)] for prompt in prompts}

    def subjects(self, *triggers: str) -> list[Wish]:
        """The pictures at full strength whose prompts hold a trigger."""
        has_trigger = trigger_pattern(*triggers).search
        own = [Wish(prompt, seed) for prompt, _ in self.pairs for seed in (*self.grid_seeds, *self.variety_seeds)]
        return list(dict.fromkeys(wish for wish in (*self.previews, *own) if has_trigger(wish.prompt)))


@dataclass(frozen=True)
class Seen:
    """What the drawn pictures say: each sample's nearest picture of the data set, and shares (see `Summary`)."""

    neighbours: tuple[tuple[Wish, Neighbour], ...]  # the nearest first
    near_copies: float | None
    diversity: float | None


def refuse_blank(pictures: Drawn, wishes: Sequence[Wish]) -> None:
    """Raise UserError where the weights draw nothing and the base model, from the same seed, draws something."""
    blank = [wish for wish in wishes if is_blank(pictures[wish]) and not is_blank(pictures[_base_of(wish)])]
    if blank:
        raise UserError(
            f"The trained weights draw a picture of one colour for {blank[0].prompt!r} (seed {blank[0].seed}): lower "
            f"learning_rate, or use mixed_precision no; weights and checkpoints are kept in output_dir."
        )


def look(pictures: Drawn, exhibit: Exhibit, dataset: PreparedDataset) -> Seen:
    """Compare what was drawn with the data set and with what the base model draws."""
    subjects = exhibit.subjects(*dataset.triggers)
    small = {wish: thumbnail(picture) for wish, picture in pictures.items()}
    found: list[Neighbour] = []
    if subjects:
        own = [_thumbnail_of(dataset.folder / item.image) for item in dataset.items[:MOST_COMPARED]]
        found = nearest([small[wish] for wish in subjects], own)
    by_prompt: dict[str, list[Wish]] = {}
    for wish in subjects:
        by_prompt.setdefault(wish.prompt, []).append(wish)
    groups = list(by_prompt.values())
    return Seen(
        neighbours=tuple(sorted(((subjects[one.sample], one) for one in found), key=lambda pair: pair[1].distance)),
        near_copies=sum(one.distance < NEAR_COPY for one in found) / len(found) if found else None,
        diversity=diversity(
            [[small[wish] for wish in group] for group in groups],
            [[small[_base_of(wish)] for wish in group] for group in groups],
        ),
    )


def _prompt_of(trigger: str, prompts: Sequence[str]) -> str:
    """The first prompt that holds the trigger; where none does, the first of all."""
    return next((prompt for prompt in prompts if trigger_pattern(trigger).search(prompt)), prompts[0])


def _base_of(wish: Wish) -> Wish:
    return Wish(wish.prompt, wish.seed, None)


def _thumbnail_of(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return thumbnail(picture)
