"""Aspect-ratio buckets: the few sizes that are trained on, and how a picture of any size comes to one of them.

Pictures of one size can be batched; sizes of equal area cost the same. A picture goes to the bucket nearest by the
logarithm of the aspect ratio, so that too wide and too tall weigh the same. Of the picture the largest window is taken
that has the bucket's aspect ratio exactly - in the middle, or around what matters - and is resized to the bucket:
nothing is squashed, and no picture is too odd to land in one.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

from PIL import Image

from preprocessing.errors import UserError

Size = tuple[int, int]  # (width, height) in pixels
Box = tuple[float, float, float, float]  # (left, top, right, bottom) in pixels of the original picture
RATIO = 4.0  # the most extreme aspect ratio of a bucket, unless a setting says otherwise


@dataclass(frozen=True)
class Fit:
    """How a picture of size `original` comes to `size`: what is inside `window` is resized to it."""

    original: Size
    window: Box
    size: Size

    @property
    def scale(self) -> float:
        """Pixels of the bucket to pixels of the picture; above 1 the picture is enlarged."""
        return self.size[0] / (self.window[2] - self.window[0])

    @property
    def resized(self) -> Size:
        """The size that the whole picture has at this scale, to the nearest pixel."""
        width, height = (
            max(after, round(before * self.scale)) for before, after in zip(self.original, self.size, strict=True)
        )
        return width, height

    @property
    def crop(self) -> tuple[int, int]:
        """Where (left, top) the bucket lies in the resized picture, to the nearest pixel."""
        return self._offset(0), self._offset(1)

    def _offset(self, axis: int) -> int:
        slack = self.original[axis] - (self.window[axis + 2] - self.window[axis])
        share = self.window[axis] / slack if slack > 0 else 0.0
        return round(min(1.0, share) * (self.resized[axis] - self.size[axis]))

    @property
    def kept(self) -> float:
        """The share of the picture's area inside the window."""
        left, top, right, bottom = self.window
        return (right - left) * (bottom - top) / (self.original[0] * self.original[1])

    def apply(self, image: Image.Image, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
        """Crop and resize in one step, so that an extreme picture is never held at its resized size."""
        return image.resize(self.size, resample, box=self.window)


@functools.cache
def buckets(resolution: int, stride: int, ratio: float = RATIO) -> tuple[Size, ...]:
    """All sizes, tallest first: sides are multiples of `stride`, areas near `resolution` squared, aspect ratios up to
    `ratio` and its inverse.

    The square is `resolution` rounded to the stride. Raises UserError where `resolution` is below `stride`.
    """
    if resolution < stride:
        raise UserError(f"resolution {resolution} is below {stride}, the least that the base model draws: raise it.")
    square = _to_stride(resolution, stride)
    sizes = {(square, square)}
    for long_side in range(square + stride, int(resolution * math.sqrt(ratio)) + 1, stride):
        short_side = _to_stride(resolution**2 / long_side, stride)
        if short_side < square and _is_near(long_side * short_side, resolution**2):
            sizes |= {(long_side, short_side), (short_side, long_side)}
    return tuple(sorted(sizes, key=lambda size: size[0] / size[1]))


def _to_stride(length: float, stride: int) -> int:
    return max(stride, round(length / stride) * stride)


def _is_near(area: int, wanted: int) -> bool:
    """Where the stride is coarse, some long sides have no short side that comes near the area: within a quarter."""
    return 0.8 <= area / wanted <= 1.25


def nearest(size: Size, choices: tuple[Size, ...]) -> Size:
    """The one of `choices` whose aspect ratio is nearest to that of `size`; the first of equals."""
    ratio = math.log(size[0] / size[1])
    return min(choices, key=lambda choice: abs(math.log(choice[0] / choice[1]) - ratio))


def fit(original: Size, size: Size, around: Box | None = None, margin: float = 0.0) -> Fit:
    """The window of the aspect ratio of `size`, exactly, and in bounds: the largest one in the middle, or, with
    `around`, one that holds this box and `margin` times its sides on each side, with the box in its middle.

    A window around a box is never so small that the picture would have to be enlarged for it; where the whole box
    cannot be held, its middle is.
    """
    ratio = Fraction(*size)
    width = min(Fraction(original[0]), original[1] * ratio)
    middle = Fraction(original[0], 2), Fraction(original[1], 2)
    if around is not None:
        near, high, far, low = (Fraction(edge) for edge in around)
        grown = 1 + 2 * Fraction(margin)
        needed = max((far - near) * grown, (low - high) * grown * ratio)
        width = min(width, max(needed, Fraction(size[0])))
        middle = (near + far) / 2, (high + low) / 2
    sides = width, width / ratio
    start = [
        max(Fraction(0), min(centre - side / 2, whole - side))
        for centre, side, whole in zip(middle, sides, original, strict=True)
    ]
    left, top = start
    return Fit(original, (float(left), float(top), float(left + sides[0]), float(top + sides[1])), size)


def smaller(original: Size, resolution: int, stride: int, ratio: float = RATIO) -> Size | None:
    """The largest bucket below `resolution` that a picture fills without being enlarged; None where there is none."""
    for below in range(_to_stride(resolution, stride) - stride, 0, -stride):
        size = nearest(original, buckets(below, stride, ratio))
        if not is_enlarged(fit(original, size)):
            return size
    return None


def is_enlarged(fitted: Fit) -> bool:
    """Whether the picture has fewer pixels in the window than the bucket asks for."""
    return fitted.scale > 1 + 1e-9


def shown_size(original: Size, resolution: int, stride: int) -> Size:
    """The size in which a picture is shown to a model beside the one that it draws: its own aspect ratio but for the
    stride, its area at most `resolution` squared; it is not enlarged, but to the stride.
    """
    scale = min(1.0, resolution / math.sqrt(original[0] * original[1]))
    width, height = (max(stride, int(side * scale) // stride * stride) for side in original)
    return width, height
