"""The oracle against renders whose truth is known, and against pictures that show no scene."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from toybox.calibration import VAE_FOLDER, blurred, noisy, oracle_rates, through_vae
from toybox.oracle import agreement, fit_ground, look, match_shape, nearest_position, object_centre
from toybox.palette import COLOURS
from toybox.shapes import SHAPES, shape_mask
from toybox.world import CENTRES, OVERSAMPLE, PATTERNS, RADII, SIZE, Background, Scene, draw_background, render

STAR = Scene("star", "red", "big", "left", Background("striped", "blue", 0.3))


@pytest.mark.parametrize("damage", [blurred, noisy])
def test_true_renders_are_accepted_and_wrong_ones_are_not(damage):
    rates = oracle_rates(count=200, seed=123, damage=damage)
    assert min(rates.accepted.values()) >= 0.99, rates
    assert max(rates.wrong.values()) <= 0.01, rates


@pytest.mark.skipif(not VAE_FOLDER.is_dir(), reason="the toybox's VAE is not trained yet")
def test_a_round_trip_through_the_vae_changes_no_verdict():
    rates = oracle_rates(count=24, seed=7, damage=through_vae)
    # Of 24 renders one may fail: a fine bolt of nearly the background's colour does not survive the VAE.
    assert min(rates.accepted.values()) >= 0.95, rates
    assert max(rates.wrong.values()) <= 0.05, rates


def test_every_shape_colour_and_background_is_named():
    rng = random.Random(1)
    colours = list(COLOURS)
    failures = []
    for row, shape in enumerate(SHAPES):
        for column, colour in enumerate(colours):
            ground = colours[(column + 1 + row % 11) % 12]
            background = Background(PATTERNS[(row + column) % 4], ground, rng.random())
            position = list(CENTRES)[(row + column) % 5]
            scene = Scene(shape, colour, list(RADII)[(row + column) % 3], position, background)
            if not all(agreement(look(render(scene)), scene).values()):
                failures.append(scene)
    assert len(failures) <= 1, failures  # 180 scenes: 99 %


def test_sight_of_one_scene_in_full():
    sight = look(render(STAR))
    assert (sight.shape, sight.colour, sight.size, sight.position) == ("star", "red", "big", "left")
    assert (sight.pattern, sight.ground) == ("striped", "blue")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_empty_background_has_no_object_but_is_named(pattern):
    for colour in COLOURS:
        sight = look(draw_background(Background(pattern, colour, 0.4)).reduce(OVERSAMPLE))
        assert (sight.pattern, sight.ground) == (pattern, colour)
        assert (sight.shape, sight.colour, sight.position) == (None, None, None)


def test_noise_and_a_foreign_picture_agree_with_nothing():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    sight = look(noise)
    assert (sight.pattern, sight.ground, sight.shape, sight.colour) == (None, None, None, None)
    assert not any(v for k, v in agreement(sight, STAR).items() if k != "position")


def test_an_object_of_two_colours_is_not_an_object_of_one():
    dressed = replace(STAR, accent="yellow", dress="halves")
    assert look(render(dressed)).shape is None
    assert not agreement(look(render(dressed)), STAR)["colour"]


def test_a_picture_of_another_size_is_brought_to_the_worlds():
    large = render(STAR).resize((128, 128), Image.Resampling.NEAREST)
    assert all(agreement(look(large), STAR).values())


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_matched_at_a_place_and_size_that_no_template_has(shape):
    mask = shape_mask(shape, SIZE * OVERSAMPLE, (25.3 * OVERSAMPLE, 37.6 * OVERSAMPLE), 16.2 * OVERSAMPLE)
    name, _, centre, overlap = match_shape(np.asarray(mask.reduce(OVERSAMPLE), np.float32) / 255)
    assert name == shape and overlap > 0.9
    assert np.hypot(centre[0] - 25.3, centre[1] - 37.6) < 1.5


def test_positions_between_two_of_the_worlds_have_no_name():
    assert nearest_position((20.0, 33.0)) == "left"
    assert nearest_position((32.0, 32.0)) == "centre"
    assert nearest_position((60.0, 60.0)) is None


def test_the_centre_of_the_object_is_that_of_its_box():
    pixels = np.full((SIZE, SIZE, 3), COLOURS["blue"], np.float32)
    pixels[10:31, 30:51] = COLOURS["yellow"]
    x, y = object_centre(pixels, fit_ground(pixels))
    assert abs(x - 40.5) < 1 and abs(y - 20.5) < 1
    bare = np.full_like(pixels, COLOURS["blue"])
    assert object_centre(bare, fit_ground(bare)) is None
