"""BLIP (Li et al. 2022, arXiv:2201.12086) by transformers: the default captioner and the toybox's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocessing.captioners.base import LONGEST_CAPTION, Batched, device

if TYPE_CHECKING:
    from PIL import Image

TOYBOX_CAPTIONER = Path(__file__).resolve().parents[2] / "toybox" / "captioner"


@dataclass(frozen=True)
class BlipSource:
    """Where a BLIP captioner lies (Hub id or folder), the words that it goes on from, and its word for the unknown."""

    model: str
    prompt: str = ""
    subject: str = ""


# The prompt is the one that LAVIS gives it; without one this model begins half its captions with no words at all.
LARGE = BlipSource("Salesforce/blip-image-captioning-large", "a picture of")
TOYBOX = BlipSource(str(TOYBOX_CAPTIONER), subject="sticker")


class BlipCaptioner(Batched):
    """A transformers BLIP model, greedy, on the accelerator if there is one."""

    def __init__(self, source: BlipSource):
        import torch
        from transformers import BlipForConditionalGeneration, BlipProcessor

        self._prompt = source.prompt
        self._device = device()
        self._processor = BlipProcessor.from_pretrained(source.model)
        # fp32 whatever it is stored in: half precision is slow on a CPU, and a caption is soon written.
        self._model: Any = BlipForConditionalGeneration.from_pretrained(
            source.model, use_safetensors=True, dtype=torch.float32
        )
        self._model.to(self._device).eval()
        prompt_tokens = len(self._processor(text=self._prompt).input_ids)
        positions = self._model.config.text_config.max_position_embeddings
        self._new_tokens = min(LONGEST_CAPTION, positions - prompt_tokens)

    def say(self, pictures: list[Image.Image]) -> list[str]:
        import torch

        text = [self._prompt] * len(pictures) if self._prompt else None
        inputs = self._processor(images=pictures, text=text, return_tensors="pt").to(self._device)
        with torch.inference_mode():
            tokens = self._model.generate(**inputs, max_new_tokens=self._new_tokens, num_beams=1, do_sample=False)
        # The token that BLIP starts from comes first; not every tokenizer knows it for a special one.
        lines = self._processor.batch_decode(tokens[:, 1:], skip_special_tokens=True)
        return [_without(self._prompt, line) for line in lines]


def _without(prompt: str, line: str) -> str:
    """The line after the prompt that it was made to begin with; the tokenizer may have changed its white space."""
    line = " ".join(line.split())
    return line[len(prompt) :].lstrip() if line.lower().startswith(prompt.lower()) else line
