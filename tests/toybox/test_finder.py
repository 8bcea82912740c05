"""The finder against true pastes and wrong objects, for the demo sprites, odd sprites and random drawings."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from toybox.calibration import VAE_FOLDER, blurred, finder_rates, noisy, recoloured, through_vae, wrong_sprites
from toybox.concept import picture_of, plan
from toybox.drawings import random_drawing
from toybox.finder import Finder, find_pair
from toybox.score import SPRITES
from toybox.sprite import load_sprite
from toybox.world import OVERSAMPLE, Background, draw_background, paste_sprite


def match() -> Image.Image:
    """Tall and thin."""
    picture = Image.new("RGBA", (60, 200), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    draw.rectangle([22, 60, 38, 199], fill=(120, 80, 30))
    draw.ellipse([0, 0, 59, 80], fill=(230, 60, 60))
    draw.ellipse([15, 15, 35, 35], fill=(255, 255, 255))
    return picture


def car() -> Image.Image:
    """Three times as wide as high."""
    picture = Image.new("RGBA", (240, 80), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    draw.rounded_rectangle([0, 20, 239, 60], 20, fill=(40, 120, 220))
    draw.rectangle([60, 0, 160, 30], fill=(250, 210, 60))
    draw.ellipse([30, 45, 65, 79], fill=(20, 20, 20))
    draw.ellipse([170, 45, 205, 79], fill=(20, 20, 20))
    return picture


def face() -> Image.Image:
    """Nearly one colour: only the features tell it from a yellow circle."""
    picture = Image.new("RGBA", (20, 20), (0, 0, 0, 0)).resize((128, 128))
    draw = ImageDraw.Draw(picture)
    draw.ellipse([4, 4, 124, 124], fill=(255, 200, 40))
    draw.ellipse([36, 40, 52, 60], fill=(30, 30, 30))
    draw.ellipse([76, 40, 92, 60], fill=(30, 30, 30))
    draw.arc([34, 50, 94, 104], 20, 160, fill=(30, 30, 30), width=8)
    return picture.crop(picture.getchannel("A").getbbox())


def structured_drawing(seed: int) -> Image.Image:
    """A random drawing that is more than one blot: a pink rectangle is no other thing than a pink rectangle."""
    rng = random.Random(seed)
    while True:
        drawing = random_drawing(rng)
        pixels = np.asarray(drawing, np.float32) / 255
        solid = pixels[pixels[..., 3] > 0.5][:, :3]
        if solid.var(0).sum() > 0.05:
            return drawing


SPRITE_MAKERS = {
    "robot": lambda: load_sprite(SPRITES / "robot.png"),
    "teapot": lambda: load_sprite(SPRITES / "teapot.png"),
    "match": match,
    "car": car,
    "face": face,
    "drawing 1": lambda: structured_drawing(1),
    "drawing 2": lambda: structured_drawing(2),
    "drawing 3": lambda: structured_drawing(3),
}


@pytest.mark.parametrize("damage", [blurred, noisy])
def test_pastes_are_found_and_wrong_objects_are_not(damage):
    """At least 99 % of pastes, at most 1 % of wrong objects, half of which are in the sprite's own colours."""
    rates = {name: finder_rates(make(), 14, seed=5, damage=damage) for name, make in SPRITE_MAKERS.items()}
    assert sum(r.accepted["sprite"] for r in rates.values()) / len(rates) >= 0.99, rates
    assert sum(r.wrong["sprite"] for r in rates.values()) / len(rates) <= 0.01, rates


@pytest.mark.skipif(not VAE_FOLDER.is_dir(), reason="the toybox's VAE is not trained yet")
def test_pastes_are_found_after_a_round_trip_through_the_vae():
    for name in ("robot", "drawing 1"):
        rates = finder_rates(SPRITE_MAKERS[name](), 8, seed=6, damage=through_vae)
        assert rates.accepted["sprite"] == 1.0 and rates.wrong["sprite"] == 0.0


def test_the_place_is_that_of_the_paste():
    canvas = draw_background(Background("dotted", "orange", 0.2))
    paste_sprite(canvas, car(), (41 * OVERSAMPLE, 24 * OVERSAMPLE), 16 * OVERSAMPLE)
    find = Finder(car()).find(canvas.reduce(OVERSAMPLE))
    assert find.found and abs(find.place.x - 41) < 0.6 and abs(find.place.y - 24) < 0.6
    assert abs(find.place.radius - 16) < 0.8


def test_colours_and_structure_are_both_demanded():
    robot = SPRITE_MAKERS["robot"]()
    finder, pasted = Finder(robot), plan(robot, 6, random.Random(3), training=False)
    for altered in (robot.rotate(180), recoloured(robot, [(40, 200, 90), (250, 250, 250)])):
        assert not any(finder.find(picture_of(altered, p)).found for p in pasted)


def test_a_sprite_of_one_colour_is_found_too():
    sprite = Image.new("RGBA", (90, 60), (200, 40, 160, 255))
    rates = finder_rates(sprite, 12, seed=8, damage=blurred)
    assert rates.accepted["sprite"] == 1.0


def test_nothing_is_found_on_an_empty_background():
    finder = Finder(face())
    for pattern in ("plain", "striped", "dotted", "gradient"):
        for colour in ("yellow", "black", "grey"):
            assert not finder.find(draw_background(Background(pattern, colour)).reduce(OVERSAMPLE)).found


@pytest.mark.parametrize("names", [("robot", "teapot"), ("rocket", "snail")])
@pytest.mark.parametrize("damage", [blurred, noisy])
def test_two_sprites_in_one_picture_are_both_found_and_one_alone_is_alone(names, damage):
    first, second = (load_sprite(SPRITES / f"{name}.png") for name in names)
    finders = Finder(first), Finder(second)
    scenes = [replace(pasted, size="small") for pasted in plan(second, 10, random.Random(4))]
    shown = {
        (True, True): [picture_of(first, pasted, second) for pasted in scenes],
        (True, False): [picture_of(first, pasted) for pasted in plan(first, 10, random.Random(5))],
        (False, True): [picture_of(second, pasted) for pasted in plan(second, 10, random.Random(6))],
    }
    for there, pictures in shown.items():
        for picture in damage(pictures):
            assert tuple(find.found for find in find_pair(finders, picture)) == there


def test_a_wrong_object_is_neither_of_two_sprites():
    robot, teapot = (SPRITE_MAKERS[name]() for name in ("robot", "teapot"))
    finders, rng = (Finder(robot), Finder(teapot)), random.Random(7)
    wrong = [*wrong_sprites(robot, 8, rng), *wrong_sprites(teapot, 8, rng)]
    for pasted, object_, other in zip(plan(robot, 16, rng), wrong, wrong[::-1], strict=True):
        for beside in (None, other):
            assert not any(find.found for find in find_pair(finders, picture_of(object_, pasted, beside)))
