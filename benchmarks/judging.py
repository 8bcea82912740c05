"""What the oracle says of pictures of a sprite, for benchmarks that draw more than once with one base model."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


class SubjectJudge:
    """Draws what a sprite's adapter is asked for, with whatever `generator` holds, and has the oracle look at it."""

    def __init__(self, sprite: Path, base_model: str = "toybox"):
        from toybox.finder import Finder
        from toybox.score import MIN_ADAPTER_PICTURES, AdapterTask
        from toybox.sprite import load_sprite
        from trainer.generate import Generator

        image = load_sprite(sprite)
        self.generator = Generator(base_model)
        self._task, self._finder = AdapterTask.of(image, MIN_ADAPTER_PICTURES), Finder(image)

    def draw(self, trigger: str = "TOK") -> list[Image.Image]:
        """A picture for each prompt, always with the same seeds; `trigger` may be several words."""
        from toybox.score import drawing_with

        return drawing_with(self.generator)(self._task.subject_prompts(trigger))

    def scores(self, pictures: list[Image.Image]) -> dict[str, float]:
        """subject, background, position and likeness (0..1) of pictures in the order of `draw`."""
        from toybox.score import judge_subjects

        return judge_subjects(self._finder, self._task, pictures)

    def found(self, pictures: list[Image.Image]) -> list[bool]:
        """Whether the sprite is in each picture."""
        return [self._finder.find(picture).found for picture in pictures]
