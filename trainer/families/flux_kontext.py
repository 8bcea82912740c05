"""FLUX.1 Kontext: FLUX's transformer with a reference picture in its sequence, which it draws another picture from.

Black Forest Labs 2025 (arXiv:2506.15742). The reference's tokens follow the picture's, at (1, row, column), and are
clean; what the transformer answers for them is dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import FluxPipeline
from torch import Tensor

from preprocessing.errors import UserError
from trainer.artifact import Manifest
from trainer.families.base import TEXT_TO_IMAGE, quoted
from trainer.families.flux import Flux, grid_ids
from trainer.samples import Conditioning, Picture

if TYPE_CHECKING:
    from PIL import Image

    from trainer.model_card import Place

REFERENCE = "reference"  # in a conditioning: its latents [B, C, h, w], of the picture's size or another
REFERENCE_ID = 1  # where a picture's tokens have 0


class FluxKontext(Flux):
    """FLUX.1 Kontext; a data set's references are its condition pictures (`x.condition.png`)."""

    name: ClassVar[str] = "flux_kontext"
    takes_reference: ClassVar[bool] = True
    pipelines: ClassVar[dict[str, str]] = {TEXT_TO_IMAGE: "FluxKontextPipeline"}
    card_tags: ClassVar[tuple[str, ...]] = (*Flux.card_tags, "flux-kontext", "image-to-image")
    recommended: ClassVar[dict[str, dict[str, Any]]] = Flux.recommended | {
        "draw": {"guidance_scale": 2.5, "num_inference_steps": 28}
    }

    @property
    def serves(self) -> tuple[str, ...]:
        return (self.name, Flux.name)  # the same layers: a style that FLUX dev learned is drawn here too

    def condition_layers(self) -> tuple[str, str]:
        raise UserError(
            "method condition is not for FLUX Kontext, which draws from a reference itself: use method lora or "
            "pivotal, or choose FLUX.1 dev as base_model."
        )

    def _picture_conditioning(self, picture: Picture) -> Conditioning:
        if not picture.conditions:
            raise UserError(
                "A picture has no reference, and FLUX Kontext draws each from one: upload it beside x.png as "
                "x.condition.png."
            )
        return {REFERENCE: self.encode_pixels(picture.conditions[0][None])[0].cpu()}

    def _sequence(self, noisy: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        tokens, ids = super()._sequence(noisy, conditioning)
        if REFERENCE not in conditioning:
            return tokens, ids
        latents = conditioning[REFERENCE].to(tokens)
        reference = FluxPipeline._pack_latents(latents, *latents.shape)
        placed = grid_ids(*latents.shape[-2:], noisy.device)
        placed[:, 0] = REFERENCE_ID
        return torch.cat([tokens, reference], dim=1), torch.cat([ids, placed])

    def pipeline(self, task: str = TEXT_TO_IMAGE) -> Any:
        if task != TEXT_TO_IMAGE:
            raise UserError("image: FLUX Kontext starts from no picture; give the one to draw from as condition.")
        return super().pipeline(task)

    def reference_inputs(self, size: tuple[int, int], reference: Image.Image | None) -> dict[str, Any]:
        # our size, and a reference as large as in training: the pipeline's own sizes are all near 1024 x 1024
        given: dict[str, Any] = {"max_area": size[0] * size[1]}
        return given if reference is None else given | {"image": reference, "_auto_resize": False}

    @classmethod
    def _imports_for(cls, manifest: Manifest, place: Place) -> list[str]:
        return ["from diffusers.utils import load_image", *super()._imports_for(manifest, place)]

    @classmethod
    def _call_with(cls, prompt: str) -> str:
        return f'pipe(image=load_image("reference.png"), prompt={quoted(prompt)})'
