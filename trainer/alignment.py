"""Prompt-aligned personalisation (PALP, Arar et al. 2024, arXiv:2401.06105): score distillation towards one prompt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from preprocessing.concepts import without_triggers
from trainer.cache import lookup
from trainer.config import JobSettings
from trainer.draws import generator
from trainer.families.base import Family
from trainer.methods.base import Method
from trainer.samples import Batch, Conditioning

TARGET_GUIDANCE, OWN_GUIDANCE = 15.0, 7.5  # the paper's; equal ones would let the pictures collapse to one
ALIGNED_EVERY = 3  # one sample in so many
SPAN = (0.2, 0.8)  # of the times: before, a picture is all there; after, one step guesses none


def prompts(settings: JobSettings) -> list[str]:
    """The prompt to be aligned with, and as the base model knows it, with the class words; none without the switch."""
    if not settings.alignment_weight:
        return []
    prompt = settings.alignment_prompt
    for trigger in settings.class_words:
        prompt = prompt.replace("{trigger}", trigger, 1)
    return [prompt, without_triggers(prompt, settings.class_words)]


class PromptAlignment:
    """The term: what the adapted model draws in one step of the prompt is moved to where the base model, asked with the
    class word, sees it more likely than the adapted model does.
    """

    def __init__(self, family: Family, method: Method, text: dict[str, Conditioning], settings: JobSettings):
        self._family, self._method, self._text = family, method, text
        self._prompt, self._clean = prompts(settings)

    def __call__(self, batch: Batch, encode: Callable[[list[str]], Conditioning]) -> Tensor:
        """Half the mean squared push on the estimates of the data, of a gradient that is the push itself: a scalar.

            push = base(x_s; null) + 15 (...) - (own(x_s; null) + 7.5 (...)),   x_s: the estimate with noise again

        `encode` gives the text conditioning of captions as the adapted model reads them.
        """
        family, kept = self._family, slice(None, None, ALIGNED_EVERY)
        data, fixed = batch.data[kept], {name: value[kept] for name, value in batch.conditioning.items()}
        count, objective = len(data), family.objective
        times, noises = self._drawn(batch.keys[kept], data)
        first, second = (family.times(one, data) for one in times)
        own, nothing = encode([self._prompt] * count), encode([""] * count)
        noisy = objective.mix(data, noises[0], first)
        estimate = objective.data(noisy, family.predict(noisy, first, fixed | own), first)
        with torch.no_grad():
            again = objective.mix(estimate.detach(), noises[1], second)
            found = self._guided(again, second, (fixed | own, fixed | nothing), OWN_GUIDANCE)
            with self._method.disabled(family):
                base = (fixed | lookup(self._text, [text] * count) for text in (self._clean, ""))
                target = self._guided(again, second, tuple(base), TARGET_GUIDANCE)
            push = objective.noise_sign * (target - found)
        return 0.5 * (estimate - (estimate - push).detach()).square().mean()

    def _drawn(self, keys: tuple[str, ...], data: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Two sets of uniform numbers in SPAN, and of noise, for each sample its own."""
        randoms = [generator(key, "alignment") for key in keys]
        uniform = torch.stack([torch.rand(2, generator=random) for random in randoms], dim=1).to(data.device)
        noise = torch.stack([torch.randn(2, *data.shape[1:], generator=random) for random in randoms], dim=1)
        return list(SPAN[0] + (SPAN[1] - SPAN[0]) * uniform), list(noise.to(data.device))

    def _guided(self, noisy: Tensor, t: Tensor, pair: tuple[Conditioning, Conditioning], scale: float) -> Tensor:
        told, untold = (self._family.predict(noisy, t, one) for one in pair)
        return untold + scale * (told - untold)
