"""Subjects200K's layout: a record is one picture of two side by side, which show the same subject, and what each shows.

The data set is Tan et al. 2024 (arXiv:2411.15098). Of 1056 x 528 pixels each half is a picture of 512 x 512 with a
padding of 8 pixels on every side; with a padding that the two share it is 1048 x 528. Both directions are trained: the
left one drawn from the right one, and the right one drawn from the left one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from PIL import Image

from preprocessing.pictures import Picture, UnreadablePicture

SCORES = ("compositeStructure", "objectConsistency", "imageQuality")
QUALITY, DESCRIPTION = "quality_assessment", "description"  # columns
LEAST_SCORE = 5  # of each; the scores go from 0 to 5
PADDING = 8
HALVES = ("left", "right")


def is_of_pairs(columns: Collection[str]) -> bool:
    """Whether a data set's columns are Subjects200K's."""
    return QUALITY in columns and DESCRIPTION in columns


def fault_of(record: Mapping[str, Any]) -> str | None:
    """Why a record is not trained on; None where all its scores are high enough."""
    stored = record.get(QUALITY)
    scores = [stored.get(name) if isinstance(stored, Mapping) else None for name in SCORES]
    if all(isinstance(score, int | float) and score >= LEAST_SCORE for score in scores):
        return None
    told = ", ".join(f"{name} {score}" for name, score in zip(SCORES, scores, strict=True))
    return f"its quality scores are not all {LEAST_SCORE} or more ({told})"


def description_of(record: Mapping[str, Any], half: str) -> str | None:
    """What one of the two pictures shows."""
    stored = record.get(DESCRIPTION)
    said = stored.get(f"description_{HALVES.index(half)}") if isinstance(stored, Mapping) else None
    return said if isinstance(said, str) else None


def name_of(record: str, half: str) -> str:
    """The name of one of the two pictures of the record called `record`."""
    return f"{record}/{half}"


def record_of(name: str) -> str:
    """The record that a picture is of; a picture that is none of two is its own."""
    head, _, half = name.rpartition("/")
    return head if head and half in HALVES else name


def parted(picture: Picture, half: str) -> tuple[Picture, Image.Image]:
    """One of the two pictures, and the other one as RGB. Raises UnreadablePicture where it is not two."""
    width, height = picture.rgb.size
    side = height - 2 * PADDING
    offsets = {2 * height: (PADDING, height + PADDING), 2 * side + 3 * PADDING: (PADDING, side + 2 * PADDING)}
    if side < 1 or width not in offsets:
        raise UnreadablePicture(
            f"{width} x {height} pixels, and not two square pictures side by side with a padding of {PADDING}"
        )
    boxes = [(left, PADDING, left + side, PADDING + side) for left in offsets[width]]
    if half == HALVES[1]:
        boxes.reverse()
    own = replace(picture, rgb=picture.rgb.crop(boxes[0]), alpha=picture.alpha and picture.alpha.crop(boxes[0]))
    return own, picture.rgb.crop(boxes[1])
