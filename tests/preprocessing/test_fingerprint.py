"""Two data sets have one hash when they are the same, and only then."""

import itertools

import numpy as np
import pytest
from PIL import Image

from preprocessing.fingerprint import dataset_hash, inputs_hash
from preprocessing.prepared import PreparedItem
from preprocessing.settings import PrepareSettings


def item(image: str, caption: str = "TOK", mask: str | None = None) -> PreparedItem:
    size = (8, 8)
    return PreparedItem(
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
        [item("0.png")],
        [item("1.png")],
        [item("0.png"), item("1.png")],
        [item("1.png"), item("0.png")],
        [item("0.png", "TOK, a toy")],
        [item("0.png", "TOK, a to"), item("1.png", "y")],
        [item("0.png", "TOK, a t"), item("1.png", "oy")],
        [item("0.png", mask="mask.png")],
        [item("0.png", mask="2.png")],
    ]
    hashes = [dataset_hash(items, tmp_path) for items in datasets]
    assert len(set(hashes)) == len(datasets)
    assert all(len(value) == 64 for value in hashes)
    assert hashes == [dataset_hash(items, tmp_path) for items in datasets]


def test_no_caption_can_pose_as_a_picture(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    two = [item("black.png"), item("black.png", "TOK, y")]
    one = [item("black.png", "TOK" + "RGB 8 8 " + "\0" * 192 + "TOK, y")]
    assert dataset_hash(two, tmp_path) != dataset_hash(one, tmp_path)


def test_how_a_picture_is_packed_does_not_count(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for level in (0, 9):
        Image.fromarray(pixels).save(tmp_path / f"{level}.png", compress_level=level)
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "9.png").read_bytes()
    assert dataset_hash([item("0.png")], tmp_path) == dataset_hash([item("9.png")], tmp_path)


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
        {"mask_from_alpha": True},
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


def test_where_the_upload_lies_does_not_count(tmp_path):
    for name in ("a.zip", "b.zip"):
        (tmp_path / name).write_bytes(b"same")
    first, second = (
        inputs_hash(PrepareSettings(input_images=tmp_path / name, resolution=64, captioner="none"), 8)
        for name in ("a.zip", "b.zip")
    )
    assert first == second
