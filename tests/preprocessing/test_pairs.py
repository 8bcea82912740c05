"""Pictures with conditions from data sets: Subjects200K's two side by side, and pairs in tables and shards."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from preprocessing import archive, pairs, sources
from preprocessing.errors import UserError
from preprocessing.limits import Limits
from preprocessing.pictures import Picture, UnreadablePicture
from preprocessing.prepare import prepare
from preprocessing.prepared import PreparedDataset
from preprocessing.settings import PrepareSettings
from trainer.config import JobSettings
from trainer.evaluation.split import split

GOOD = {"compositeStructure": 5, "objectConsistency": 5, "imageQuality": 5}


def settings(images: Path, **changes: Any) -> PrepareSettings:
    given = {"input_images": images, "resolution": 32, "captioner": "none", "workers": 0}
    return PrepareSettings(**given | changes)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """`datasets` writes nothing outside."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def plain(value: int, size: int = 40) -> Image.Image:
    return Image.new("RGB", (size, size), (value, 0, 0))


def side_by_side(left: Image.Image, right: Image.Image, shared: bool = False) -> Image.Image:
    """As the data set's: white padding of 8 pixels around each, or one that they share."""
    side = left.width
    whole = Image.new("RGB", (2 * side + (24 if shared else 32), side + 16), "white")
    whole.paste(left, (8, 8))
    whole.paste(right, (side + (16 if shared else 24), 8))
    return whole


def shades(dataset: PreparedDataset) -> list[tuple[list[int], list[int]]]:
    """The reds of each item's picture, and of its conditions: from each, all that there are."""

    def reds(path: str) -> list[int]:
        with Image.open(dataset.folder / path) as image:
            pixels = np.asarray(image)
        assert not pixels[..., 1:].any()  # no padding is left
        return sorted(set(pixels[..., 0].flatten().tolist()))

    return [(reds(item.image), [red for path in item.conditions for red in reds(path)]) for item in dataset.items]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> Path:
    """Four records of Subjects200K's columns: both paddings, a score that is low, and none."""
    import datasets

    folder = tmp_path_factory.mktemp("subjects")
    told = [{"item": "a", "description_0": f"left {n}", "description_1": f"right {n}"} for n in range(4)]
    images = [side_by_side(plain(10 * n + 1), plain(10 * n + 2), shared=n == 1) for n in range(4)]
    rows = {
        "image": [{"bytes": png(one), "path": None} for one in images],
        "collection": ["collection_2"] * 4,
        "quality_assessment": [GOOD, GOOD, GOOD | {"objectConsistency": 4}, None],
        "description": told,
    }
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(folder / "a.parquet")
    return folder


@pytest.mark.parametrize("shared", [False, True])
def test_two_side_by_side_are_parted_to_the_pixel(shared):
    noise = np.random.default_rng(0).integers(0, 256, (2, 512, 512, 3), dtype=np.uint8)
    left, right = (Image.fromarray(one) for one in noise)
    whole = side_by_side(left, right, shared)
    assert whole.size == ((1048 if shared else 1056), 528)
    for half, expected in (("left", (left, right)), ("right", (right, left))):
        own, other = pairs.parted(Picture(whole, whole.getchannel("R")), half)
        assert own.rgb.tobytes() == expected[0].tobytes() and other.tobytes() == expected[1].tobytes()
        assert own.alpha.tobytes() == expected[0].getchannel("R").tobytes()
    with pytest.raises(UnreadablePicture, match="not two square pictures"):
        pairs.parted(Picture(whole.resize((1024, 512)).crop((0, 0, 1000, 512)), None), "left")


def test_subjects200k_is_trained_in_both_directions_where_its_scores_are_high(subjects, tmp_path):
    dataset = prepare(settings(subjects), 8, tmp_path / "out")
    assert shades(dataset) == [([1], [2]), ([2], [1]), ([11], [12]), ([12], [11])]
    captions = [item.caption for item in dataset.items]
    assert captions == [f"TOK, {half} {n}" for n in (0, 1) for half in ("left", "right")]
    assert ["objectConsistency 4" in one.reason for one in dataset.rejects] == [True, False]
    assert len(dataset.rejects) == 2 and "not all 5 or more" in dataset.rejects[1].reason
    few = prepare(settings(subjects, max_pictures=3), 8, tmp_path / "few")
    assert shades(few) == [([1], [2]), ([2], [1]), ([11], [12])]
    assert prepare(settings(subjects), 8, tmp_path / "out") == dataset


def test_the_two_of_a_pair_are_held_out_together(subjects, tmp_path):
    dataset = prepare(settings(subjects), 8, tmp_path / "out")
    items = tuple(item.model_copy(update={"blur": None}) for item in dataset.items)  # no hash groups them
    for seed in range(4):
        chosen = JobSettings(input_images=subjects, holdout=1, seed=seed)
        assert split(dataset.model_copy(update={"items": items}), chosen).held_out in {(0, 1), (2, 3)}
    assert pairs.record_of("a/left") == "a" and pairs.record_of("left") == "left" and pairs.record_of("a/b") == "a/b"


@pytest.mark.parametrize("changes", [{"caption_column": "collection"}, {"condition_columns": ("collection",)}])
def test_pairs_have_their_own_captions_and_conditions(changes, subjects, tmp_path):
    with pytest.raises(UserError, match=f"{next(iter(changes))}: pairs of pictures tell"):
        prepare(settings(subjects, **changes), 8, tmp_path / "out")


