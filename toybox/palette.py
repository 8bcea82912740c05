"""The world's twelve colours and the two tones that a patterned background is made of."""

from __future__ import annotations

Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 60),
    "green": (50, 160, 70),
    "cyan": (70, 205, 220),
    "blue": (45, 85, 210),
    "purple": (130, 60, 180),
    "pink": (245, 145, 195),
    "brown": (130, 80, 45),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
    "grey": (140, 140, 140),
}

LIGHT_COLOURS = frozenset({"orange", "yellow", "cyan", "pink", "white"})


def blend(first: Rgb, second: Rgb, share: float) -> Rgb:
    """Mix two colours; `share` in [0, 1] is how much of the second there is."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))


def second_tone(colour: str) -> Rgb:
    """The tone of stripes, dots and gradients: a light colour gets darker, a dark one lighter."""
    towards = (0, 0, 0) if colour in LIGHT_COLOURS else (255, 255, 255)
    return blend(COLOURS[colour], towards, 0.3)
