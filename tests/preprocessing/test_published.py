"""Published data sets as they lie on disk become pictures with words and classes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from preprocessing.errors import UserError
from preprocessing.prepare import prepare
from preprocessing.published import GENERIC, open_published
from preprocessing.settings import PrepareSettings

CLASSES = ["apple", "aquarium_fish", "baby"]


def settings(root: Path, source: str, **changes: Any) -> PrepareSettings:
    given = {"input_images": root, "source": source, "mode": "captions", "captioner": "none", "resolution": 32}
    return PrepareSettings(**(given | {"workers": 0} | changes))


def read(root: Path, source: str, share: tuple[int, int] = (0, 1), **changes: Any) -> list[tuple[str, str, int | None]]:
    """Name, caption and class of each picture."""
    upload = open_published(settings(root, source, **changes), share)
    names = [task.name for task in upload.tasks]
    return [(name, upload.captions[name].text, upload.classes.get(name)) for name in names]


def picture(path: Path, colour: tuple[int, int, int] = (200, 30, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 32), colour).save(path)


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """A binary CIFAR-100 of two pictures, and its pixels beside it."""
    folder = tmp_path / "data" / "cifar-100-binary"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    records = [bytes([9, label]) + one.transpose(2, 0, 1).tobytes() for label, one in zip((1, 0), pixels, strict=True)]
    (folder / "train.bin").write_bytes(b"".join(records))
    (folder / "fine_label_names.txt").write_text("\n".join(CLASSES) + "\n")
    np.save(tmp_path / "pixels.npy", pixels)
    return folder


def test_cifar_is_read_from_folder_and_archive_alike(cifar: Path, tmp_path: Path) -> None:
    expected = [("train/00000.png", "a photo of a aquarium fish", 1), ("train/00001.png", "a photo of a apple", 0)]
    with tarfile.open(tmp_path / "cifar-100-binary.tar.gz", "w:gz") as tar:
        tar.add(cifar, "cifar-100-binary")
    for root in (cifar, cifar.parent, tmp_path / "cifar-100-binary.tar.gz", tmp_path):
        assert read(root, "cifar100") == expected
    prepared = prepare(settings(cifar, "cifar100"), 8, tmp_path / "out")
    assert [(item.caption, item.class_label) for item in prepared.items] == [one[1:] for one in expected]
    for item, pixels in zip(prepared.items, np.load(tmp_path / "pixels.npy"), strict=True):
        with Image.open(prepared.folder / item.image) as found:
            assert np.array_equal(np.asarray(found), pixels)


def test_damaged_cifar_is_told(cifar: Path, tmp_path: Path) -> None:
    with (cifar / "train.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="cut off"):
        read(cifar, "cifar100")
    (cifar / "train.bin").write_bytes(bytes([0, 77]) + bytes(3072))
    with pytest.raises(UserError, match="class 77 of 3"):
        read(cifar, "cifar100")
    with pytest.raises(UserError, match="binary version"):
        read(tmp_path, "cifar100", dataset_split="test")
    with tarfile.open(tmp_path / "python.tar.gz", "w:gz") as tar:  # the pickled version
        tar.addfile(tarfile.TarInfo("cifar-100-python/train"), io.BytesIO())
    with pytest.raises(UserError, match="binary version"):
        read(tmp_path / "python.tar.gz", "cifar100")


@pytest.mark.parametrize("source", ["imagenet", "imagenet10k"])
def test_class_folders(tmp_path: Path, source: str) -> None:
    for name in ("tree_frog/b.png", "tree_frog/a.png", "n01440764/deep/c.png"):
        picture(tmp_path / "train" / name)
    (tmp_path / "train" / "tree_frog" / "notes.txt").write_text("no picture")
    expected = [
        ("n01440764/deep/c.png", "n01440764", 0),
        ("tree_frog/a.png", "tree frog", 1),
        ("tree_frog/b.png", "tree frog", 1),
    ]
    assert read(tmp_path, source) == read(tmp_path / "train", source) == expected
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\n")
    assert read(tmp_path, source)[0] == ("n01440764/deep/c.png", "tench", 0)
    assert read(tmp_path, source, max_pictures=1) == read(tmp_path, source)[:1]
    shares = [read(tmp_path, source, (rank, 2)) for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == sorted(read(tmp_path, source)) and len(shares[0]) == 2
    with pytest.raises(UserError, match="no class folders"):
        read(tmp_path / "train" / "tree_frog", source)


def test_coco_takes_the_first_caption_or_a_generic_one(tmp_path: Path) -> None:
    for name in ("000000000009.jpg", "000000000025.jpg"):
        picture(tmp_path / "train2017" / name)
    assert [row[1] for row in read(tmp_path, "coco")] == [GENERIC, GENERIC]
    notes = [
        {"image_id": 25, "caption": " A giraffe\neating  leaves. "},
        {"image_id": 25, "caption": "Another one."},
        {"image_id": 7, "caption": "of a picture that is not there"},
    ]
    images = [{"id": 25, "file_name": "000000000025.jpg"}, {"id": 9, "file_name": "000000000009.jpg"}]
    table = tmp_path / "annotations" / "captions_train2017.json"
    table.parent.mkdir()
    table.write_text(json.dumps({"images": images, "annotations": notes}))
    expected = [
        ("train2017/000000000009.jpg", GENERIC, None),
        ("train2017/000000000025.jpg", "A giraffe eating leaves.", None),
    ]
    assert read(tmp_path, "coco") == expected
    with pytest.raises(UserError, match="val2017"):
        read(tmp_path, "coco", dataset_split="val")
    table.write_text('{"images": [{"id": 1')
    with pytest.raises(UserError, match="damaged"):
        read(tmp_path, "coco")


def test_the_toybox_is_drawn_and_always_the_same(tmp_path: Path) -> None:
    first, again = (read(tmp_path, "toybox", max_pictures=3) for _ in range(2))
    assert first == again and len(first) == 3
    assert read(tmp_path, "toybox", max_pictures=2) == first[:2]
    prepared = prepare(settings(Path("toybox"), "toybox", max_pictures=3), 8, tmp_path / "out")
    assert [item.caption for item in prepared.items] == [row[1] for row in first]
    assert {item.size for item in prepared.items} == {(32, 32)}


def test_names_of_classes_in_parquet_are_captions(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as Picture

    features = Features(
        {"img": Picture(), "fine_label": ClassLabel(names=CLASSES), "coarse_label": ClassLabel(names=["x"])}
    )
    rows = {
        "img": [Image.new("RGB", (32, 32), (i * 90, 10, 10)) for i in range(2)],
        "fine_label": [1, 0],
        "coarse_label": [0, 0],
    }
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "in" / "train.parquet")
    prepared = prepare(settings(tmp_path / "in", "dataset"), 8, tmp_path / "out")
    found = [(item.caption, item.class_label) for item in prepared.items]
    assert found == [("a photo of a aquarium fish", 1), ("a photo of a apple", 0)]
