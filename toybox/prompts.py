"""The fixed scenes that the scores draw: their captions in plain wording are the prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from toybox.palette import COLOURS
from toybox.shapes import SHAPES
from toybox.world import CENTRES, PATTERNS, RADII, Background, Scene, held_out

Option = TypeVar("Option")
HELD_OUT_EVERY = 5  # every fifth scene of the base's score shows a pair that was held out of training
BASE_SEED, UNRELATED_SEED = 20_001, 30_001  # for the scenes
FIRST_SEED = 1000  # of the pictures: picture i is drawn with FIRST_SEED + i


def evenly(options: Sequence[Option], count: int, rng: random.Random) -> list[Option]:
    """`count` of the options in random order, each as often as the others."""
    rounds = -(-count // len(options))
    return [option for _ in range(rounds) for option in rng.sample(options, len(options))][:count]


def kept_for_score(shape: str, colour: str) -> bool:
    """Whether prompts with the pair measure drift: two pairs in five, every shape and every colour among them.

    Preservation prompts (training_defaults.json) are of the others, or the score would measure what was trained.
    """
    return (list(SHAPES).index(shape) + list(COLOURS).index(colour)) % 10 in (1, 4, 7, 9)


def _scenes(pairs: list[tuple[str, str]], rng: random.Random) -> list[Scene]:
    """One-coloured objects, one for each pair of shape and colour; all else comes evenly."""
    count = len(pairs)
    rows = zip(
        pairs,
        evenly(list(RADII), count, rng),
        evenly(list(CENTRES), count, rng),
        evenly(PATTERNS, count, rng),
        strict=True,
    )
    return [
        Scene(
            shape=shape,
            colour=colour,
            size=size,
            position=position,
            background=Background(pattern, rng.choice([c for c in COLOURS if c != colour]), rng.random()),
        )
        for (shape, colour), size, position, pattern in rows
    ]


def _pairs(withheld: bool) -> list[tuple[str, str]]:
    return [(shape, colour) for shape in SHAPES for colour in COLOURS if held_out(shape, colour) == withheld]


def base_scenes(count: int) -> list[Scene]:
    """The scenes of `score base`: always the same for a count, one in five with a held-out pair."""
    rng = random.Random(BASE_SEED)
    withheld = count // HELD_OUT_EVERY
    return _scenes(evenly(_pairs(False), count - withheld, rng) + evenly(_pairs(True), withheld, rng), rng)


def unrelated_scenes(count: int) -> list[Scene]:
    """The scenes of `score adapter` that have nothing to do with the sprite: always the same for a count."""
    rng = random.Random(UNRELATED_SEED)
    return _scenes(evenly([pair for pair in _pairs(False) if kept_for_score(*pair)], count, rng), rng)


def picture_seeds(count: int) -> list[int]:
    """The seeds that the pictures of a score are drawn with."""
    return list(range(FIRST_SEED, FIRST_SEED + count))
