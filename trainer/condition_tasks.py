"""What a model is conditioned on: for each task the condition picture, made from the picture that is to be drawn.

A task of one's own is a class like these, importable where the job runs: `condition_tasks: my_module:MyTask`. It is
made without arguments and has the members of `Task`. Where the condition cannot be made from the picture, it is
uploaded beside it (`x.condition.png`, `x.condition.1.png`) and the task is "pair" or "subject".
"""

from __future__ import annotations

import importlib
import random
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageFilter

from preprocessing.errors import UserError

DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"
CANNY = (100, 200)  # thresholds
TEST_BLUR = 5


class Task:
    """Canny's and the like: the condition lies where the picture lies, and is always the same.

    `random`: it differs every time in training, so that it is never cached. `apart`: its tokens lie to the left of the
    picture's, and not on them. `reduced`: the share of the picture's side that it has by default.
    """

    random: ClassVar[bool] = False
    apart: ClassVar[bool] = False
    reduced: ClassVar[float] = 1.0
    paired: ClassVar[bool] = False  # read from the upload, not made

    def condition(self, picture: Image.Image, rng: random.Random | None) -> Image.Image:
        """The condition of an RGB picture, of its size; `rng` in training, None at drawing."""
        raise NotImplementedError

    def target(self, picture: Image.Image) -> Image.Image:
        """What is to be drawn: the picture itself."""
        return picture

    def hole(self, size: tuple[int, int], rng: random.Random) -> np.ndarray | None:
        """Which pixels of a picture (width, height) are to be drawn: bool [height, width]; None: all of them."""
        return None

    @property
    def has_holes(self) -> bool:
        """Whether only a part of a picture is to be drawn."""
        return type(self).hole is not Task.hole


class Canny(Task):
    """Edges, white on black."""

    def condition(self, picture: Image.Image, rng: random.Random | None) -> Image.Image:
        import cv2

        return Image.fromarray(cv2.Canny(np.asarray(picture), *CANNY)).convert("RGB")


class Coloring(Task):
    """The picture without its colours."""

    def condition(self, picture: Image.Image, rng: random.Random | None) -> Image.Image:
        return picture.convert("L").convert("RGB")


class Deblurring(Task):
    """A Gaussian blur with a radius of 1 to 10 pixels, of 5 at drawing."""

    random: ClassVar[bool] = True

    def condition(self, picture: Image.Image, rng: random.Random | None) -> Image.Image:
        return picture.filter(ImageFilter.GaussianBlur(TEST_BLUR if rng is None else rng.randint(1, 10)))


class Depth(Task):
    """How near each pixel is, by a depth estimation model: white is near."""

    model: ClassVar[str] = DEPTH_MODEL

    def condition(self, picture: Image.Image, rng: random.Random | None) -> Image.Image:
        return _depth_estimator(self.model)(picture)["depth"].convert("RGB").resize(picture.size)


class DepthPrediction(Depth):
    """The reverse: the picture is the condition, and its depth is what is drawn."""

    def condition(self, picture: Image.Image, rng: random.Random | None) -> Image.Image:
        return picture

    def target(self, picture: Image.Image) -> Image.Image:
        return super().condition(picture, None)


class Fill(Task):
    """The picture with a random rectangle cut out or, half the time, all but the rectangle: black is to be drawn."""

    random: ClassVar[bool] = True

    def condition(self, picture: Image.Image, rng: random.Random | None) -> Image.Image:
        return picture

    def hole(self, size: tuple[int, int], rng: random.Random) -> np.ndarray:
        width, height = size
        across, down = (sorted(rng.sample(range(side + 1), 2)) for side in (width, height))
        hole = np.zeros((height, width), dtype=bool)
        hole[slice(*down), slice(*across)] = True
        return ~hole if rng.random() < 0.5 else hole


class SuperResolution(Task):
    """The picture at half its size; the tokens lie beside the picture's."""

    apart: ClassVar[bool] = True
    reduced: ClassVar[float] = 0.5

    def condition(self, picture: Image.Image, rng: random.Random | None) -> Image.Image:
        return picture


class Pair(Task):
    """The picture that was uploaded as `x.condition.png`, pixel by pixel the picture's counterpart."""

    paired: ClassVar[bool] = True

    def condition(self, picture: Image.Image, rng: random.Random | None) -> Image.Image:
        return picture


class Subject(Pair):
    """Another picture of the subject; its tokens lie beside the picture's."""

    apart: ClassVar[bool] = True


TASKS: dict[str, type[Task]] = {
    "canny": Canny,
    "coloring": Coloring,
    "deblurring": Deblurring,
    "depth": Depth,
    "depth_pred": DepthPrediction,
    "fill": Fill,
    "sr": SuperResolution,
    "subject": Subject,
    "pair": Pair,
}


def task(name: str) -> Task:
    """The task of that name, or the class `module:Class`. Raises UserError for one that there is not."""
    if name in TASKS:
        return TASKS[name]()
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"condition_tasks {name!r} is none of {', '.join(TASKS)}, nor a class that can be imported as module:Class."
        ) from error


def blackened(picture: Image.Image, hole: np.ndarray | None) -> Image.Image:
    """The picture with the pixels of the hole black."""
    return picture if hole is None else Image.fromarray(np.asarray(picture) * ~hole[..., None])


@lru_cache(maxsize=1)
def _depth_estimator(model: str) -> Any:
    from transformers import pipeline

    try:
        return pipeline("depth-estimation", model=model)
    except (OSError, ValueError) as error:
        raise UserError(f"the depth model {model} could not be loaded ({str(error).splitlines()[0]}).") from error
