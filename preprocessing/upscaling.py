"""Small pictures made larger by a model: Swin2SR (Conde et al. 2022, arXiv:2209.11345) by transformers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from preprocessing.buckets import Size
from preprocessing.captioners.base import device
from preprocessing.errors import UserError


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


@contextmanager
def loaded_upscaler(model: str) -> Iterator[Upscaler]:
    """The upscaler, its memory given back at the end; UserError where its model is not at hand."""
    import torch

    try:
        upscaler = Upscaler(model)
    except OSError as error:
        raise UserError(
            f"upscale_model: {model} cannot be loaded ({str(error).splitlines()[0][:150]}): check the network, "
            "or leave it out, which enlarges by Lanczos."
        ) from error
    try:
        yield upscaler
    finally:
        del upscaler
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
