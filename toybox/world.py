"""The drawn world: scenes of one object on a background, their pictures (64x64, antialiased) and their captions."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from toybox.drawings import random_drawing
from toybox.palette import COLOURS, second_tone
from toybox.shapes import SHAPES, shape_mask

SIZE = 64
OVERSAMPLE = 4
RADII = {"small": 10.5, "medium": 14.5, "big": 19.0}
OFFSET = 12.0
CENTRES = {
    "left": (32 - OFFSET, 32.0),
    "right": (32 + OFFSET, 32.0),
    "top": (32.0, 32 - OFFSET),
    "bottom": (32.0, 32 + OFFSET),
    "centre": (32.0, 32.0),
}
PATTERNS = ("plain", "striped", "dotted", "gradient")
DRAWING = "drawing"  # the "shape" of a scene whose object is a random many-coloured drawing


@dataclass(frozen=True)
class Background:
    """A pattern in one colour; `phase` in [0, 1) shifts stripes and dots."""

    pattern: str
    colour: str
    phase: float = 0.0


@dataclass(frozen=True)
class Scene:
    """One object on one background. `accent` is a second colour, worn as `dress` says."""

    shape: str
    colour: str
    size: str
    position: str
    background: Background
    accent: str | None = None
    dress: str | None = None
    jitter: tuple[float, float] = (0.0, 0.0)
    drawing_seed: int = 0


DRESSES = ("rim", "spot", "halves")


def held_out(shape: str, colour: str) -> bool:
    """Whether the pair is kept out of training: one pair in ten, one or two of every shape and colour."""
    row, column = list(SHAPES).index(shape), list(COLOURS).index(colour)
    return (3 * row + 7 * column) % 10 == 0


def draw_background(background: Background) -> Image.Image:
    """The background alone, RGB, at OVERSAMPLE times SIZE."""
    size = SIZE * OVERSAMPLE
    first, second = COLOURS[background.colour], second_tone(background.colour)
    picture = Image.new("RGB", (size, size), first)
    draw = ImageDraw.Draw(picture)
    if background.pattern == "striped":
        period = 12 * OVERSAMPLE
        start = int(background.phase * period) - 2 * size
        for x in range(start, 2 * size, period):
            draw.polygon([(x, 0), (x + period // 2, 0), (x + period // 2 + size, size), (x + size, size)], fill=second)
    elif background.pattern == "dotted":
        period, radius = 13 * OVERSAMPLE, 3.2 * OVERSAMPLE
        start = int(background.phase * period) - period
        for row, y in enumerate(range(start, size + period, period)):
            for x in range(start + (row % 2) * period // 2 - period, size + period, period):
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=second)
    elif background.pattern == "gradient":
        ramp = np.linspace(0.0, 1.0, size)[:, None, None]
        rows = np.asarray(first) * (1 - ramp) + np.asarray(second) * ramp
        picture = Image.fromarray(np.broadcast_to(rows, (size, size, 3)).round().astype(np.uint8))
    return picture


def place(scene_size: str, position: str, jitter: tuple[float, float]) -> tuple[tuple[float, float], float]:
    """Centre (pixels) and radius (pixels) of an object in the finished picture."""
    x, y = CENTRES[position]
    return (x + jitter[0], y + jitter[1]), RADII[scene_size]


def paste_sprite(canvas: Image.Image, sprite: Image.Image, centre: tuple[float, float], radius: float) -> None:
    """Paste an RGBA sprite, scaled so that its longer side is 2 x `radius`, onto `canvas` (pixels of the canvas)."""
    scale = 2 * radius / max(sprite.size)
    width, height = (max(1, round(side * scale)) for side in sprite.size)
    resized = sprite.resize((width, height), Image.Resampling.LANCZOS)
    canvas.paste(resized, (round(centre[0] - width / 2), round(centre[1] - height / 2)), resized)


def _dress(scene: Scene, mask: Image.Image, centre: tuple[float, float], radius: float) -> Image.Image:
    """The part of the object's mask that the accent colour covers."""
    accent = Image.new("L", mask.size, 0)
    x, y = centre
    if scene.dress == "rim":
        inner = mask.filter(ImageFilter.MinFilter(2 * int(0.14 * radius) + 1))
        accent.paste(mask)
        accent.paste(0, mask=inner)
    elif scene.dress == "spot":
        spot = Image.new("L", mask.size, 0)
        r = 0.38 * radius
        ImageDraw.Draw(spot).ellipse([x - r, y - r, x + r, y + r], fill=255)
        accent.paste(mask, mask=spot)
    elif scene.dress == "halves":
        accent.paste(mask.crop((0, int(y), mask.width, mask.height)), (0, int(y)))
    return accent


def render(scene: Scene) -> Image.Image:
    """The scene's picture: RGB, 64x64."""
    canvas = draw_background(scene.background)
    (x, y), radius = place(scene.size, scene.position, scene.jitter)
    centre, radius = (x * OVERSAMPLE, y * OVERSAMPLE), radius * OVERSAMPLE
    if scene.shape == DRAWING:
        paste_sprite(canvas, random_drawing(random.Random(scene.drawing_seed)), centre, radius)
    else:
        mask = shape_mask(scene.shape, canvas.width, centre, radius)
        canvas.paste(COLOURS[scene.colour], mask=mask)
        if scene.accent:
            canvas.paste(COLOURS[scene.accent], mask=_dress(scene, mask, centre, radius))
    return canvas.reduce(OVERSAMPLE)


def random_scene(rng: random.Random, drawings: float = 0.25, accents: float = 0.2) -> Scene:
    """A scene that may be trained on; `drawings` and `accents` are the shares of such objects."""
    while True:
        shape, colour = rng.choice(list(SHAPES)), rng.choice(list(COLOURS))
        if not held_out(shape, colour):
            break
    ground = rng.choice([c for c in COLOURS if c != colour])
    scene = {
        "shape": shape,
        "colour": colour,
        "size": rng.choice(list(RADII)),
        "position": rng.choice(list(CENTRES)),
        "background": Background(rng.choice(PATTERNS), ground, rng.random()),
        "jitter": (rng.uniform(-1.5, 1.5), rng.uniform(-1.5, 1.5)),
    }
    kind = rng.random()
    if kind < drawings:
        scene |= {"shape": DRAWING, "drawing_seed": rng.randrange(2**31)}
    elif kind < drawings + accents:
        scene |= {"accent": rng.choice([c for c in COLOURS if c not in (colour, ground)]), "dress": rng.choice(DRESSES)}
    return Scene(**scene)
