"""The pre-flight report: a verdict on every file of the upload, and warnings about what was planted."""

import json
import re

import numpy as np
import pytest
from PIL import Image, ImageFilter
from skimage import data

from preprocessing.findings import Estimate, Read, examine
from preprocessing.preflight import write_preflight
from preprocessing.prepare import prepare
from preprocessing.settings import PrepareSettings

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Prepared from an upload with one of everything that there is to say something about."""
    folder = tmp_path_factory.mktemp("upload") / "data"
    (folder / "__MACOSX").mkdir(parents=True)
    coffee = Image.fromarray(data.coffee())
    coffee.save(folder / "coffee.png")
    coffee.resize((500, 333)).save(folder / "again.jpg", quality=60)
    Image.fromarray(data.chelsea()).filter(ImageFilter.GaussianBlur(8)).save(folder / "blurred.png")
    Image.fromarray(data.astronaut()).save(folder / "named.png", "JPEG")
    Image.fromarray(data.camera()).resize((90, 90)).save(folder / "small.png")
    Image.new("RGB", (300, 300), "red").save(folder / "red.png")
    Image.new("RGB", (300, 300), "blue").save(folder / "blue.png")
    (folder / "long.txt").write_text("x", encoding="utf-8")
    (folder / "coffee.txt").write_text("one two three four five six TOK", encoding="utf-8")
    (folder / f"{EVIL.replace('/', '')}.png").write_bytes(b"nothing")
    (folder / "__MACOSX/._coffee.png").write_bytes(b"x")
    mask = Image.new("L", (512, 512))
    mask.paste(255, (128, 128, 384, 384))
    mask.save(folder / "named.mask.png")
    settings = PrepareSettings(input_images=folder, resolution=128, captioner="none", caption_suffix=EVIL)
    return prepare(settings, 16, folder.parent / "prepared")


def reader(caption: str) -> Read:
    """Reads five words."""
    words = caption.split()
    return Read(len(words), 5, " ".join(words[5:]), "TOK" in words[:5])


def test_every_file_has_one_verdict(dataset):
    findings = examine(dataset)
    verdicts = {file.source: file.verdict for file in findings.files}
    assert len(verdicts) == len(findings.files) == findings.counts["files"] == 12
    assert verdicts == {
        "coffee.png": "used",
        "again.jpg": "used",
        "blurred.png": "used",
        "named.png": "fixed",
        "small.png": "fixed",
        "red.png": "used",
        "blue.png": "used",
        "long.txt": "rejected",
        "<script>alert(1)<script>.png": "rejected",
        "coffee.txt": "aside",
        "named.mask.png": "aside",
        "__MACOSX": "aside",
    }
    assert findings.counts["used"] + findings.counts["fixed"] == findings.counts["pictures"] == 7
    assert sum(bucket.pictures for bucket in findings.buckets) == findings.counts["crops"]
    assert next(file for file in findings.files if file.source == "named.png").done[0].startswith("is JPEG although")


def test_what_was_planted_is_warned_about_and_nothing_else(dataset):
    warnings = {file.source: file.warnings for file in examine(dataset, reader).files}
    assert re.match("looks blurred", warnings["blurred.png"][0])
    assert warnings["small.png"] == ("smaller than the trained size",)
    assert warnings["again.jpg"] == ("nearly the same picture as coffee.png",)
    assert warnings["coffee.png"][0] == "nearly the same picture as again.jpg"
    assert warnings["coffee.png"][1].startswith("caption of 8 tokens, 5 are read; cut off: 'six TOK <script>")
    assert warnings["coffee.png"][2] == "TOK lies in the part of the caption that is cut off"
    for quiet in ("named.png", "red.png", "blue.png"):
        assert warnings[quiet] == ()


def test_the_summary_counts_each_kind(dataset):
    findings = examine(dataset, reader)
    assert findings.near_duplicates == (("again.jpg", "coffee.png"),)
    text = " | ".join(findings.warnings)
    for part in ("1 of 7 pictures look blurred", "1 of 7 pictures are smaller", "1 pictures are near-duplicates"):
        assert part in text
    assert "1 of 7 captions lose the trigger word" in text
    assert "12 files" in findings.told() and "warning: 1 of 7" in findings.told()


def test_report_and_json_hold_everything_and_no_script(dataset):
    estimate = Estimate(
        steps=800,
        measured_steps=3,
        bucket=(128, 128),
        seconds_per_step=0.5,
        peak_memory_mib=2048,
        memory_of="process",
        seconds_total=420,
    )
    findings = examine(dataset, reader).model_copy(update={"estimate": estimate})
    report = write_preflight(dataset, findings)
    page = report.read_text(encoding="utf-8")
    assert json.loads((dataset.folder / "dataset.json").read_text(encoding="utf-8")) == findings.model_dump(mode="json")
    for name in ("coffee.png", "again.jpg", "long.txt", "__MACOSX", "7 min 0 s", "2.0 GiB"):
        assert name in page
    assert page.count("data:image/") == len(dataset.items) + 1  # one has a mask
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "800 steps of 0.5 s: about 7 min 0 s in all, 2048 MiB" in findings.told()


def test_the_thumbnail_is_the_exact_crop(dataset):
    import base64
    import io

    page = write_preflight(dataset, examine(dataset)).read_text(encoding="utf-8")
    first = re.search(r'<img src="data:image/png;base64,([^"]+)"', page)[1]
    with (
        Image.open(io.BytesIO(base64.b64decode(first))) as shown,
        Image.open(dataset.folder / dataset.items[0].image) as crop,
    ):
        assert np.array_equal(np.asarray(shown), np.asarray(crop))


def test_what_a_captioner_always_says_is_told(dataset):
    said = [item.model_copy(update={"original_caption": f"a photo of a cat, {n}, red hat", "caption_source": "blip"})
            for n, item in enumerate(dataset.items)]  # fmt: skip
    findings = examine(dataset.model_copy(update={"items": tuple(said)}))
    assert findings.common_fragments == ("a cat", "red hat")
    assert "share 'a cat', 'red hat'" in findings.warnings[-1]
    assert examine(dataset).common_fragments == ()
