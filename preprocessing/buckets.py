"""Aspect-ratio buckets: the few sizes that are trained on, and how a picture of any size comes to one of them.

Pictures of one size can be batched; sizes of equal area cost the same. A picture goes to the bucket nearest by the
logarithm of the aspect ratio, so that too wide and too tall weigh the same, is scaled until it covers the bucket, and
what juts out is cropped. Nothing is squashed, and no picture is too odd to land in one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image

from preprocessing.errors import UserError

Size = tuple[int, int]  # (width, height) in pixels
LONGEST = 2.0  # a side of a bucket is this many times the resolution at the most


@dataclass(frozen=True)
class Fit:
    """How a picture of size `original` comes to `size`: resized to `resized`, then cropped at `crop` (left, top)."""

    original: Size
    resized: Size
    crop: tuple[int, int]
    size: Size

    def apply(self, image: Image.Image, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
        """Resize and crop in one step, so that an extreme picture is never held at its resized size."""
        left, top = self.crop
        across, down = (before / after for before, after in zip(self.original, self.resized, strict=True))
        box = (left * across, top * down, (left + self.size[0]) * across, (top + self.size[1]) * down)
        return image.resize(self.size, resample, box=box)


def buckets(resolution: int, stride: int) -> tuple[Size, ...]:
    """All sizes, tallest first: sides are multiples of `stride` from half to twice `resolution`, areas near its square.

    The square is `resolution` rounded to the stride. Raises UserError where `resolution` is below `stride`.
    """
    if resolution < stride:
        raise UserError(f"resolution {resolution} is below {stride}, the least that the base model draws: raise it.")
    square = _to_stride(resolution, stride)
    sizes = {(square, square)}
    for long_side in range(square + stride, int(resolution * LONGEST) + 1, stride):
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


def fit(original: Size, size: Size) -> Fit:
    """The smallest resize that covers `size`, its aspect ratio kept to within half a pixel, and the middle crop."""
    scale = max(size[0] / original[0], size[1] / original[1])
    width, height = (max(after, round(before * scale)) for before, after in zip(original, size, strict=True))
    return Fit(original, (width, height), ((width - size[0]) // 2, (height - size[1]) // 2), size)
