"""Captions of varied wording for scenes, and the plain wording that the score's prompts use."""

from __future__ import annotations

import random

from toybox.world import DRAWING, Background, Scene

OPENINGS = ("", "", "a photo of ", "a picture of ", "an image of ")
DRAWING_NOUNS = ("sticker", "toy", "creature", "figure")
POSITION_WORDINGS = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "on top", "in the upper part"),
    "bottom": ("at the bottom", "below", "in the lower part"),
    "centre": ("in the middle", "in the centre", "in the center"),
}
PATTERN_ADJECTIVES = {
    "plain": ("", "plain "),
    "striped": ("striped ",),
    "dotted": ("dotted ",),
    "gradient": ("gradient ",),
}
PATTERN_SUFFIXES = {"striped": " with stripes", "dotted": " with dots", "gradient": " with a gradient"}
DRESS_WORDINGS = {"rim": "with a {} rim", "spot": "with a {} spot", "halves": "with a {} lower half"}


def background_words(background: Background, rng: random.Random | None = None) -> str:
    """ "a striped blue background"; with `rng` in varied wording."""
    if rng and background.pattern in PATTERN_SUFFIXES and rng.random() < 0.2:
        return f"a {background.colour} background{PATTERN_SUFFIXES[background.pattern]}"
    adjective = PATTERN_ADJECTIVES[background.pattern][-1]
    if rng:
        adjective = rng.choice(PATTERN_ADJECTIVES[background.pattern])
    article = "an" if not adjective and background.colour == "orange" else "a"
    return f"{article} {adjective}{background.colour} background"


def compose(subject: str, background: Background, position: str, rng: random.Random | None = None) -> str:
    """`subject` (with its article) on the background at the position: plain wording, or varied by `rng`."""
    if rng is None:
        return f"{subject} on {background_words(background)} {POSITION_WORDINGS[position][0]}"
    ground = f" {rng.choice(('on', 'on', 'against', 'in front of'))} {background_words(background, rng)}"
    where = rng.choice(POSITION_WORDINGS[position])
    opening = rng.choice(OPENINGS)
    if rng.random() < 0.08:
        ground = ""
    form = rng.random()
    if form < 0.15:
        return f"{opening}{subject}{ground}"
    if form < 0.3:
        return f"{where}, {opening}{subject}{ground}"
    if form < 0.45:
        return f"{opening}{subject} {where}{ground}"
    return f"{opening}{subject}{ground} {where}"


def subject_words(scene: Scene, rng: random.Random | None = None) -> str:
    """ "a big red star"; with `rng` the size is often left out and a drawing is called by one of several nouns."""
    size = f"{scene.size} " if rng is None or rng.random() < 0.6 else ""
    if scene.shape == DRAWING:
        words = f"{size}{rng.choice(DRAWING_NOUNS) if rng else DRAWING_NOUNS[0]}"
    else:
        words = f"{size}{scene.colour} {scene.shape}"
    article = "an" if words[0] in "aeiou" else "a"
    dress = f" {DRESS_WORDINGS[scene.dress].format(scene.accent)}" if scene.dress else ""
    return f"{article} {words}{dress}"


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The scene in words: always the same without `rng`, varied with it."""
    return compose(subject_words(scene, rng), scene.background, scene.position, rng)
