"""Blur and near-duplicates, on real photographs."""

import io
import random

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter
from skimage import data
from sklearn.datasets import load_sample_images

from preprocessing.quality import BLURRED, NEAR, blur, near_duplicates, perceptual_hash


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    found = [
        data.astronaut(),
        data.camera(),
        data.chelsea(),
        data.coffee(),
        data.rocket(),
        *load_sample_images().images,
    ]
    return [Image.fromarray(pixels).convert("RGB") for pixels in found]


def recompressed(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=40)
    return Image.open(file).convert("RGB")


CHANGES = {
    "smaller": lambda picture: picture.resize((picture.width // 3, picture.height // 3)),
    "recompressed": recompressed,
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.15),
    "blurred": lambda picture: picture.filter(ImageFilter.GaussianBlur(2)),
    "grey": lambda picture: picture.convert("L"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_photograph_keeps_its_hash_nearly_and_others_are_far(photographs, change):
    hashes = [perceptual_hash(picture) for picture in photographs]
    changed = [perceptual_hash(CHANGES[change](picture)) for picture in photographs]
    for i, first in enumerate(hashes):
        for j, second in enumerate(changed):
            assert (((first ^ second).bit_count()) <= NEAR) == (i == j)


def test_photographs_are_sharp_and_the_blurred_are_not(photographs):
    for picture in photographs:
        picture.thumbnail((512, 512))
        measured = [blur(picture.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 2, 4, 8)]
        assert measured == sorted(measured)
        assert measured[0] < BLURRED < measured[2]
        assert measured[0] >= 0 and measured[-1] <= 1


def test_drawings_are_sharp_and_one_colour_cannot_be_told():
    drawing = Image.new("RGB", (64, 64), "white")
    drawing.paste("red", (20, 20, 40, 40))
    assert blur(drawing) < 0.4
    assert blur(Image.new("RGB", (64, 64), "red")) is None
    assert blur(Image.new("RGB", (64, 4))) is None


def test_groups_of_near_duplicates_are_those_of_pairwise_comparison():
    rng = random.Random(0)
    hashes = [rng.getrandbits(64) for _ in range(1500)]
    for index in range(0, 1500, 9):
        for bit in rng.sample(range(64), rng.choice((0, 3, NEAR, NEAR + 1, 12))):
            hashes[index] ^= hashes[index] ^ (hashes[(index + 700) % 1500] ^ (1 << bit))
    groups = near_duplicates(hashes)
    together = {frozenset((a, b)) for group in groups for a in group for b in group if a != b}
    values = np.array(hashes, dtype=np.uint64)
    for index, value in enumerate(hashes):
        near = np.flatnonzero(np.bitwise_count(values ^ np.uint64(value)) <= NEAR)
        assert all(frozenset((index, int(other))) in together for other in near if other != index)
    assert all(len(group) > 1 and group == sorted(group) for group in groups)
    assert near_duplicates([]) == [] and near_duplicates([5]) == [] and near_duplicates([5, 5]) == [[0, 1]]
