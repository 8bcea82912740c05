"""Two data sets have one hash when they are the same, and only then."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocessing.crop import digest_of
from preprocessing.fingerprint import crops_hash, dataset_hash, inputs_hash
from preprocessing.prepared import PreparedItem
from preprocessing.settings import PrepareSettings


def item(folder: Path, image: str, caption: str = "TOK", mask: str | None = None, repeats: int = 1) -> PreparedItem:
    size = (8, 8)
    return PreparedItem(
        digest=digest_of(folder, image, mask),
        repeats=repeats,
        image=image,
        mask=mask,
        caption=caption,
        caption_source="user",
        source="x.png",
        original_size=size,
        resized_size=size,
        crop=(0, 0),
        size=size,
    )


def test_pixels_masks_captions_and_order_all_count(tmp_path):
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    Image.open(tmp_path / "2.png").convert("L").save(tmp_path / "mask.png")
    datasets = [
        [],
        [item(tmp_path, "0.png")],
        [item(tmp_path, "1.png")],
        [item(tmp_path, "0.png"), item(tmp_path, "1.png")],
        [item(tmp_path, "1.png"), item(tmp_path, "0.png")],
        [item(tmp_path, "0.png", "TOK, a toy")],
        [item(tmp_path, "0.png", repeats=2)],
        [item(tmp_path, "0.png", "TOK, a to"), item(tmp_path, "1.png", "y")],
        [item(tmp_path, "0.png", "TOK, a t"), item(tmp_path, "1.png", "oy")],
        [item(tmp_path, "0.png", mask="mask.png")],
        [item(tmp_path, "0.png", mask="2.png")],
    ]
    hashes = [dataset_hash(items) for items in datasets]
    assert len(set(hashes)) == len(datasets)
    assert all(len(value) == 64 for value in hashes)
    assert hashes == [dataset_hash(items) for items in datasets]


def test_no_caption_can_pose_as_a_picture(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    two = [item(tmp_path, "black.png"), item(tmp_path, "black.png", "TOK, y")]
    one = [item(tmp_path, "black.png", "TOK" + "RGB 8 8 " + "\0" * 192 + "TOK, y")]
    assert dataset_hash(two) != dataset_hash(one)


def test_how_a_picture_is_packed_does_not_count(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for level in (0, 9):
        Image.fromarray(pixels).save(tmp_path / f"{level}.png", compress_level=level)
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "9.png").read_bytes()
    assert dataset_hash([item(tmp_path, "0.png")]) == dataset_hash([item(tmp_path, "9.png")])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_inputs_settings_and_content_all_count(tmp_path, kind):
    source = tmp_path / "data"
    (source / "deep").mkdir(parents=True) if kind == "folder" else None
    content = source / "deep/x.png" if kind == "folder" else source
    content.write_bytes(b"one")
    base = {"input_images": source, "resolution": 64, "captioner": "none"}
    changes = [
        {},
        {"trigger_word": "SKS"},
        {"resolution": 128},
        {"captioner": "blip"},
        {"mask_from": "alpha"},
        {"crop": "mask"},
        {"small_pictures": "upscale"},
        {"caption_suffix": "on film"},
        {"class_word": "dog"},
        {"horizontal_flip": True},
    ]
    hashes = [inputs_hash(PrepareSettings(**base | change), 8) for change in changes]
    hashes.append(inputs_hash(PrepareSettings(**base), 16))
    content.write_bytes(b"two")
    hashes.append(inputs_hash(PrepareSettings(**base), 8))
    if kind == "folder":
        content.rename(source / "deep/y.png")
        hashes.append(inputs_hash(PrepareSettings(**base), 8))
        (source / "link.png").symlink_to(content)
        hashes.append(inputs_hash(PrepareSettings(**base), 8))
    assert not any(first == second for first, second in itertools.combinations(hashes, 2))


def test_crops_depend_on_what_makes_them_alone():
    base = PrepareSettings(input_images="x", resolution=64)
    same = [
        {"captioner": "none"},
        {"trigger_word": "SKS"},
        {"workers": 3},
        {"class_word": "dog"},
        {"input_images": "y"},
    ]
    other = [
        {"mask_from": "alpha"},
        {"mask_from": "text", "mask_prompt": "dog"},
        {"mask_from": "text", "mask_prompt": "cat"},
    ]
    other += [
        {"crop": "mask"},
        {"crop_margin": 1.0},
        {"resolution": 32},
        {"extra_resolutions": (32,)},
        {"mode": "face"},
    ]
    other += [{"bucket_ratio": 2.0}, {"small_pictures": "refuse"}, {"mask_background": 0.5}, {"upscale_model": "x"}]
    assert {crops_hash(base.model_copy(update=change), 8) for change in same} == {crops_hash(base, 8)}
    hashes = [crops_hash(base.model_copy(update=change), 8) for change in other] + [crops_hash(base, 16)]
    assert len({*hashes, crops_hash(base, 8)}) == len(hashes) + 1


def test_where_the_upload_lies_does_not_count(tmp_path):
    for name in ("a.zip", "b.zip"):
        (tmp_path / name).write_bytes(b"same")
    first, second = (
        inputs_hash(PrepareSettings(input_images=tmp_path / name, resolution=64, captioner="none"), 8)
        for name in ("a.zip", "b.zip")
    )
    assert first == second
