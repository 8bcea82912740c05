"""New tokens fitted to the class word before the run, on the text's side alone: no picture and no denoiser."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from preprocessing.concepts import trigger_pattern, without_triggers
from preprocessing.errors import UserError
from trainer.cache import Cache, lookup
from trainer.config import JobSettings
from trainer.draws import generator
from trainer.families.base import Family
from trainer.methods.base import Method, ParameterGroup
from trainer.methods.regularisers import meaning_distance
from trainer.methods.textual_inversion import TOKENS
from trainer.optimisers import build

BATCH = 8  # captions a step


def fit(
    family: Family, method: Method, groups: Sequence[ParameterGroup], cache: Cache, captions: Sequence[str]
) -> tuple[float, float]:
    """Move the new tokens for token_text_warmup steps until captions with the trigger are encoded like the same ones
    with the class word, which `cache` has: `regularisers.meaning_distance` is minimised by the tokens' own optimiser,
    its rate falling with (1 - done)^1.7. Depends on the seed alone.

    Returns the distance of the first captions before and after. UserError where no caption has the trigger.
    """
    settings: JobSettings = method.settings
    words = settings.class_words
    if nameless := [trigger for trigger, word in words.items() if not word]:
        raise UserError(f"token_text_warmup needs a class_word of each concept: {nameless[0]} has none.")
    trigger = trigger_pattern(*words)
    known = [caption for caption in dict.fromkeys(captions) if trigger.search(caption)]
    if not known:
        raise UserError(f"token_text_warmup: no caption has the trigger word {' or '.join(words)}: leave it out.")
    scheduled = build(next(group for group in groups if group.name == TOKENS))

    def distance(some: Sequence[str]) -> torch.Tensor:
        plain = [without_triggers(caption, words) for caption in some]
        found = family.encode_text(method.words(list(some)))
        return meaning_distance(found, lookup(cache.text, plain)).mean()

    with torch.no_grad():
        before = distance(known[:BATCH]).item()
    for step in range(settings.token_text_warmup):
        order = torch.randperm(len(known), generator=generator(settings.seed, "text warm-up", step))
        scheduled.set_factor((1 - step / settings.token_text_warmup) ** 1.7)
        distance([known[i] for i in order[:BATCH].tolist()]).backward()
        scheduled.optimiser.step()
        scheduled.optimiser.zero_grad(set_to_none=True)
    with torch.no_grad():
        return before, distance(known[:BATCH]).item()
