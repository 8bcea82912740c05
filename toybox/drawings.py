"""Random many-coloured drawings on a transparent ground: what stands for "a drawing of anything" in the world.

The VAE must reconstruct a user's sprite, and the base model must know that an object may look like anything; a world
of one-coloured shapes alone would teach neither.
"""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw, ImageOps

from toybox.palette import COLOURS

CANVAS = 160


def _colour(rng: random.Random) -> tuple[int, int, int]:
    if rng.random() < 0.6:
        return rng.choice(list(COLOURS.values()))
    return (rng.randrange(256), rng.randrange(256), rng.randrange(256))


def _blob(rng: random.Random, centre: tuple[float, float], radius: float) -> list[tuple[float, float]]:
    """A closed outline of 3 to 9 corners around `centre`."""
    corners = rng.randint(3, 9)
    turn, rough = rng.uniform(0, 2 * math.pi), rng.choice([0.0, 0.25, 0.5])
    points = []
    for i in range(corners):
        r = radius * (1 - rough * rng.random())
        angle = turn + 2 * math.pi * i / corners
        points.append((centre[0] + r * math.cos(angle), centre[1] + r * math.sin(angle)))
    return points


def _mark(draw: ImageDraw.ImageDraw, rng: random.Random, reach: float, radius: tuple[float, float]) -> None:
    """One filled part at most `reach` from the middle, its radius within `radius` (pixels)."""
    middle = CANVAS / 2
    x, y = middle + rng.uniform(-reach, reach), middle + rng.uniform(-reach, reach)
    r, stretch = rng.uniform(*radius), rng.uniform(0.5, 1.0)
    width, height = (r, r * stretch) if rng.random() < 0.5 else (r * stretch, r)
    box, fill = [x - width, y - height, x + width, y + height], _colour(rng)
    kind = rng.randrange(6)
    if kind <= 1:
        draw.ellipse(box, fill=fill)
    elif kind == 2:
        draw.rectangle(box, fill=fill)
    elif kind == 3:
        draw.rounded_rectangle(box, radius=min(width, height) / 2, fill=fill)
    elif kind == 4:
        draw.polygon(_blob(rng, (x, y), r), fill=fill)
    else:
        end = (middle + rng.uniform(-reach, reach), middle + rng.uniform(-reach, reach))
        draw.line([(x, y), end], fill=fill, width=rng.randint(8, 22))


def random_drawing(rng: random.Random) -> Image.Image:
    """An RGBA drawing, cropped to what is drawn: a body, then limbs, patches and eyes; often symmetric."""
    picture = Image.new("RGBA", (CANVAS, CANVAS), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.randint(0, 3)):
        _mark(draw, rng, reach=45, radius=(18, 38))
    _mark(draw, rng, reach=8, radius=(42, 62))
    if rng.random() < 0.7:
        for _ in range(rng.randint(1, 4)):
            _mark(draw, rng, reach=38, radius=(10, 28))
    if rng.random() < 0.6:
        mirrored = ImageOps.mirror(picture)
        picture = Image.composite(picture, mirrored, _left_half())
        draw = ImageDraw.Draw(picture)
    if rng.random() < 0.5:
        _eyes(draw, rng)
    return picture.crop(picture.getchannel("A").getbbox())


def _left_half() -> Image.Image:
    half = Image.new("L", (CANVAS, CANVAS), 0)
    half.paste(255, (0, 0, CANVAS // 2, CANVAS))
    return half


def _eyes(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    middle, apart, height, r = CANVAS / 2, rng.uniform(12, 26), rng.uniform(50, 85), rng.uniform(6, 12)
    for x in (middle - apart, middle + apart):
        draw.ellipse([x - r, height - r, x + r, height + r], fill=(250, 250, 250))
        draw.ellipse([x - r / 2, height - r / 2, x + r / 2, height + r / 2], fill=(20, 20, 20))
