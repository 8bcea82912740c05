"""Captioners: pictures -> one line of text each, for the pictures that the user did not caption.

The trigger word is not their business: it is added by code (`preprocessing.trigger`).
"""

from __future__ import annotations

import gc
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from preprocessing.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

TOYBOX_CAPTIONER = Path(__file__).resolve().parents[1] / "toybox" / "captioner"
LONGEST_CAPTION = 40  # tokens
# How captioners begin although the words say nothing of the picture.
PREAMBLE = re.compile(
    r"^(?:in (?:this|the) (?:image|picture|photo)|(?:this|the) (?:image|picture|photo) (?:shows|features|depicts)"
    r"|there (?:is|are)|an? (?:photo|picture|image) of)\b[\s,:]*",
    re.IGNORECASE,
)
# A small model may fall into a loop: "a red star a red star a red star".
REPETITION = re.compile(r"\b(\w+(?: \w+){0,7}?)(?:,? \1\b)+", re.IGNORECASE)


class Captioner(Protocol):
    """Describes pictures."""

    batch_size: int  # how many pictures it takes best at a time
    subject: str  # what it calls a subject that it has no word for, "" where there is no one word

    def caption(self, pictures: list[Image.Image]) -> list[str]:
        """One line for each RGB picture, in order; the pictures may differ in size."""
        ...


@dataclass(frozen=True)
class BlipSource:
    """Where a BLIP captioner lies (Hub id or folder), the words that it goes on from, and its word for the unknown."""

    model: str
    prompt: str = ""
    subject: str = ""


SOURCES = {
    # The prompt that LAVIS gives it; without one this model begins half its captions with words that do not exist.
    "blip": BlipSource("Salesforce/blip-image-captioning-large", "a picture of"),
    "toybox": BlipSource(str(TOYBOX_CAPTIONER), subject="sticker"),
}


class NoCaptioner:
    """Says nothing, which leaves the trigger word alone as the caption."""

    batch_size = 256
    subject = ""

    def caption(self, pictures: list[Image.Image]) -> list[str]:
        return [""] * len(pictures)


class BlipCaptioner:
    """A transformers BLIP model, greedy, on the accelerator if there is one."""

    batch_size = 16

    def __init__(self, source: BlipSource):
        import torch
        from transformers import BlipForConditionalGeneration, BlipProcessor

        self.subject = source.subject
        self._prompt = source.prompt
        self._device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self._processor = BlipProcessor.from_pretrained(source.model)
        # fp32 whatever it is stored in: half precision is slow on a CPU, and a caption is soon written.
        self._model: Any = BlipForConditionalGeneration.from_pretrained(
            source.model, use_safetensors=True, dtype=torch.float32
        )
        self._model.to(self._device).eval()
        prompt_tokens = len(self._processor(text=self._prompt).input_ids)
        positions = self._model.config.text_config.max_position_embeddings
        self._new_tokens = min(LONGEST_CAPTION, positions - prompt_tokens)

    def caption(self, pictures: list[Image.Image]) -> list[str]:
        import torch

        text = [self._prompt] * len(pictures) if self._prompt else None
        inputs = self._processor(images=pictures, text=text, return_tensors="pt").to(self._device)
        with torch.inference_mode():
            tokens = self._model.generate(**inputs, max_new_tokens=self._new_tokens, num_beams=1, do_sample=False)
        # The token that BLIP starts from comes first; not every tokenizer knows it for a special one.
        lines = self._processor.batch_decode(tokens[:, 1:], skip_special_tokens=True)
        return [tidy(line, self._prompt) for line in lines]


def tidy(text: str, prompt: str = "") -> str:
    """A captioner's line without its prompt, empty preambles, repetitions and surplus white space."""
    text = " ".join(text.split())
    if text.lower().startswith(prompt.lower()):
        text = text[len(prompt) :].lstrip()
    text = PREAMBLE.sub("", text)
    return REPETITION.sub(r"\1", text).strip(" ,;:")


@contextmanager
def loaded_captioner(name: str) -> Iterator[Captioner]:
    """The captioner called `name` ("blip", "toybox" or "none"), its memory given back at the end.

    Raises UserError where its model is not at hand.
    """
    if name == "none":
        yield NoCaptioner()
        return
    source = SOURCES[name]
    if name == "toybox" and not Path(source.model).is_dir():
        raise UserError(
            f"captioner: the toybox captioner is missing from {source.model}: "
            "restore that folder, or set captioner to none or blip."
        )
    try:
        captioner = BlipCaptioner(source)
    except OSError as error:  # what transformers raises for a model that is neither here nor to be had
        raise UserError(
            f"captioner: {source.model} cannot be loaded ({str(error).splitlines()[0][:150]}): "
            "check the network, set captioner to none, or caption the pictures yourself."
        ) from error
    try:
        yield captioner
    finally:
        del captioner
        _free_memory()


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def identity(name: str) -> str:
    """What changes whenever the captioner may write something else."""
    weights = TOYBOX_CAPTIONER / "model.safetensors"
    if name == "toybox" and weights.is_file():
        with weights.open("rb") as file:
            return f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()} {version('transformers')}"
    return f"{name} {version('transformers')}"
