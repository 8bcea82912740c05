"""Buckets: every size lands in one, nothing is squashed, and the crop is what the numbers say."""

import itertools
import math
import random

import numpy as np
import pytest
from PIL import Image

from preprocessing.buckets import buckets, fit, nearest
from preprocessing.errors import UserError

TRAINED = [(64, 8), (256, 64), (512, 8), (512, 64), (768, 64), (1024, 64), (1024, 32)]


def random_size(rng: random.Random) -> tuple[int, int]:
    """Sizes and aspect ratios spread evenly by their logarithm, slivers of one pixel among them."""
    return round(2 ** rng.uniform(0, 13)), round(2 ** rng.uniform(0, 13))


@pytest.mark.parametrize(("resolution", "stride"), [*TRAINED, (16, 8), (100, 8), (64, 64), (100, 64), (1000, 48)])
def test_buckets_have_sides_of_the_stride_and_areas_near_the_square(resolution, stride):
    sizes = buckets(resolution, stride)
    square = max(stride, round(resolution / stride) * stride)
    assert (square, square) in sizes
    assert len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % stride == height % stride == 0
        assert min(width, height) >= stride
        assert max(width, height) <= 2 * max(resolution, square)
        assert (height, width) in sizes
        if width != height:
            assert 0.8 <= width * height / resolution**2 <= 1.25


@pytest.mark.parametrize(("resolution", "stride"), TRAINED)
def test_buckets_reach_from_tall_to_wide_without_gaps(resolution, stride):
    ratios = [width / height for width, height in buckets(resolution, stride)]
    assert ratios == sorted(ratios)
    assert ratios[0] <= 1 / 3
    assert ratios[-1] >= 3
    # A gap is what is cropped away at the worst: never half of a picture.
    assert max(b / a for a, b in itertools.pairwise(ratios)) < 2


def test_known_buckets():
    assert buckets(64, 64) == ((64, 64),)
    wide = [size for size in buckets(1024, 64) if size[0] >= size[1]]
    assert wide[0] == (1024, 1024)
    assert {(1152, 896), (1216, 832), (1344, 768), (1536, 704), (2048, 512)} <= set(wide)


def test_resolution_below_the_stride_is_refused():
    with pytest.raises(UserError, match="resolution 32 is below 64"):
        buckets(32, 64)


def test_every_size_lands_in_the_bucket_nearest_by_log_ratio():
    rng = random.Random(0)
    for _ in range(2000):
        choices = buckets(*rng.choice(TRAINED))
        size = random_size(rng)
        chosen = nearest(size, choices)
        distance = abs(math.log(chosen[0] / chosen[1] * size[1] / size[0]))
        assert all(distance <= abs(math.log(w / h * size[1] / size[0])) + 1e-12 for w, h in choices)
        # Too wide and too tall weigh the same: turning the picture turns the bucket.
        assert nearest(size[::-1], choices) == chosen[::-1] or math.isclose(*sorted((chosen[0], chosen[1])))


def test_exact_ratios_find_their_own_bucket():
    for choices in (buckets(*trained) for trained in TRAINED):
        for width, height in choices:
            assert nearest((width * 3, height * 3), choices) == (width, height)


def test_fit_covers_the_bucket_and_keeps_the_aspect_ratio():
    rng = random.Random(1)
    for _ in range(3000):
        size = rng.choice(buckets(*rng.choice(TRAINED)))
        original = random_size(rng)
        found = fit(original, size)
        scale = max(after / before for before, after in zip(original, size, strict=True))
        for before, resized, offset, after in zip(original, found.resized, found.crop, size, strict=True):
            assert abs(resized - before * scale) <= 0.5 + 1e-6
            assert resized >= after
            assert abs((resized - after) / 2 - offset) <= 0.5
            assert 0 <= offset <= resized - after
        assert any(resized == after for resized, after in zip(found.resized, size, strict=True))


def test_a_picture_of_the_size_is_left_as_it_is():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8))
    same = fit((48, 64), (48, 64))
    assert same.crop == (0, 0)
    assert np.array_equal(np.asarray(same.apply(image)), np.asarray(image))


def test_one_step_equals_resizing_and_then_cropping():
    rng = random.Random(2)
    for number in range(60):
        size = rng.choice(buckets(64, 8))
        original = (rng.randrange(20, 300), rng.randrange(20, 300))
        # Not to the ends of the range: Lanczos overshoots, and what is clipped between its two passes depends on
        # which comes first.
        pixels = np.random.default_rng(number).integers(90, 166, (original[1], original[0], 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        found = fit(original, size)
        left, top = found.crop
        slow = image.resize(found.resized, Image.Resampling.LANCZOS).crop((left, top, left + size[0], top + size[1]))
        got = found.apply(image)
        assert got.size == size
        difference = np.abs(np.asarray(got).astype(int) - np.asarray(slow))
        assert difference.max() <= 2


def test_a_circle_stays_a_circle():
    down, right = np.mgrid[0:400, 0:700]
    circle = Image.fromarray((((down - 200) ** 2 + (right - 350) ** 2 < 120**2) * 255).astype(np.uint8))
    for size in buckets(512, 64):
        found = np.asarray(fit((700, 400), size).apply(circle)) > 127
        rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
        whole = rows[0] > 0 and rows[-1] < size[1] - 1 and columns[0] > 0 and columns[-1] < size[0] - 1
        if whole:
            assert abs(len(rows) - len(columns)) <= 2
            assert abs(rows.mean() - (size[1] - 1) / 2) <= 1
            assert abs(columns.mean() - (size[0] - 1) / 2) <= 1


@pytest.mark.parametrize("original", [(1, 1), (1, 100_000), (100_000, 1), (1, 2), (3, 1)])
def test_slivers_cost_no_more_than_their_bucket(original):
    size = nearest(original, buckets(64, 8))
    got = fit(original, size).apply(Image.new("RGB", original, (10, 20, 30)))
    assert got.size == size
    assert got.getextrema() == ((10, 10), (20, 20), (30, 30))
