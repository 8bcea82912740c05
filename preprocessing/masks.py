"""Masks for the loss: white counts, black does not. From the alpha channel, from the user or by finding faces.

A mask has the size of its picture. Found masks have soft edges, so that the loss does not teach an outline.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from preprocessing.buckets import Box
from preprocessing.pictures import UnreadablePicture, decode

DETECTION_SIDE = 640  # pixels of the longer side at which faces are looked for
SMALLEST_FACE = 1 / 16  # of the shorter side
FOUND_IN = 6  # neighbouring windows that must agree
# A detector's box reaches from the brows to the mouth; a head is wider and higher.
HEAD_WIDTH, HEAD_HEIGHT, HEAD_UP = 1.3, 1.6, 0.1
FEATHER = 0.06  # of a head's width
SHOWN = 128  # from this value on a pixel belongs to a mask's box
RATIO_SLACK = 0.02  # between a user's mask and its picture


def read_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    """The user's mask file for a picture of `size` ("L"): its alpha channel where it has one, else its brightness.

    Raises UnreadablePicture where it is no picture, of another aspect ratio, or empty.
    """
    picture = decode(path)
    mask = picture.alpha if picture.alpha is not None else picture.rgb.convert("L")
    if abs(mask.width * size[1] / (mask.height * size[0]) - 1) > RATIO_SLACK:
        raise UnreadablePicture(
            f"{mask.width} x {mask.height} pixels, which is not the shape of its picture ({size[0]} x {size[1]})"
        )
    if mask.getextrema()[1] < SHOWN:
        raise UnreadablePicture("a mask that shows nothing: paint white what is to be learnt")
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)


def box_of(mask: Image.Image) -> Box | None:
    """The smallest box around what the mask shows; None where it shows nothing."""
    return mask.point(lambda value: 255 * (value >= SHOWN)).getbbox()


def face_mask(picture: Image.Image) -> Image.Image | None:
    """A soft ellipse over the head of every face that is found; None where none is."""
    faces = find_faces(picture)
    if not faces:
        return None
    mask = Image.new("L", picture.size, 0)
    draw = ImageDraw.Draw(mask)
    for left, top, right, bottom in faces:
        width, height = (right - left) * HEAD_WIDTH, (bottom - top) * HEAD_HEIGHT
        across, down = (left + right) / 2, (top + bottom) / 2 - HEAD_UP * (bottom - top)
        draw.ellipse((across - width / 2, down - height / 2, across + width / 2, down + height / 2), fill=255)
    largest = max(right - left for left, _, right, _ in faces)
    return mask.filter(ImageFilter.GaussianBlur(largest * FEATHER))


def find_faces(picture: Image.Image) -> list[Box]:
    """The boxes of faces, largest first, by the cascades that OpenCV's wheel brings (Viola & Jones 2001).

    Looks for frontal faces, and only if there is none for profiles, which it finds where there are none more often.
    """
    import cv2

    scale = min(1.0, DETECTION_SIDE / max(picture.size))
    small = picture.convert("L").resize([max(1, round(side * scale)) for side in picture.size])
    grey = cv2.equalizeHist(np.asarray(small))
    smallest = max(20, round(min(small.size) * SMALLEST_FACE))
    options = {"scaleFactor": 1.1, "minNeighbors": FOUND_IN, "minSize": (smallest, smallest)}
    found = [tuple(map(int, box)) for box in _cascade("frontalface_default").detectMultiScale(grey, **options)]
    if not found:
        profiles = _cascade("profileface")
        found = [tuple(map(int, box)) for box in profiles.detectMultiScale(grey, **options)]
        # The cascade knows faces that look one way.
        mirrored = profiles.detectMultiScale(np.ascontiguousarray(grey[:, ::-1]), **options)
        found += [
            (grey.shape[1] - left - width, top, width, height)
            for left, top, width, height in (map(int, box) for box in mirrored)
        ]
    found.sort(key=lambda box: -box[2])
    return [(x / scale, y / scale, (x + width) / scale, (y + height) / scale) for x, y, width, height in found]


@functools.cache
def _cascade(name: str):
    import cv2

    return cv2.CascadeClassifier(f"{cv2.data.haarcascades}haarcascade_{name}.xml")
