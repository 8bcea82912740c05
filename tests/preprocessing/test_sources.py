"""Data sets are streamed: every picture with its caption, shards shared out between nodes, nothing unpacked."""

import io
import json
import tarfile

import pytest
from PIL import Image

from preprocessing import sources
from preprocessing.errors import UserError
from preprocessing.prepare import merge, prepare
from preprocessing.prepared import PreparedDataset
from preprocessing.settings import PrepareSettings
from preprocessing.sources import is_dataset


def settings(images, **changes) -> PrepareSettings:
    return PrepareSettings(**{"input_images": images, "resolution": 32, "captioner": "none"} | changes)


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """`datasets` writes nothing outside."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A WebDataset of four shards of three pictures, one of which is broken and one without a caption."""
    folder = tmp_path_factory.mktemp("wds")
    for shard in range(4):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for key in range(3):
                number = shard * 3 + key
                words = {} if number == 5 else {"prompt": f"picture {number}"}
                content = b"nothing" if number == 7 else png(number * 10)
                for ending, member in (("png", content), ("json", json.dumps(words | {"n": 1}).encode())):
                    info = tarfile.TarInfo(f"k{key}.{ending}")
                    info.size = len(member)
                    archive.addfile(info, io.BytesIO(member))
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    import datasets

    folder = tmp_path_factory.mktemp("parquet")
    rows = {
        "image": [{"bytes": png(n * 10), "path": f"{n}.png"} for n in range(4)],
        "prompt": ["zero", "one", None, "three"],
    }
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(folder / "a.parquet")
    return folder


def reds(dataset: PreparedDataset) -> list[int]:
    found = []
    for item in dataset.items:
        with Image.open(dataset.folder / item.image) as image:
            found.append(image.getpixel((5, 5))[0])
    return found


def test_webdataset_shards_are_streamed_with_their_captions(shards, tmp_path):
    dataset = prepare(settings(shards, workers=1), 8, tmp_path / "out")
    assert [item.source for item in dataset.items][:4] == [
        "000.tar/k0.png",
        "000.tar/k1.png",
        "000.tar/k2.png",
        "001.tar/k0.png",
    ]
    assert reds(dataset) == [n * 10 for n in range(12) if n != 7]
    assert [reject.source for reject in dataset.rejects] == ["002.tar/k1.png"]
    captions = {item.source: item.caption for item in dataset.items}
    assert captions["000.tar/k1.png"] == "TOK, picture 1" and captions["001.tar/k2.png"] == "TOK"
    assert prepare(settings(shards), 8, tmp_path / "out") == dataset
    left = {path.name for path in dataset.folder.iterdir()}
    assert left == {"captions.jsonl", "images", "manifest.json", "work"}


def test_the_shares_of_nodes_are_disjoint_and_complete_and_become_one(shards, tmp_path):
    whole = prepare(settings(shards), 8, tmp_path / "whole")
    parts = [prepare(settings(shards), 8, tmp_path / f"out/part_{rank}", None, (rank, 4)) for rank in range(4)]
    assert [len(part.items) for part in parts] == [3, 3, 2, 3]
    merged = merge(parts, tmp_path / "out")
    assert merged == PreparedDataset.load(tmp_path / "out")
    assert sorted(reds(merged)) == sorted(reds(whole))
    assert [reject.source for reject in merged.rejects] == ["part_2/002.tar/k1.png"]
    assert len((tmp_path / "out/captions.jsonl").read_text(encoding="utf-8").splitlines()) == 11
    odd = [prepare(settings(shards), 8, tmp_path / f"odd{rank}", None, (rank, 3)) for rank in range(3)]
    assert sorted(value for part in odd for value in reds(part)) == sorted(reds(whole))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_parquet(parquet, tmp_path, kind):
    dataset = prepare(settings(parquet if kind == "folder" else parquet / "a.parquet"), 8, tmp_path / "out")
    assert reds(dataset) == [0, 10, 20, 30]
    assert [item.caption for item in dataset.items] == ["TOK, zero", "TOK, one", "TOK", "TOK, three"]
    assert [item.caption_source for item in dataset.items] == ["user", "user", "none", "user"]
    few = prepare(settings(parquet, max_pictures=2), 8, tmp_path / "few")
    assert reds(few) == [0, 10]


def test_imagefolder_with_metadata(tmp_path):
    folder = tmp_path / "data/train"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number * 10))
    rows = [{"file_name": f"{number}.png", "text": f"text {number}"} for number in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    streamed = prepare(settings(tmp_path / "data", source="dataset"), 8, tmp_path / "streamed")
    plain = prepare(settings(tmp_path / "data"), 8, tmp_path / "plain")
    assert reds(streamed) == reds(plain) == [0, 10, 20]
    assert [item.caption for item in streamed.items] == [item.caption for item in plain.items]


def test_when_the_input_is_a_data_set(shards, parquet, tmp_path):
    (tmp_path / "x.png").write_bytes(png(1))
    for images in (shards, parquet, parquet / "a.parquet"):
        assert is_dataset(settings(images))
    assert not is_dataset(settings(shards, source="files")) and not is_dataset(settings(tmp_path))
    assert not is_dataset(settings(tmp_path / "gone")) and not is_dataset(settings(shards / "000.tar"))
    assert is_dataset(settings(tmp_path / "gone", source="dataset"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_column": "photo"}, "image_column: the data set has the columns image, prompt"),
        ({"caption_column": "words"}, "caption_column: the data set has the columns image, prompt, not 'words'"),
        ({"dataset_split": "test"}, "split test"),
    ],
)
def test_wrong_columns_and_splits_are_named(parquet, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        prepare(settings(parquet, **changes), 8, tmp_path / "out")


def test_a_hub_id_that_is_not_to_be_had_is_named(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="input_images nobody/nothing is neither"):
        prepare(settings("nobody/nothing", source="dataset"), 8, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_is_cut_off_ends_in_one_sentence(shards, tmp_path):
    folder = tmp_path / "cut"
    folder.mkdir()
    whole = (shards / "000.tar").read_bytes()
    (folder / "000.tar").write_bytes(whole)
    (folder / "001.tar").write_bytes(whole[:2000])
    with pytest.raises(UserError, match="cut"):
        prepare(settings(folder), 8, tmp_path / "out")


def test_local_files_that_change_change_the_identity(parquet, tmp_path):
    (tmp_path / "a.parquet").write_bytes((parquet / "a.parquet").read_bytes())
    first = sources.identity(settings(tmp_path))
    assert first == sources.identity(settings(tmp_path))
    (tmp_path / "b.parquet").write_bytes(b"x")
    assert sources.identity(settings(tmp_path)) != first
