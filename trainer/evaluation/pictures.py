"""What drawn pictures say of an adapter: copies of training pictures, sameness over seeds, pictures of nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image

SIDE = 32  # pixels of the thumbnails that are compared
NEAR_COPY = 0.5  # of the pictures' own usual distance to their nearest neighbour: what is nearer looks like a copy
BLANK = 2.0  # a picture whose pixels spread less than this (of 255) shows nothing


@dataclass(frozen=True)
class Neighbour:
    """The picture of the data set that a sample is nearest to."""

    sample: int
    picture: int
    distance: float  # 0 is the same thumbnail; 1 is how far apart pictures of the data set usually are at the nearest


def is_blank(picture: Image.Image) -> bool:
    """Whether a picture is black, or of any other single colour."""
    return float(np.asarray(picture.convert("RGB"), dtype=np.float32).std(axis=(0, 1)).max()) < BLANK


def thumbnail(picture: Image.Image) -> np.ndarray:
    """[SIDE, SIDE, 3] in [0, 1]."""
    small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square difference of two thumbnails, of the other's mirror image where that is nearer."""
    return float(min(np.sqrt(np.square(one - view).mean()) for view in (other, other[:, ::-1])))


def nearest(samples: Sequence[np.ndarray], pictures: Sequence[np.ndarray]) -> list[Neighbour]:
    """Of each sample the nearest picture, by thumbnails. Distances are relative, see `Neighbour`.

    The scale is the median distance of a picture to its own nearest neighbour; with one picture it is that to the
    samples.
    """
    own, found = [], []
    for one in pictures if len(pictures) > 1 else ():
        own.append(min(distance(one, other) for other in pictures if other is not one))
    for index, sample in enumerate(samples):
        distances = [distance(sample, picture) for picture in pictures]
        found.append(Neighbour(index, int(np.argmin(distances)), min(distances)))
    scale = float(np.median(own)) if own else float(np.median([one.distance for one in found]))
    return [Neighbour(one.sample, one.picture, one.distance / scale if scale else 0.0) for one in found]


def diversity(adapted: Sequence[Sequence[np.ndarray]], base: Sequence[Sequence[np.ndarray]]) -> float | None:
    """How much pictures of one prompt differ over seeds, as a share of how much the base model's do.

    Both hold, by prompt, the thumbnails by seed. 1 is as varied as the base model, 0 the same picture always; None
    where no prompt has two seeds, or the base model's pictures are all the same.
    """
    spreads = [
        sum(distance(one, other) for row in rows for one, other in combinations(row, 2)) for rows in (adapted, base)
    ]
    return spreads[0] / spreads[1] if spreads[1] else None
