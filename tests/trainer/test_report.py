"""report.html: all of the job is in it, it fetches nothing, and nothing that a user wrote can act in it."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image, ImageChops

from preprocessing.page import duration, shown
from preprocessing.prepared import PreparedDataset, PreparedItem, Reject
from trainer import report
from trainer.artifact import Manifest
from trainer.config import JobSettings
from trainer.evaluation.summary import Evaluation, Measured, Summary

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}&amp;"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The tags, attributes and text of a page; fails where a tag is not closed in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.attributes, self.images, self.texts, self._open = [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self._open[-1] != "style":
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def decoded(address: str) -> bytes:
    head, _, content = address.partition(";base64,")
    assert head.startswith("data:image/")
    return base64.b64decode(content, validate=True)


def picture(path: Path, size: tuple[int, int] = (64, 64), colour: tuple[int, int, int] = (200, 30, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, colour)
    image.putpixel((1, 2), (0, 255, 0))
    image.save(path)
    return path


def item(folder: Path, index: int = 0, **fields) -> PreparedItem:
    name = f"images/{index:06}.png"
    picture(folder / name, colour=(index, 30, 40))
    values = {
        "image": name,
        "caption": f"TOK number {index}",
        "caption_source": "user",
        "source": f"album/{index}.jpg",
        "original_size": (640, 480),
        "resized_size": (85, 64),
        "crop": (10, 0),
        "size": (64, 64),
    }
    return PreparedItem.model_validate(values | fields)


def manifest(**fields) -> Manifest:
    values = {
        "base_model": "toybox",
        "base_hash": "base-hash",
        "family": "stable_diffusion",
        "method": "pivotal",
        "trigger_word": "TOK",
        "tokens": ["<s0>", "<s1>"],
        "class_word": "toy",
        "settings": JobSettings(input_images=Path("data.zip")).model_dump(mode="json"),
        "dataset_hash": "dataset-hash",
        "step": 40,
        "created": "2024-05-06T07:08:09+00:00",
        "scores": {"subject": 0.875},
        "libraries": {"torch": "9.8.7"},
    }
    return Manifest.model_validate(values | fields)


def data(folder: Path, **fields) -> report.ReportData:
    dataset = PreparedDataset(
        items=(item(folder, 0), item(folder, 1, mask="masks/000001.png")),
        rejects=(Reject(source="broken.png", reason="not a picture that can be read"),),
        trigger_word="TOK",
        resolution=64,
        dataset_hash="dataset-hash",
        folder=folder,
    )
    metrics = [
        {"step": step, "loss": 1 / step, "lr/unet": 1e-4, "lr/tokens": 1e-3 / step, "images_per_second": 12.5}
        for step in range(1, 41)
    ]
    base, adapted = picture(folder / "base.png", colour=(1, 1, 1)), picture(folder / "adapted.png", colour=(9, 9, 9))
    values = {
        "manifest": manifest(),
        "dataset": dataset,
        "metrics": metrics,
        "previews": [report.Preview("TOK on the moon", seed, base, adapted) for seed in (0, 5)],
        "stage_seconds": {"prepare": 1.5, "train": 98.5},
    }
    return report.ReportData(**(values | fields))


def written(folder: Path, **fields) -> Page:
    report.write_report(folder / "report.html", data(folder, **fields))
    return Page(folder / "report.html")


def test_everything_of_the_job_is_in_it(tmp_path):
    page = written(tmp_path)
    for text in (
        "TOK",
        "Before and after",
        "TOK on the moon",
        "seed 5",
        "TOK number 1",
        "album/1.jpg",
        "640×480, resized to 85×64, cut to 64×64 at (10, 0), masked",
        "broken.png",
        "not a picture that can be read",
        "0.875",
        "9.8.7",
        "<s0> <s1>",
        "dataset-hash",
        "base-hash",
        "1 min 40 s",
        "12.5",
    ):
        assert text in page.text, text
    for name, field in JobSettings.model_fields.items():
        assert name in page.texts
        assert field.description in page.text


def test_pictures_are_the_files_in_order(tmp_path):
    page = written(tmp_path)
    names = ["base.png", "adapted.png"] * 2 + ["", "images/000000.png", "images/000001.png"]
    assert len(page.images) == len(names)
    for name, image in zip(names, page.images, strict=True):
        content = decoded(image["src"])
        if name:
            with Image.open(io.BytesIO(content)) as shown, Image.open(tmp_path / name) as original:
                assert not ImageChops.difference(shown, original).getbbox(), name
        else:  # the curve
            assert ElementTree.fromstring(content).tag.endswith("svg")


def judged(folder: Path) -> report.Verdict:
    """Overfitted after step 10, one seed at two strengths, one sample near the second picture."""
    some = Measured(mean=0.25, low=0.125, high=0.375)
    curve = tuple(
        Evaluation(step=step, loss=0.5, gain=some, trigger_contrast=some, drift=some, bands=(some,) * 4)
        for step in (0, 10, 20)
    )
    summary = Summary(
        judged_by="held-out pictures",
        held_out=("album/1.jpg",),
        **{"delivered_step": 10, "best_step": 10, "last_step": 20, "planned_steps": 80},
        risen=some,
        overfitted=True,
        base_loss=1.0,
        curve=curve,
        **{"near_copies": 0.5, "diversity": 0.75, "seconds": 4.0, "share": 0.04},
    )
    one, other = picture(folder / "one.png", colour=(5, 5, 5)), picture(folder / "other.png", colour=(7, 7, 7))
    grid = {3: {"TOK on the moon": [one, other, one], "a toy on the moon": [other, one, other]}}
    return report.Verdict(summary, (0.5, 1.0), grid, [(one, 1, 0.4)])


def test_the_verdict_is_told_and_shown(tmp_path):
    page = written(tmp_path, verdict=judged(tmp_path))
    for text in (
        "How good it is",
        "The weights are those of step 10; training ended at step 20.",
        "Probably overfitted after step 10",
        "25.0 % (12.5 to 37.5 %) better than by the base model",
        "50 % of the drawn pictures look like a copy",
        "0.75 times as much",
        "4 s, 4 % of the job",
        "a toy on the moon",
        "distance 0.40, held out",
    ):
        assert text in page.text, text
    alike = Counter(image["src"] for image in page.images)
    addresses = [shown(tmp_path / name, report.PREVIEW_SIDE).address for name in ("one.png", "other.png")]
    assert [alike[one] for one in addresses] == [4, 3]  # six cells of the grid, and the sample beside its neighbour
    assert sum(image["src"].startswith("data:image/svg") for image in page.images) == 2


def test_previews_of_a_prompt_stand_together(tmp_path):
    adapted = picture(tmp_path / "adapted.png")
    previews = [report.Preview(prompt, seed, None, adapted) for seed in (0, 1) for prompt in ("one thing", "another")]
    page = written(tmp_path, previews=previews)
    shown = [text for text in page.texts if text in ("one thing", "another") or text.startswith("seed ")]
    assert shown == ["one thing", "seed 0", "seed 1", "another", "seed 0", "seed 1"]


def test_nothing_is_fetched(tmp_path):
    page = written(tmp_path)
    assert not {"script", "link", "iframe", "object", "embed", "form", "base", "a"} & set(page.tags)
    for name, value in page.attributes:
        assert name != "src" or value.startswith("data:image/")
        assert not name.startswith("on")
        assert name not in ("href", "srcset", "action")
    assert any(name == "content" and "default-src 'none'" in value for name, value in page.attributes)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text


def test_what_users_write_cannot_act(tmp_path):
    dataset = data(tmp_path).dataset
    hostile = dataset.model_copy(
        update={
            "items": (item(tmp_path, 0, caption=EVIL, source=EVIL, caption_source=EVIL),),
            "rejects": (Reject(source=EVIL, reason=EVIL),),
        }
    )
    adapted = tmp_path / "adapted.png"
    page = written(
        tmp_path,
        dataset=hostile,
        manifest=manifest(
            trigger_word=EVIL,
            class_word=EVIL,
            base_model=EVIL,
            tokens=[EVIL],
            settings={"class_word": EVIL, "unknown": [EVIL], EVIL: 1},
            scores={EVIL: 1.0},
            libraries={EVIL: EVIL},
        ),
        previews=[report.Preview(EVIL, 0, None, adapted)],
        metrics=[{"step": 1, "loss": 1.0, f"lr/{EVIL}": 1.0}, {"step": 2, "loss": 0.5, f"lr/{EVIL}": 1.0}],
        stage_seconds={EVIL: 1.0},
    )
    assert "script" not in page.tags
    assert len(page.images) == 3  # the preview, the curve, the one picture; none of EVIL's
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.images[2]["alt"] == EVIL
    assert page.texts.count(EVIL) >= 8
    assert "49" not in page.text


def test_text_that_is_no_unicode_and_control_characters(tmp_path):
    strange = item(tmp_path, 0, source="caf\udce9.png", caption="a\x00b\u202ec\u0007")
    page = written(tmp_path, dataset=data(tmp_path).dataset.model_copy(update={"items": (strange,)}))
    assert "caf\\udce9.png" in page.text


def test_a_job_that_left_nearly_nothing(tmp_path):
    empty = data(tmp_path).dataset.model_copy(update={"rejects": ()})
    bare = manifest(scores={}, libraries={}, tokens=[], class_word="", settings={})
    page = written(tmp_path, dataset=empty, manifest=bare, metrics=[], previews=[], stage_seconds={})
    assert "No step was recorded." in page.text
    for heading in ("Before and after", "Scores", "Time", "Left out"):
        assert heading not in page.text


@pytest.mark.parametrize("losses", [[0.5], [0.5, 0.5], [None, math.nan, 0.3, math.inf, 0.2], [0.0, 0.0], [1e30, 1e-30]])
def test_curves_of_few_and_strange_losses(tmp_path, recwarn, losses):
    page = written(tmp_path, metrics=[{"step": step, "loss": loss} for step, loss in enumerate(losses)])
    assert ElementTree.fromstring(decoded(page.images[4]["src"])).tag.endswith("svg")
    assert "nan" not in page.text
    assert not [str(warning.message) for warning in recwarn]


def test_only_unusable_losses_are_no_curve(tmp_path):
    page = written(tmp_path, metrics=[{"step": 1, "loss": math.nan}, {"step": 2, "loss": None}])
    assert "No step was recorded." in page.text


def test_a_long_run_makes_a_small_curve(tmp_path):
    metrics = [{"step": step, "loss": math.sin(step), "lr/unet": 1e-4} for step in range(60_000)]
    page = written(tmp_path, metrics=metrics)
    assert len(decoded(page.images[4]["src"])) < 400_000


def test_large_pictures_are_made_smaller(tmp_path):
    big = picture(tmp_path / "big.png", (2000, 1000))
    page = written(tmp_path, previews=[report.Preview("x", 0, big, big)])
    with Image.open(io.BytesIO(decoded(page.images[0]["src"]))) as shown:
        assert shown.size == (768, 384)
        assert shown.format == "JPEG"


def test_tiny_pictures_keep_their_pixels_on_screen(tmp_path):
    page = written(tmp_path, previews=[report.Preview("x", 0, None, picture(tmp_path / "big.png", (300, 300)))])
    assert "class" not in page.images[0]
    assert page.images[2]["class"] == "tiny"


def test_a_large_data_set_is_shown_in_part_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_THUMBNAILS", 3)
    dataset = data(tmp_path).dataset
    many = dataset.model_copy(update={"items": tuple(item(tmp_path, index) for index in range(5))})
    page = written(tmp_path, dataset=many, previews=[])
    assert len(page.images) == 4
    assert "The first 3 are shown" in page.text
    assert "Pictures trained on: 5" in page.text


def test_a_missing_picture_is_a_bug_and_leaves_the_old_report(tmp_path):
    written(tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(FileNotFoundError):
        written(tmp_path, previews=[report.Preview("x", 0, None, tmp_path / "absent.png")])
    assert (tmp_path / "report.html").read_bytes() == before


def test_the_same_job_gives_the_same_page(tmp_path):
    pages = []
    for _ in range(2):
        written(tmp_path)
        pages.append((tmp_path / "report.html").read_bytes())
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0417, "0.0417 s"),
        (59.94, "59.9 s"),
        (59.99, "1 min 0 s"),
        (125, "2 min 5 s"),
        (3599.9, "1 h 0 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
