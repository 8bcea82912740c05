"""The world in 32x32 pixels and fewer, for the autoregressive model."""

from __future__ import annotations

import random
from collections.abc import Iterator

from PIL import Image

from toybox.captions import caption
from toybox.world import Scene, random_scene, render

SIDE = 32
ACCENTS = 0.1  # share of two-coloured objects; there are no drawings, which are noise at this size


def small(scene: Scene, side: int = SIDE) -> Image.Image:
    """The scene's picture, RGB, `side` x `side` pixels, each the mean of what it covers."""
    picture = render(scene)
    return picture.reduce(picture.width // side)


def scenes_of(seed: int, count: int) -> list[Scene]:
    """Scenes that may be trained on, always the same for a seed; those of a smaller count come first."""
    rng = random.Random(seed)
    return [random_scene(rng, drawings=0.0, accents=ACCENTS) for _ in range(count)]


def captioned(count: int, seed: int, wording: random.Random) -> Iterator[tuple[Image.Image, str]]:
    """Pictures of `scenes_of`, each with a caption of varied wording."""
    for scene in scenes_of(seed, count):
        yield small(scene), caption(scene, wording)
