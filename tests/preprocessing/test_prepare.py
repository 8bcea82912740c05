"""The whole stage: an upload in, a folder out that holds what its manifest says, and every file accounted for."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocessing import crop
from preprocessing.captioners import blip
from preprocessing.captioners.blip import BlipCaptioner, BlipSource
from preprocessing.errors import UserError
from preprocessing.prepare import prepare
from preprocessing.prepared import PreparedDataset
from preprocessing.settings import PrepareSettings


def settings(source: Path, **changes: object) -> PrepareSettings:
    return PrepareSettings(**{"input_images": source, "resolution": 64, "captioner": "none"} | changes)


def picture(path: Path, size: tuple[int, int] = (80, 60), colour: object = "red", mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    """A folder with something of everything."""
    folder = tmp_path / "upload"
    picture(folder / "a.png", (200, 100), "red")
    (folder / "a.txt").write_text("a stoking machine", encoding="utf-8")
    picture(folder / "deep/b.jpg", (90, 200), "blue")
    (folder / "captions.csv").write_text("caption,image_file\na TOK,b.jpg\nlost,gone.png\n", encoding="utf-8")
    picture(folder / "c.png", (30, 30), "lime")
    (folder / "broken.png").write_bytes(b"nothing")
    (folder / "notes.txt").write_bytes(b"\xff")
    picture(folder / ".hidden/d.png")
    return folder


def zipped(folder: Path, name: str = "data.zip") -> Path:
    with zipfile.ZipFile(folder.parent / name, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return folder.parent / name


def test_every_file_is_an_item_a_caption_or_a_reject(upload, tmp_path):
    folder = tmp_path / "out/prepared"
    dataset = prepare(settings(upload), 8, folder)
    assert [(item.source, item.caption, item.original_caption, item.caption_source) for item in dataset.items] == [
        ("a.png", "TOK, a stoking machine", "a stoking machine", "user"),
        ("c.png", "TOK", None, "none"),
        ("deep/b.jpg", "a TOK", "a TOK", "user"),
    ]
    assert sorted(reject.source for reject in dataset.rejects) == ["broken.png", "captions.csv line 3", "notes.txt"]
    assert [item.size for item in dataset.items] == [(88, 48), (24, 24), (40, 96)]
    assert PreparedDataset.load(folder) == dataset
    assert sorted(path.name for path in folder.iterdir()) == ["captions.jsonl", "images", "manifest.json", "work"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["prepared"]


def test_the_folder_holds_what_the_manifest_says(upload, tmp_path):
    dataset = prepare(settings(upload), 8, tmp_path / "prepared")
    for item, colour in zip(dataset.items, [(255, 0, 0), (0, 255, 0), (0, 0, 255)], strict=True):
        with Image.open(dataset.folder / item.image) as image:
            assert (image.mode, image.size) == ("RGB", item.size)
            assert image.getpixel((5, 5)) == pytest.approx(colour, abs=2)
        assert all(resized >= side for resized, side in zip(item.resized_size, item.size, strict=True))
        assert all(0 <= c <= r - s for c, r, s in zip(item.crop, item.resized_size, item.size, strict=True))
        assert item.original_size[0] / item.original_size[1] == pytest.approx(
            item.resized_size[0] / item.resized_size[1], rel=0.02
        )
    small = dataset.items[1]
    assert (small.original_size, small.resized_size) == ((30, 30), (24, 24))


def test_archive_and_folder_come_out_the_same(upload, tmp_path):
    first = prepare(settings(upload), 8, tmp_path / "one")
    second = prepare(settings(zipped(upload)), 8, tmp_path / "two")
    assert first.items == second.items
    assert first.dataset_hash == second.dataset_hash
    assert first.inputs_hash != second.inputs_hash


def test_orientation_counts_before_the_bucket_is_chosen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "data").mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "data/x.jpg", exif=exif)
    item = prepare(settings(tmp_path / "data"), 8, tmp_path / "out").items[0]
    assert item.original_size == (100, 200)
    assert item.size[0] < item.size[1]


@pytest.mark.parametrize("wanted", ["alpha", "auto"])
def test_masks_show_what_alpha_shows_through_the_same_crop(tmp_path, wanted):
    pixels = np.zeros((100, 200, 4), np.uint8)
    pixels[:, 100:] = (255, 0, 0, 255)
    (tmp_path / "data").mkdir()
    Image.fromarray(pixels).save(tmp_path / "data/cut.png")
    picture(tmp_path / "data/opaque.png", mode="RGBA")
    dataset = prepare(settings(tmp_path / "data", mask_from=wanted), 8, tmp_path / "out")
    cut, opaque = dataset.items
    assert opaque.mask is None
    with Image.open(dataset.folder / cut.image) as image:
        assert image.getpixel((10, 20)) == (255, 255, 255)
        assert image.getpixel((70, 20)) == (255, 0, 0)
    if wanted != "alpha":
        assert cut.mask is None
        return
    with Image.open(dataset.folder / cut.mask) as mask:
        assert (mask.mode, mask.size) == ("L", cut.size)
        values = np.asarray(mask)
    middle = cut.size[0] // 2
    assert values[:, : middle - 2].max() == 0
    assert values[:, middle + 2 :].min() == 255


@pytest.mark.filterwarnings("ignore")
def test_captioner_writes_for_those_that_have_none_from_the_crop(tmp_path, blip_folder, monkeypatch):
    monkeypatch.setattr(blip, "LARGE", BlipSource(str(blip_folder)))
    monkeypatch.setattr(BlipCaptioner, "batch_size", 2)
    # Red where it is cropped, blue outside: a captioner of the whole picture would say blue.
    sliver = Image.new("RGB", (1000, 40), "blue")
    sliver.paste("red", (400, 0, 600, 40))
    (tmp_path / "data").mkdir()
    sliver.save(tmp_path / "data/sliver.png")
    for colour in ("lime", "blue", "red"):
        picture(tmp_path / f"data/{colour}.png", colour=colour)
    (tmp_path / "data/red.txt").write_text("mine", encoding="utf-8")
    reports = []
    chosen = settings(tmp_path / "data", captioner="blip", class_word="square")
    dataset = prepare(chosen, 8, tmp_path / "out", lambda *report: reports.append(report))
    assert {item.source: (item.caption, item.original_caption, item.caption_source) for item in dataset.items} == {
        "blue.png": ("TOK", "there is a blue square", "blip"),
        "lime.png": ("TOK", "a green square", "blip"),
        "red.png": ("TOK, mine", "mine", "user"),
        "sliver.png": ("TOK", "a red square", "blip"),
    }
    changes = {item.source: item.caption_changes for item in dataset.items}
    assert changes["blue.png"] == ("opening 'there is' left out", "'a blue square' -> TOK")
    assert changes["red.png"] == ("trigger, prefix or suffix added",)
    assert reports[0] == ("unpack", 0, 1)
    assert [report for report in reports if report[0] == "pictures"] == [("pictures", n, 4) for n in range(1, 5)]
    assert [report for report in reports if report[0] == "captions"] == [("captions", 2, 3), ("captions", 3, 3)]


@pytest.mark.filterwarnings("ignore")
def test_the_trigger_takes_the_place_of_the_captioners_word_but_of_no_users(tmp_path, blip_folder, monkeypatch):
    monkeypatch.setattr(blip, "TOYBOX", BlipSource(str(blip_folder), subject="square"))
    picture(tmp_path / "data/own.png", colour="red")
    picture(tmp_path / "data/red.png", colour="red")
    (tmp_path / "data/own.txt").write_text("a red square", encoding="utf-8")
    items = prepare(settings(tmp_path / "data", captioner="toybox"), 8, tmp_path / "out").items
    assert [(item.caption, item.original_caption) for item in items] == [
        ("TOK, a red square", "a red square"),
        ("a red TOK", "a red square"),
    ]


@pytest.mark.filterwarnings("ignore")
def test_delivered_captions_are_taken_back_unchanged(tmp_path, blip_folder, monkeypatch):
    monkeypatch.setattr(blip, "LARGE", BlipSource(str(blip_folder)))
    for colour in ("lime", "blue", "red"):
        picture(tmp_path / f"data/deep/{colour}.png", colour=colour)
    (tmp_path / "data/deep/red.txt").write_text("mine", encoding="utf-8")
    made = {"captioner": "blip", "caption_prefix": "toy:", "class_word": "square"}
    first = prepare(settings(tmp_path / "data", **made), 8, tmp_path / "first")
    (tmp_path / "data/deep/red.txt").unlink()
    delivered = (first.folder / "captions.jsonl").read_text(encoding="utf-8")
    assert json.loads(delivered.splitlines()[0]) == {
        "file_name": "deep/blue.png",
        "text": "toy: TOK",
        "original": "there is a blue square",
        "by": "blip",
        "changes": [
            "opening 'there is' left out",
            "'a blue square' -> TOK",
            "trigger, prefix or suffix added",
        ],
    }
    (tmp_path / "data/captions.jsonl").write_text(delivered, encoding="utf-8")
    second = prepare(settings(tmp_path / "data", **made | {"captioner_model": "gone"}), 8, tmp_path / "second")
    assert [item.caption for item in second.items] == [item.caption for item in first.items]
    assert {item.caption_source for item in second.items} == {"user"}
    assert second.dataset_hash == first.dataset_hash
    assert second.rejects == ()


def test_no_captioner_is_loaded_where_every_picture_has_a_caption(tmp_path, monkeypatch):
    monkeypatch.setattr(blip, "TOYBOX", BlipSource(str(tmp_path / "gone")))
    picture(tmp_path / "data/a.png")
    (tmp_path / "data/a.txt").write_text("", encoding="utf-8")
    item = prepare(settings(tmp_path / "data", captioner="toybox"), 8, tmp_path / "out").items[0]
    assert (item.caption, item.original_caption, item.caption_source) == ("TOK", "", "user")
    picture(tmp_path / "data/b.png")
    with pytest.raises(UserError, match="toybox captioner is missing"):
        prepare(settings(tmp_path / "data", captioner="toybox"), 8, tmp_path / "out")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    decoded = []
    decode = crop.decode
    monkeypatch.setattr(crop, "decode", lambda path: (decoded.append(path), decode(path))[1])
    return decoded


def test_a_finished_folder_is_used_again_as_far_as_nothing_changed(upload, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "prepared"
    first = prepare(settings(upload), 8, folder)
    decoded = counted(monkeypatch)

    def again(**changes: object) -> int:
        """How many pictures were decoded."""
        decoded.clear()
        dataset = prepare(settings(upload, **changes), 8, folder)
        assert PreparedDataset.load(folder) == dataset
        assert len(dataset.items) == 3
        # What was linked lies in this folder and nowhere else.
        assert sorted(path.name for path in folder.parent.iterdir() if "prepared" in path.name) == ["prepared"]
        return len(decoded)

    broken = 1  # which is tried every time that the whole is not used again
    assert again() == 0
    assert "used again as it is, 3 pictures" in capsys.readouterr().err
    assert again(trigger_word="SKS") == broken
    assert "used again from an earlier run: 3 pictures" in capsys.readouterr().err
    assert again() == broken
    (upload / "a.txt").write_text("other words", encoding="utf-8")
    assert again() == broken
    picture(upload / "c.png", (31, 30), "lime")
    assert again() == broken + 1
    assert again(mask_from="alpha") == broken + 3
    assert again() == broken + 3
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["items"][0]["caption"] = "tampered"
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert again() == broken
    images = [folder / item.image for item in PreparedDataset.load(folder).items]
    picture(images[0], first.items[0].size, "black")
    assert again() == broken + 1
    images[0].unlink()
    assert again() == broken + 1
    (folder / "manifest.json").write_text("{", encoding="utf-8")
    for record in (folder / "work").glob("*.json"):
        record.write_text("{", encoding="utf-8")
    assert again() == broken + 3
    assert again() == 0


def test_an_interrupted_run_leaves_the_earlier_folder_and_what_it_finished_is_used(upload, tmp_path, monkeypatch):
    folder = tmp_path / "out/prepared"
    first = prepare(settings(upload), 8, folder)

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("pictures", 3):  # a.png, the broken one and c.png
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(settings(upload, resolution=128), 8, folder, interrupt)
    assert PreparedDataset.load(folder) == first
    assert sorted(path.name for path in folder.parent.iterdir()) == [".prepared.building", "prepared"]
    for leaving in ("replaced/images/000000.png", "building/images/stale.png"):
        picture(folder.parent / f".prepared.{leaving}")
    decoded = counted(monkeypatch)
    again = prepare(settings(upload, resolution=128), 8, folder)
    assert again.resolution == 128 and len(again.items) == 3
    assert len(decoded) == 2  # the broken one and deep/b.jpg
    assert [path.name for path in folder.parent.iterdir()] == ["prepared"]
    assert not (folder / "images/stale.png").exists()


@pytest.mark.filterwarnings("ignore")
def test_captions_of_an_interrupted_run_are_used_again(tmp_path, blip_folder, monkeypatch):
    monkeypatch.setattr(blip, "LARGE", BlipSource(str(blip_folder)))
    monkeypatch.setattr(BlipCaptioner, "batch_size", 2)
    for colour in ("lime", "blue", "red"):
        picture(tmp_path / f"data/{colour}.png", colour=colour)

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "captions":
            raise KeyboardInterrupt

    chosen = settings(tmp_path / "data", captioner="blip")
    with pytest.raises(KeyboardInterrupt):
        prepare(chosen, 8, tmp_path / "out/prepared", interrupt)
    seen = []
    say = BlipCaptioner.say
    monkeypatch.setattr(BlipCaptioner, "say", lambda self, pictures: (seen.extend(pictures), say(self, pictures))[1])
    dataset = prepare(chosen, 8, tmp_path / "out/prepared")
    assert [item.caption for item in dataset.items] == [
        "TOK, a blue square",
        "TOK, a green square",
        "TOK, a red square",
    ]
    assert len(seen) == 1
    again = prepare(settings(tmp_path / "data", captioner="blip", trigger_word="SKS"), 8, tmp_path / "out/prepared")
    assert [item.caption for item in again.items] == ["SKS, a blue square", "SKS, a green square", "SKS, a red square"]
    assert len(seen) == 1


def test_a_folder_of_something_else_is_not_replaced(upload, tmp_path):
    picture(tmp_path / "mine/keep.png")
    with pytest.raises(UserError, match="holds something else"):
        prepare(settings(upload), 8, tmp_path / "mine")
    assert (tmp_path / "mine/keep.png").exists()
    (tmp_path / "empty").mkdir()
    assert len(prepare(settings(upload), 8, tmp_path / "empty").items) == 3


def test_output_inside_the_input_is_refused(upload):
    with pytest.raises(UserError, match="lies inside input_images"):
        prepare(settings(upload), 8, upload / "out/prepared")


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        prepare(settings(folder), 8, tmp_path / "out")
    for number in range(5):
        (folder / f"{number}.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"0\.png: not a picture.*2\.png.*and 2 more") as caught:
        prepare(settings(folder), 8, tmp_path / "out")
    assert "3.png" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_is_missing_or_unsettled(tmp_path):
    with pytest.raises(UserError, match="nothing at"):
        prepare(settings(tmp_path / "none.zip"), 8, tmp_path / "out")
    picture(tmp_path / "data/a.png")
    with pytest.raises(UserError, match="resolution 64 is below 128"):
        prepare(settings(tmp_path / "data"), 128, tmp_path / "out")
    for change in ({"resolution": None}, {"captioner": "auto"}):
        with pytest.raises(ValueError, match="settles"):
            prepare(settings(tmp_path / "data", **change), 8, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hostile_archives_leave_nothing_behind(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("a.png", b"x")
        archive.writestr("../evil.png", b"x")
    with pytest.raises(UserError, match="leads out"):
        prepare(settings(tmp_path / "data.zip"), 8, tmp_path / "deep/out")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["data.zip", "deep"]
