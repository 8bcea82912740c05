"""What the oracle says of pictures of a sprite, for benchmarks that draw more than once with one base model."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

SCENE_PICTURES = 32


class SubjectJudge:
    """Draws what a sprite's adapter is asked for, with whatever `generator` holds, and has the oracle look at it."""

    def __init__(self, sprite: Path, base_model: str = "toybox"):
        from toybox.finder import Finder
        from toybox.score import MIN_ADAPTER_PICTURES, AdapterTask
        from toybox.sprite import load_sprite
        from trainer.generate import Generator

        self._sprite = load_sprite(sprite)
        self.generator = Generator(base_model)
        self._task, self._finder = AdapterTask.of(self._sprite, MIN_ADAPTER_PICTURES), Finder(self._sprite)

    def draw(self, trigger: str = "TOK") -> list[Image.Image]:
        """A picture for each prompt, always with the same seeds; `trigger` may be several words."""
        from toybox.score import drawing_with

        return drawing_with(self.generator)(self._task.subject_prompts(trigger))

    def adapter_scores(self, weights: Path, trigger: str = "TOK", **drawn: Any) -> dict[str, Any]:
        """What `toybox.score.judge_adapter` says of an archive's weights, drawn with these fields of DrawSettings; the
        generator holds none before and after.
        """
        from toybox.score import draw_adapter, drawing_with, judge_adapter

        before = self._unadapted
        self.generator.use(weights)
        pictures = draw_adapter(drawing_with(self.generator, **drawn), self._task, trigger, before)
        self.generator.release()
        return judge_adapter(self._sprite, self._task, pictures)

    def scene_scores(self, weights: Path, background: str, colour: str, position: str) -> dict[str, float]:
        """As `scores`, of pictures of the one prompt that says so, drawn with an archive's weights and many seeds."""
        from toybox.concept import Pasted
        from toybox.score import AdapterTask, drawing_with, judge_subjects
        from toybox.world import Background

        scene = Pasted(Background(background, colour), position, size="", jitter=(0.0, 0.0))
        task = AdapterTask([scene] * SCENE_PICTURES, [])
        self.generator.use(weights)
        pictures = drawing_with(self.generator)(task.subject_prompts("TOK"))
        self.generator.release()
        return judge_subjects(self._finder, task, pictures)

    @cached_property
    def _unadapted(self) -> list[Image.Image]:
        from toybox.score import drawing_with

        return drawing_with(self.generator)(self._task.unrelated_prompts())

    def scores(self, pictures: list[Image.Image]) -> dict[str, float]:
        """subject, background, position and likeness (0..1) of pictures in the order of `draw`."""
        from toybox.score import judge_subjects

        return judge_subjects(self._finder, self._task, pictures)

    def found_beside(self, other: SubjectJudge, pictures: list[Image.Image]) -> tuple[list[bool], list[bool]]:
        """Whether the sprite is in each picture, and whether the other judge's is; both may be."""
        from toybox.finder import find_pair

        pairs = [find_pair((self._finder, other._finder), picture) for picture in pictures]
        return [own.found for own, _ in pairs], [found.found for _, found in pairs]
