"""Pivotal tuning: token embeddings and LoRA together, the embeddings frozen at a set share of the run.

After Roich et al. 2021 (arXiv:2106.05744): the tokens find a pivot near the subject, then the weights tune around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from trainer.artifact import Manifest
from trainer.config import JobSettings
from trainer.families.base import Drawable, Family
from trainer.methods.base import Method, ParameterGroup
from trainer.methods.lora import Lora
from trainer.methods.textual_inversion import TOKENS, TextualInversion


class Pivotal(Method):
    """Textual inversion and LoRA, each with its own optimiser and schedule."""

    name: ClassVar[str] = "pivotal"
    needs_text_grad = True

    def __init__(self, settings: JobSettings):
        super().__init__(settings)
        self._tokens, self._lora = TextualInversion(settings), Lora(settings)
        self.has_strength = self._lora.has_strength

    def begin_from(self, folder: Path) -> None:
        self._lora.begin_from(folder)
        self._tokens.begin_from(folder)

    def attach(self, family: Family) -> list[ParameterGroup]:
        return [*self._lora.attach(family), *self._tokens.attach(family)]

    def schedule(self, progress: float) -> dict[str, float]:
        factors = self._lora.schedule(progress) | self._tokens.schedule(progress)
        if progress >= self.settings.pivot_fraction:
            factors[TOKENS] = 0.0
        return factors

    def penalty(self) -> Tensor | float:
        return self._lora.penalty() + self._tokens.penalty()

    def words(self, captions: list[str]) -> list[str]:
        return self._tokens.words(captions)

    @contextmanager
    def disabled(self, family: Family) -> Iterator[None]:
        with self._lora.disabled(family):
            yield

    def nets(self) -> dict[str, dict[str, Any]]:
        return self._lora.nets()

    def tokens(self) -> tuple[str, ...]:
        return self._tokens.tokens()

    def save(self, folder: Path, manifest: Manifest) -> None:
        self._lora.save(folder, manifest)
        self._tokens.save(folder, manifest)

    def load(self, folder: Path, family: Drawable) -> None:
        self._lora.load(folder, family)
        self._tokens.load(folder, family)

    def detach(self, family: Drawable) -> None:
        self._tokens.detach(family)
        self._lora.detach(family)

    def merge(self, family: Family) -> str:
        words = self._tokens.merge(family)
        self._lora.merge(family)
        return words

    def set_strength(self, family: Drawable, strength: float) -> None:
        self._lora.set_strength(family, strength)
