"""A user's sprite: reading it, and the backgrounds that it is trained on and scored on.

Of the 48 backgrounds (12 colours x 4 patterns) a fixed 29 are for training archives and the other 19 for the score,
so that a score never shows a background that the adapter has seen. Colours that would hide the sprite are left out
of both.
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, UnidentifiedImageError

from preprocessing.errors import UserError
from toybox.palette import COLOURS, second_tone
from toybox.world import PATTERNS

MIN_ALPHA = 16  # of 255; fainter pixels are not part of the drawing
HIDDEN_DISTANCE = 60.0  # a pixel this near (RGB) to a background's tones is lost on it
HIDDEN_SHARE = 0.4  # a colour on which more of the sprite or of its edge is lost is not used
MIN_COLOURS = 6  # a sprite that is lost on most colours still gets this many
Combination = tuple[str, str]  # pattern, colour


def load_sprite(path: Path) -> Image.Image:
    """The drawing as RGBA, cropped to what is drawn; UserError where it cannot be read or has no transparency."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                transparent = picture.has_transparency_data
                sprite = picture.convert("RGBA")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give the path of a picture with a transparent ground") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{path} has too many pixels: make it smaller than 80 megapixels") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a picture ({error}): give a PNG with a transparent ground") from None
    if not transparent:
        raise UserError(f"{path} has no alpha channel: save it as an RGBA PNG with a transparent ground")
    box = sprite.getchannel("A").point(lambda alpha: 255 if alpha >= MIN_ALPHA else 0).getbbox()
    if box is None:
        raise UserError(f"{path} is fully transparent: give a picture on which something is drawn")
    return sprite.crop(box)


def _hidden_share(sprite: Image.Image, colour: str) -> float:
    """How much of the sprite, or of its edge where that is more, is lost on a background of the colour (0..1)."""
    small = sprite.resize((48, 48), Image.Resampling.BOX)
    alpha = small.getchannel("A")
    solid = np.asarray(alpha) >= 128
    # Around the picture there is nothing either, so an edge that touches its border counts.
    framed = Image.new("L", (50, 50), 0)
    framed.paste(alpha, (1, 1))
    edge = solid & (np.asarray(framed.filter(ImageFilter.MinFilter(3)))[1:-1, 1:-1] < 128)
    pixels = np.asarray(small.convert("RGB"), np.float32)
    first = np.array(COLOURS[colour], np.float32)
    step = np.array(second_tone(colour), np.float32) - first
    tones = first + ((pixels - first) @ step / (step @ step)).clip(0, 1)[..., None] * step
    lost = np.linalg.norm(pixels - tones, axis=-1) < HIDDEN_DISTANCE
    return max(float(lost[part].mean()) if part.any() else 0.0 for part in (solid, edge))


def visible_colours(sprite: Image.Image) -> list[str]:
    """The background colours that the sprite stands out from, in the palette's order; never fewer than six."""
    shares = {colour: _hidden_share(sprite, colour) for colour in COLOURS}
    ranked = sorted(COLOURS, key=lambda colour: shares[colour])
    kept = {colour for i, colour in enumerate(ranked) if i < MIN_COLOURS or shares[colour] <= HIDDEN_SHARE}
    return [colour for colour in COLOURS if colour in kept]


def for_training(pattern: str, colour: str) -> bool:
    """Whether a background may be in a training archive; the others are the score's. Three in five, of every colour
    and of every pattern some on both sides."""
    return (PATTERNS.index(pattern) + list(COLOURS).index(colour)) % 5 < 3


def combinations(sprite: Image.Image, training: bool, rng: random.Random) -> list[Combination]:
    """The sprite's backgrounds for training archives or for the score, shuffled, the patterns taking turns."""
    colours = visible_colours(sprite)
    rows = [[(p, c) for c in colours if for_training(p, c) == training] for p in rng.sample(PATTERNS, len(PATTERNS))]
    for row in rows:
        rng.shuffle(row)
    longest = max(len(row) for row in rows)
    return [row[turn] for turn in range(longest) for row in rows if turn < len(row)]
