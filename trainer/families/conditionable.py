"""The part of a base model's protocol that method condition asks for: pictures as tokens beside the drawn one's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from torch import Tensor

from preprocessing.errors import UserError
from trainer.branches import Layout
from trainer.samples import Conditioning


class Conditionable:
    """A base model that conditions can be tokens of. What is here is that of one that cannot."""

    name: ClassVar[str]

    def condition_layers(self) -> tuple[str, str]:
        """Regular expressions of the layers (whole names in the denoiser) that a condition's LoRA goes into, and of
        those of them that nothing reads. UserError for a model that cannot be conditioned on pictures.
        """
        raise UserError(f"method condition is not for a {self.name}: choose a FLUX as base_model.")

    @property
    def pixels_per_token(self) -> int:
        """The side of a denoiser's token in pixels, where conditions are tokens."""
        raise NotImplementedError

    def token_mask(self, hole: Tensor) -> Tensor:
        """Pixels to draw, bool [H, W] -> the tokens that hold one of them, bool [1, h / 2, w / 2]."""
        raise NotImplementedError

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> the means of their latents as the denoiser sees them, [B, C, h, w]."""
        raise NotImplementedError

    def add_branches(self, layout: Layout) -> None:
        """Let `predict` read condition_0, condition_1, ... (latents [B, C, h, w]) of its conditioning, and `hole` where
        the layout integrates tokens. The denoiser's adapter that the layout names acts on these conditions alone, see
        `condition_layers`; one that no layout names, put in before, acts on text and picture. A further layout has the
        conditions behind those of the layouts before.
        """
        raise NotImplementedError

    def remove_branches(self) -> None:
        """Take back what `add_branches` did; nothing where it did nothing."""
        return

    @contextmanager
    def conditioned(self, conditioning: Conditioning, strength: float) -> Iterator[None]:
        """Inside, the pipeline draws under conditions as in `add_branches`; their tokens weigh `strength` times."""
        yield

    @contextmanager
    def unconditioned(self) -> Iterator[None]:
        """Inside, `predict` leaves the conditions out, whatever its conditioning holds."""
        yield
