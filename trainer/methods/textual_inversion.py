"""Textual inversion: new token embeddings alone (Gal et al. 2022, arXiv:2208.01618)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from trainer import artifact
from trainer.artifact import Manifest
from trainer.config import JobSettings
from trainer.families.base import Drawable, Family
from trainer.methods.base import Method, ParameterGroup
from trainer.methods.regularisers import Spectrum
from trainer.methods.tokens import NewTokens, token_names

TOKENS = "tokens"


class TextualInversion(Method):
    """Learns what the trigger word means and leaves every weight alone."""

    name: ClassVar[str] = "textual_inversion"
    needs_text_grad = True
    changes_weights: ClassVar[bool] = False

    def __init__(self, settings: JobSettings):
        super().__init__(settings)
        self._tokens = NewTokens(token_names(settings))
        self._start: Path | None = None
        self._spectra: list[Spectrum] = []  # of each text encoder's vocabulary, where a penalty asks for it

    def begin_from(self, folder: Path) -> None:
        self._start = folder

    def attach(self, family: Family) -> list[ParameterGroup]:
        settings = self.settings
        values = None
        if self._start is not None and (self._start / artifact.EMBEDDINGS).is_file():
            values, _ = artifact.load_tensors(self._start / artifact.EMBEDDINGS)
        self._tokens.attach(family, settings.class_words, settings.seed, values)
        if settings.token_covariance_penalty:
            self._spectra = [Spectrum(words) for words in self._tokens.vocabularies()]
        # no decay: it would pull the rows to zero, away from the vocabulary they belong to
        return [
            ParameterGroup(
                TOKENS, self._tokens.parameters, settings.text_embedding_optimizer, settings.text_embedding_lr
            )
        ]

    def schedule(self, progress: float) -> dict[str, float]:
        return {TOKENS: (1 - progress) ** 1.7}

    def penalty(self) -> Tensor | float:
        weight = self.settings.token_std_penalty
        total = weight * self._tokens.spread_penalty() if weight else 0.0
        if self._spectra:
            pairs = zip(self._spectra, self._tokens.parameters, strict=True)
            distance = torch.stack([spectrum.distance(rows) for spectrum, rows in pairs]).mean()
            total = total + self.settings.token_covariance_penalty * distance
        return total

    @contextmanager
    def disabled(self, family: Family) -> Iterator[None]:
        """No weight differs from the base model's."""
        yield

    def words(self, captions: list[str]) -> list[str]:
        return self._tokens.words(captions)

    def tokens(self) -> tuple[str, ...]:
        return tuple(self._tokens.names)

    def save(self, folder: Path, manifest: Manifest) -> None:
        rows = self._tokens.rows()
        artifact.save_tensors(folder / artifact.EMBEDDINGS, rows, artifact.adapter_header(rows, manifest))

    def load(self, folder: Path, family: Drawable) -> None:
        values, _ = artifact.load_tensors(folder / artifact.EMBEDDINGS)
        self._tokens.attach(family, {}, self.settings.seed, values)

    def detach(self, family: Drawable) -> None:
        self._tokens.detach(family)
        self._spectra = []

    def merge(self, family: Family) -> str:
        return " and ".join(self._tokens.merge(family))

    def set_strength(self, family: Drawable, strength: float) -> None:
        """Nothing to scale in the weights: the tokens' share is `token_scale`'s to set."""