def test_a_layout_that_is_not_there_or_not_wanted(subjects, tmp_path):
    whole = prepare(settings(subjects, dataset_layout="single"), 8, tmp_path / "whole")
    assert len(whole.items) == 4 and not any(item.conditions for item in whole.items)
    other = shards(tmp_path / "shards", {"a.png": png(plain(1))})
    with pytest.raises(UserError, match=r"dataset_layout pairs: .* quality_assessment"):
        prepare(settings(other, dataset_layout="pairs"), 8, tmp_path / "out")


def shards(folder: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    """A folder with one shard."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = 0 if isinstance(content, tarfile.TarInfo) else len(content)
            tar.addfile(info, None if isinstance(content, tarfile.TarInfo) else io.BytesIO(content))
    return folder


def of_prompts(count: int, conditions: int = 0) -> dict[str, bytes]:
    """text-to-image-2M's members: a jpg and a json with the prompt, and conditions beside them."""
    found: dict[str, bytes] = {}
    for n in range(count):
        found[f"{n:08d}.condition.png"] = png(plain(100 + n))
        found |= {f"{n:08d}.condition.{k}.png": png(plain(100 + 10 * k + n)) for k in range(1, conditions)}
        found = found if conditions else {k: v for k, v in found.items() if "condition" not in k}
        found |= {f"{n:08d}.jpg": png(plain(n)), f"{n:08d}.json": json.dumps({"prompt": f"picture {n}"}).encode()}
    return found


@pytest.mark.parametrize("conditions", [0, 1, 2])
def test_a_webdataset_of_prompts_with_or_without_conditions(conditions, tmp_path):
    folder = shards(tmp_path / "data", of_prompts(2, conditions))
    for images, more in ((folder, {}), (folder / "0.tar", {"source": "dataset"})):
        dataset = prepare(settings(images, **more), 8, tmp_path / f"out-{images.stem}")
        assert shades(dataset) == [([n], [100 + 10 * k + n for k in range(conditions)]) for n in range(2)]
        assert [item.caption for item in dataset.items] == ["TOK, picture 0", "TOK, picture 1"]


def test_one_shard_is_an_archive_like_others(tmp_path):
    path = shards(tmp_path / "data", of_prompts(2, 1)) / "0.tar"
    dataset = prepare(settings(path), 8, tmp_path / "out")
    assert shades(dataset) == [([n], [100 + n]) for n in range(2)]
    assert [item.original_caption for item in dataset.items] == ["picture 0", "picture 1"]


def test_conditions_in_a_table_may_be_named(tmp_path):
    import datasets

    rows = {name: [{"bytes": png(plain(n)), "path": None}] for n, name in enumerate(("image", "mine", "condition_2"))}
    table = datasets.Dataset.from_dict(rows)
    for name in rows:
        table = table.cast_column(name, datasets.Image())
    table.to_parquet(tmp_path / "a.parquet")
    assert [bool(sources.CONDITION.fullmatch(name)) for name in ("conditioning_image", "my_condition")] == [True, False]
    images = {"image_column": "image"}
    assert shades(prepare(settings(tmp_path / "a.parquet", **images), 8, tmp_path / "found")) == [([0], [2])]
    named = {"condition_columns": ("mine", "condition_2")}
    assert shades(prepare(settings(tmp_path / "a.parquet", **named), 8, tmp_path / "named")) == [([0], [1, 2])]
    with pytest.raises(UserError, match="condition_columns: the data set has the columns"):
        prepare(settings(tmp_path / "a.parquet", condition_columns=("x",)), 8, tmp_path / "none")


def test_a_table_that_names_other_files_reads_none_of_them(tmp_path):
    import datasets

    (tmp_path / "secret.png").write_bytes(png(plain(9)))
    (tmp_path / "data").mkdir()
    rows = {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "a.parquet", batch_size=1)
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "data" / "a.parquet")
    stored = table.to_pylist()[0]["image"] | {"bytes": None, "path": str(tmp_path / "secret.png")}
    pq.write_table(table.from_pylist([{"image": stored}], schema=table.schema), tmp_path / "data" / "a.parquet")
    with pytest.raises(UserError, match="no picture that can be used"):
        prepare(settings(tmp_path / "data"), 8, tmp_path / "out")


def link(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"../a.png": b"x"}, "leads out of the archive"),
        ({"/a.png": b"x"}, "absolute name"),
        ({"a.png": link("a.png")}, "a link"),
        ({"a.png": b"x", "a.json.gz": b"x"}, "packed by itself"),
        ({"a.png": b"x" * 1025}, "more than the limit"),
    ],
)
def test_shards_are_refused_before_they_are_read(members, words, tmp_path, monkeypatch):
    folder = shards(tmp_path / "data", members)
    with pytest.raises(UserError, match=words):
        archive.check_shard(folder / "0.tar", Limits(streamed_bytes=1024))
    if "limit" not in words:
        with pytest.raises(UserError, match=words):
            prepare(settings(folder), 8, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "is not JSON"), ('{"prompt": "\\ud800"}', "surrogate"), (json.dumps({"text": "x" * 20_000}), "shorten")],
)
def test_a_json_beside_a_picture_must_be_sound(content, words, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png(plain(1)))
    (tmp_path / "data" / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        prepare(settings(tmp_path / "data"), 8, tmp_path / "out")


def test_a_json_without_a_caption_is_told(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(png(plain(1)))
    (tmp_path / "data" / "a.json").write_text('{"width": 40}', encoding="utf-8")
    dataset = prepare(settings(tmp_path / "data"), 8, tmp_path / "out")
    assert [(one.source, one.use) for one in dataset.asides] == [("a.json", "beside a.png: tells no caption")]
