"""Buckets: every size lands in one, nothing is squashed, and the crop is what the numbers say."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from preprocessing.buckets import buckets, fit, is_enlarged, nearest, smaller
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
        # Sizes that the resize and the middle hit to the pixel: elsewhere the one step is the more exact of the two.
        more, times = 2 * rng.randrange(40), rng.choice((1, 2, 3))
        original = (size[0] * times, (size[1] + more) * times)
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


SIDES = st.integers(1, 20_000)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[float, float, float, float] | None]:
    """A picture's size and a box inside it, or None."""
    size = draw(SIDES), draw(SIDES)
    if draw(st.booleans()):
        return size, None
    edges = [sorted((draw(st.floats(0, side)), draw(st.floats(0, side)))) for side in size]
    return size, (edges[0][0], edges[1][0], edges[0][1], edges[1][1])


@given(boxes(), st.sampled_from(TRAINED), st.floats(0, 3), st.randoms(use_true_random=False))
def test_a_window_has_the_aspect_ratio_exactly_and_stays_in_bounds(found, trained, margin, rng):
    original, box = found
    size = rng.choice(buckets(*trained))
    fitted = fit(original, size, box, margin)
    left, top, right, bottom = fitted.window
    assert 0 <= left < right <= original[0] and 0 <= top < bottom <= original[1]
    ratio = (right - left) * size[1] / ((bottom - top) * size[0])
    assert ratio == pytest.approx(1, rel=1e-8)
    # Pillow takes the window as it is.
    if max(original) < 500:
        assert fitted.apply(Image.new("L", original)).size == size
    for offset, resized, side in zip(fitted.crop, fitted.resized, size, strict=True):
        assert 0 <= offset <= resized - side
    if box is None:
        return
    largest = fit(original, size).window
    assert right - left <= largest[2] - largest[0] + 1e-6
    # Never so small that the picture is enlarged, unless the largest window is too.
    assert right - left >= min(size[0], largest[2] - largest[0]) - 1e-6
    # The box is inside wherever a window of this ratio can hold it.
    held = (box[2] - box[0] <= right - left + 1e-6, box[3] - box[1] <= bottom - top + 1e-6)
    for fits, start, end, low, high in ((held[0], left, right, box[0], box[2]), (held[1], top, bottom, box[1], box[3])):
        if fits:
            assert start <= low + 1e-6 and high <= end + 1e-6
    if right - left < largest[2] - largest[0] - 1e-6:
        assert all(held)


def test_a_box_far_from_the_edges_comes_to_the_middle_with_its_margin():
    fitted = fit((4000, 3000), (512, 512), (1000, 1000, 1800, 1400), 0.25)
    assert fitted.window == (800, 600, 2000, 1800)
    assert (fitted.resized, fitted.crop) == ((1707, 1280), (341, 256))
    near_an_edge = fit((4000, 3000), (512, 512), (0, 2900, 100, 3000), 0.25)
    assert near_an_edge.window == (0, 3000 - 512, 512, 3000)


@pytest.mark.parametrize("ratio", [1.0, 2.0, 9.0, 16.0])
def test_how_extreme_buckets_are_is_a_setting(ratio):
    sizes = buckets(512, 32, ratio)
    widest = max(width / height for width, height in sizes)
    assert ratio / 1.35 <= widest <= ratio * 1.25
    assert (len(sizes) == 1) == (ratio == 1)


def test_the_bucket_below_for_a_small_picture_is_the_largest_that_it_fills():
    rng = random.Random(3)
    for _ in range(300):
        resolution, stride = rng.choice(TRAINED)
        original = random_size(rng)
        size = smaller(original, resolution, stride)
        for below in range(resolution - stride, 0, -stride):
            candidate = nearest(original, buckets(below, stride))
            if all(side <= whole for side, whole in zip(candidate, original, strict=True)):
                assert size == candidate
                assert not is_enlarged(fit(original, size))
                break
        else:
            assert size is None


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
