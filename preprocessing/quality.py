"""What can be measured of a picture before any training: sharpness, and a hash that near-duplicates share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

HASH_SIDE, LOW = 32, 8  # the hash is of the LOW x LOW lowest frequencies of a picture HASH_SIDE wide
NEAR = 6  # bits of 64 by which near-duplicates differ at most
BLUR_SIDE, BLUR_WINDOW = 256, 11  # pixels
BLURRED = 0.45  # from this value on a picture looks out of focus
ROWS = 1024  # of a table of distances at a time


def perceptual_hash(picture: Image.Image) -> int:
    """64 bits that change little when a picture is resized, recompressed or brightened.

    The signs of the lowest frequencies of a small grey picture against their median (pHash: Zauner 2010,
    "Implementation and benchmarking of perceptual image hash functions").
    """
    import cv2

    grey = picture.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.LANCZOS)
    low = cv2.dct(np.asarray(grey, dtype=np.float32))[:LOW, :LOW].ravel()
    bits = low > np.median(low[1:])  # without the mean, which would pull the median
    return int(np.packbits(bits).view(">u8")[0])


def blur(picture: Image.Image) -> float | None:
    """How blurred a picture is: 0 sharp, 1 without any detail; None where it is of one colour.

    Blurs it once more and asks how much of the variation between neighbours that takes: little where it was blurred
    before (Crete et al. 2007, "The blur effect: perception and estimation with a new no-reference perceptual blur
    metric"). At one size, for what is trained on is resized too.
    """
    grey = picture.convert("L")
    grey.thumbnail((BLUR_SIDE, BLUR_SIDE), Image.Resampling.LANCZOS)
    values = np.asarray(grey, dtype=np.float32)
    shares = []
    for along in (values, values.T):
        if along.shape[0] <= BLUR_WINDOW:
            return None
        before = np.abs(np.diff(along, axis=0))
        after = np.abs(np.diff(_smoothed(along), axis=0))
        whole = float(before.sum())
        if whole == 0:
            return None
        shares.append(1 - float(np.maximum(0, before - after).sum()) / whole)
    return max(shares)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of BLUR_WINDOW rows around each row; at the ends the last row goes on."""
    half = BLUR_WINDOW // 2
    padded = np.pad(values, ((half + 1, half), (0, 0)), mode="edge").cumsum(axis=0, dtype=np.float64)
    return (padded[BLUR_WINDOW:] - padded[:-BLUR_WINDOW]) / BLUR_WINDOW


def near_duplicates(hashes: Sequence[int]) -> list[list[int]]:
    """Groups of indices whose hashes lie near each other, directly or through others; each of two at least, sorted."""
    unique, places = np.unique(np.array(hashes, dtype=np.uint64), return_inverse=True)
    parent = list(range(len(unique)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for start in range(0, len(unique), ROWS):
        distances = np.bitwise_count(unique[start : start + ROWS, None] ^ unique[None, start:])
        for row, column in zip(*np.nonzero(distances <= NEAR), strict=True):
            parent[root(start + int(row))] = root(start + int(column))
    groups: dict[int, list[int]] = {}
    for index, place in enumerate(places.tolist()):
        groups.setdefault(root(place), []).append(index)
    return sorted(group for group in groups.values() if len(group) > 1)
