"""Small pictures made larger by a model: Swin2SR (Conde et al. 2022, arXiv:2209.11345) by transformers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from PIL import Image

from preprocessing.buckets import Size
from preprocessing.captioners.base import device
from preprocessing.models import loaded


class Upscaler:
    """Enlarges by the model's factor as often as it takes, then comes down to the size by Lanczos."""

    def __init__(self, model: str):
        import torch
        from transformers import AutoImageProcessor, Swin2SRForImageSuperResolution

        self._device = device()
        self._images = AutoImageProcessor.from_pretrained(model, backend="pil")
        self._model: Any = Swin2SRForImageSuperResolution.from_pretrained(
            model, use_safetensors=True, dtype=torch.float32
        )
        self._model.to(self._device).eval()
        self._factor = self._model.config.upscale

    def enlarge(self, picture: Image.Image, size: Size) -> Image.Image:
        """The RGB picture at `size`, which has its aspect ratio."""
        while picture.width < size[0] or picture.height < size[1]:
            picture = self._once(picture)
        return picture.resize(size, Image.Resampling.LANCZOS)

    def _once(self, picture: Image.Image) -> Image.Image:
        import torch

        pixels = self._images(images=picture, return_tensors="pt")["pixel_values"].to(self._device)
        with torch.inference_mode():
            larger = self._model(pixel_values=pixels).reconstruction[0]
        values = (larger.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        # The processor has padded the picture to what the model's windows divide.
        return Image.fromarray(
            np.ascontiguousarray(values[: picture.height * self._factor, : picture.width * self._factor])
        )


def loaded_upscaler(model: str) -> AbstractContextManager[Upscaler]:
    """The upscaler, its memory given back at the end; UserError where its model is not at hand."""
    return loaded(lambda: Upscaler(model), f"upscale_model: {model}", "or leave it out, which enlarges by Lanczos")
