"""What is told of a picture: every way in which it was changed, and nothing where it was not."""

import numpy as np
import pytest
from PIL import Image
from pillow_heif import register_heif_opener

from preprocessing.crop import Place, Task, crop_one
from preprocessing.prepared import Reject

register_heif_opener()


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return Place(folder, (), "hash", (64,), 8)


def notes(place: Place, name: str, content: bytes) -> tuple[str, ...]:
    done = crop_one(Task(name, content), place)
    assert not isinstance(done.result, Reject), done.result
    return done.result.notes


def packed(tmp_path, image: Image.Image, kind: str, **options) -> bytes:
    image.save(tmp_path / "file", kind, **options)
    return (tmp_path / "file").read_bytes()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


@pytest.mark.parametrize(
    ("name", "stored", "expected"),
    [
        ("a.png", (Image.new("RGB", (64, 64)), "PNG", {}), ()),
        ("a.jpg", (Image.new("RGB", (70, 64)), "JPEG", {}), ()),
        ("a.HEIC", (Image.new("RGB", (64, 64)), "HEIF", {}), ()),
        ("a", (Image.new("RGB", (64, 64)), "WEBP", {}), ()),
        ("a.png", (Image.new("RGB", (64, 64)), "JPEG", {}), ("is JPEG although its name ends in .png",)),
        ("a.jpeg", (Image.new("RGB", (64, 64)), "JPEG", {"exif": rotated()}), ("turned upright",)),
        ("a.jpg", (Image.new("CMYK", (64, 64)), "JPEG", {}), ("CMYK made RGB",)),
        ("a.png", (Image.new("RGBA", (64, 64), (1, 2, 3, 4)), "PNG", {}), ("transparency laid on white",)),
        (
            "a.tif",
            (Image.fromarray(np.zeros((64, 64), np.uint16)), "TIFF", {}),
            ("more than 8 bits of grey scaled to 8",),
        ),
        (
            "a.gif",
            (
                Image.new("RGB", (64, 64)),
                "GIF",
                {"save_all": True, "append_images": [Image.new("RGB", (64, 64), "red")]},
            ),
            ("first of 2 frames",),
        ),
        ("a.png", (Image.new("RGB", (1000, 64)), "PNG", {}), ("74% cut away",)),
    ],
)
def test_notes(tmp_path, place, name, stored, expected):
    image, kind, options = stored
    assert notes(place, name, packed(tmp_path, image, kind, **options)) == expected


def test_work_of_an_earlier_folder_is_linked_only_if_whole_and_from_the_same_settings(tmp_path, place):
    content = packed(tmp_path, Image.effect_noise((80, 80), 50).convert("RGB"), "PNG")
    first = crop_one(Task("a.png", content), place)
    assert not first.reused

    def again(settings_hash: str = "hash", name: str = "b.png"):
        folder = tmp_path / f"next{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return crop_one(Task(name, content), Place(folder, (place.folder,), settings_hash, (64,), 8)), folder

    second, folder = again()
    assert second.reused and second.result == first.result
    with Image.open(folder / second.result.crops[0].image) as image:
        assert image.size == (64, 64)
    assert not again("other")[0].reused
    assert not again(name="a.gif")[0].reused  # of which it has to be told that it is none
    Image.new("RGB", (64, 64)).save(place.folder / first.result.crops[0].image)
    third, folder = again()
    assert not third.reused and third.result == first.result


def test_the_same_picture_under_two_names_is_one_file(place, tmp_path):
    content = packed(tmp_path, Image.new("RGB", (80, 80), "red"), "PNG")
    first, second = (crop_one(Task(name, content), place) for name in ("a.png", "b.png"))
    assert first.result == second.result and len(list((place.folder / "images").iterdir())) == 1
