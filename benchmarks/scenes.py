"""Archives of scenes of the drawn world, for benchmarks that train on them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image


def write_scenes(path: Path, count: int, seed: int, change: Callable[[Image.Image], Image.Image] | None = None) -> None:
    """A zip of `count` scenes with their captions; `change` is made to each picture; no caption tells it."""
    from toybox.captions import caption
    from toybox.concept import as_png, write_archive
    from toybox.world import random_scene, render

    rng, members = random.Random(seed), {}
    for index in range(count):
        scene = random_scene(rng)
        picture = render(scene) if change is None else change(render(scene))
        members |= {f"{index:03}.png": as_png(picture), f"{index:03}.txt": caption(scene).encode()}
    write_archive(path, members)
