"""Qwen's vision-language models by transformers: captions by instruction, the trigger word never among the words.

What to ask follows the trainers whose captions work best: the kind of picture first, then what changes from picture
to picture (pose, clothes, place, light); what never changes belongs to the trigger word and is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from preprocessing.captioners.base import LONGEST_DESCRIPTION, Batched, device, large_model_dtype
from preprocessing.settings import PrepareSettings

if TYPE_CHECKING:
    import torch
    from PIL import Image

MODEL = "Qwen/Qwen3-VL-4B-Instruct"
MOST_PIXELS = 512 * 512  # a larger picture is made smaller: its tokens cost time and say little more
ENDING = " Use one or two plain sentences, only what can be seen, no guesses, no mood. Do not begin with 'The image'."
INSTRUCTIONS = {
    "subject": "Describe this picture. Say first whether it is a photo, a drawing or something else; then what "
    "{subject} does and where: pose, view, what it wears or carries, what surrounds it, background and light. Call it "
    "{subject} and do not describe its own shape, colours or marks.",
    "face": "Describe this picture. Say first whether it is a photo, a drawing or something else; then expression, "
    "gaze, pose, clothes, framing, background and light of {subject}. Call the person {subject} and do not describe "
    "face, hair colour, age or build.",
    "style": "Describe completely what this picture shows: every person and thing, what they do, where they are, "
    "setting and framing. Do not mention style, medium, technique, artist, colours of the rendering or mood.",
    "captions": "Describe completely what this picture shows: every person and thing, its colours, what it does, where "
    "it is, and the background.",
}
UNNAMED = {"subject": "the main subject", "face": "the person", "style": "the picture", "captions": "the picture"}


def instruction(settings: PrepareSettings) -> str:
    """What the model is asked about each picture."""
    subject = f"the {settings.class_word}" if settings.class_word else UNNAMED[settings.mode]
    if settings.caption_instruction is not None:
        return settings.caption_instruction.replace("{subject}", subject)
    return (INSTRUCTIONS[settings.mode] + ENDING).replace("{subject}", subject)


class QwenVlCaptioner(Batched):
    """A Qwen2.5-VL or Qwen3-VL model, greedy, on the accelerator if there is one.

    Its own processor wants torchvision, for videos; so tokenizer and image processor are used as they are.
    """

    batch_size = 4

    def __init__(self, instruction: str, model: str = MODEL):
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

        self._device = device()
        # First, for of what is not there it complains clearly.
        self._images = AutoImageProcessor.from_pretrained(model, backend="pil")
        self._tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        self._images.size = {"shortest_edge": self._images.size["shortest_edge"], "longest_edge": MOST_PIXELS}
        self._model: Any = AutoModelForImageTextToText.from_pretrained(
            model, use_safetensors=True, dtype=large_model_dtype()
        )
        self._model.to(self._device).eval()
        content = [{"type": "image"}, {"type": "text", "text": instruction}]
        self._prompt = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        self._image_token = self._tokenizer.convert_ids_to_tokens(self._model.config.image_token_id)

    def say(self, pictures: list[Image.Image]) -> list[str]:
        import torch

        inputs = self._inputs(pictures)
        with torch.inference_mode():
            tokens = self._model.generate(
                **inputs,
                max_new_tokens=LONGEST_DESCRIPTION,
                num_beams=1,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        return self._tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _inputs(self, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
        """Pixels and prompts, the token that stands for a picture as often as the picture has patches."""
        pixels = self._images(images=pictures, return_tensors="pt")
        counts = (pixels["image_grid_thw"].prod(dim=1) // self._images.merge_size**2).tolist()
        prompts = [self._prompt.replace(self._image_token, self._image_token * count, 1) for count in counts]
        text = self._tokenizer(prompts, padding=True, return_tensors="pt")
        of_pictures = (text["input_ids"] == self._model.config.image_token_id).int()
        inputs = {**text, **pixels, "mm_token_type_ids": of_pictures}
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        return {name: value.to(self._device) for name, value in inputs.items()}
