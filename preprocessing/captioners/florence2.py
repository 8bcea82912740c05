"""Florence-2 (Xiao et al. 2023, arXiv:2311.06242) by transformers: a sentence or two, by a fixed task word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from preprocessing.captioners.base import LONGEST_DESCRIPTION, Batched, device, large_model_dtype

if TYPE_CHECKING:
    from PIL import Image

MODEL = "florence-community/Florence-2-large"
TASK = "<DETAILED_CAPTION>"


class Florence2Captioner(Batched):
    """A transformers Florence-2 model, greedy, on the accelerator if there is one."""

    batch_size = 8

    def __init__(self, model: str = MODEL):
        from transformers import Florence2ForConditionalGeneration, Florence2Processor

        self._device = device()
        self._processor = Florence2Processor.from_pretrained(model)
        self._model: Any = Florence2ForConditionalGeneration.from_pretrained(
            model, use_safetensors=True, dtype=large_model_dtype()
        )
        self._model.to(self._device).eval()

    def say(self, pictures: list[Image.Image]) -> list[str]:
        import torch

        inputs = self._processor(images=pictures, text=[TASK] * len(pictures), padding=True, return_tensors="pt")
        inputs = inputs.to(self._device, self._model.dtype)
        with torch.inference_mode():
            # Its own configuration asks for beams.
            tokens = self._model.generate(
                **inputs, max_new_tokens=LONGEST_DESCRIPTION, num_beams=1, do_sample=False, early_stopping=False
            )
        return self._processor.batch_decode(tokens, skip_special_tokens=True)
