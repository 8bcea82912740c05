"""The world's fifteen shapes, each drawn into a box with Pillow. Coordinates run from -1 to 1, y downwards."""

from __future__ import annotations

import math
from collections.abc import Callable

from PIL import Image, ImageDraw

Point = tuple[float, float]


class Canvas:
    """A one-channel mask that is drawn on in unit coordinates around `centre` with `radius` pixels to the unit."""

    def __init__(self, size: int, centre: Point, radius: float):
        self.mask = Image.new("L", (size, size), 0)
        self._draw = ImageDraw.Draw(self.mask)
        self._centre, self._radius = centre, radius

    def _place(self, point: Point) -> Point:
        return (self._centre[0] + point[0] * self._radius, self._centre[1] + point[1] * self._radius)

    def polygon(self, points: list[Point]) -> None:
        self._draw.polygon([self._place(p) for p in points], fill=255)

    def ellipse(self, left: float, top: float, right: float, bottom: float, fill: int = 255) -> None:
        self._draw.ellipse([*self._place((left, top)), *self._place((right, bottom))], fill=fill)

    def rectangle(self, left: float, top: float, right: float, bottom: float) -> None:
        self._draw.rectangle([*self._place((left, top)), *self._place((right, bottom))], fill=255)


def _circle_points(count: int, radius: float = 1.0, turn: float = -90.0) -> list[Point]:
    angles = [math.radians(turn + 360.0 * i / count) for i in range(count)]
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _circle(c: Canvas) -> None:
    c.ellipse(-0.95, -0.95, 0.95, 0.95)


def _square(c: Canvas) -> None:
    c.rectangle(-0.85, -0.85, 0.85, 0.85)


def _triangle(c: Canvas) -> None:
    c.polygon([(0, -0.95), (1, 0.85), (-1, 0.85)])


def _star(c: Canvas) -> None:
    outer, inner = _circle_points(5, 1.05), _circle_points(5, 0.42, -54.0)
    c.polygon([p for pair in zip(outer, inner, strict=True) for p in pair])


def _heart(c: Canvas) -> None:
    angles = [2 * math.pi * i / 60 for i in range(60)]
    curve = [
        (16 * math.sin(a) ** 3, 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a))
        for a in angles
    ]
    c.polygon([(x / 16, -y / 16 - 0.1) for x, y in curve])


def _diamond(c: Canvas) -> None:
    c.polygon([(0, -1), (0.72, 0), (0, 1), (-0.72, 0)])


def _cross(c: Canvas) -> None:
    c.rectangle(-0.33, -0.95, 0.33, 0.95)
    c.rectangle(-0.95, -0.33, 0.95, 0.33)


def _ring(c: Canvas) -> None:
    c.ellipse(-1, -1, 1, 1)
    c.ellipse(-0.52, -0.52, 0.52, 0.52, fill=0)


def _moon(c: Canvas) -> None:
    c.ellipse(-0.95, -1, 1.05, 1)
    c.ellipse(-0.25, -0.85, 1.45, 0.85, fill=0)


def _arrow(c: Canvas) -> None:
    c.polygon([(-1, -0.3), (0.05, -0.3), (0.05, -0.85), (1, 0), (0.05, 0.85), (0.05, 0.3), (-1, 0.3)])


def _house(c: Canvas) -> None:
    c.polygon([(0, -1), (1, -0.1), (-1, -0.1)])
    c.rectangle(-0.7, -0.1, -0.22, 0.95)
    c.rectangle(0.22, -0.1, 0.7, 0.95)
    c.rectangle(-0.7, -0.1, 0.7, 0.3)


def _tree(c: Canvas) -> None:
    c.polygon([(0, -1.05), (0.6, -0.3), (-0.6, -0.3)])
    c.polygon([(0, -0.65), (0.9, 0.5), (-0.9, 0.5)])
    c.rectangle(-0.2, 0.5, 0.2, 1)


def _fish(c: Canvas) -> None:
    c.ellipse(-1, -0.6, 0.5, 0.6)
    c.polygon([(0.2, 0), (1, -0.7), (1, 0.7)])


def _flower(c: Canvas) -> None:
    for x, y in _circle_points(5, 0.58):
        c.ellipse(x - 0.42, y - 0.42, x + 0.42, y + 0.42)
    c.ellipse(-0.24, -0.24, 0.24, 0.24, fill=0)


def _bolt(c: Canvas) -> None:
    c.polygon([(0.25, -1.05), (-0.65, 0.2), (-0.05, 0.2), (-0.3, 1.05), (0.65, -0.25), (0.05, -0.25)])


SHAPES: dict[str, Callable[[Canvas], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "diamond": _diamond,
    "cross": _cross,
    "ring": _ring,
    "moon": _moon,
    "arrow": _arrow,
    "house": _house,
    "tree": _tree,
    "fish": _fish,
    "flower": _flower,
    "bolt": _bolt,
}


def shape_mask(shape: str, size: int, centre: Point, radius: float) -> Image.Image:
    """A hard mask ("L", 0 or 255) of `size` x `size` pixels with the shape at `centre` (pixels)."""
    canvas = Canvas(size, centre, radius)
    SHAPES[shape](canvas)
    return canvas.mask
