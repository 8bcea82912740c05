"""Instructions as OmniGen2's data has them: {task_type, instruction, input_images, output_image}, a line a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from preprocessing.buckets import shown_size
from preprocessing.errors import UserError
from preprocessing.prepare import prepare
from preprocessing.prepared import PreparedDataset
from preprocessing.settings import PrepareSettings


def prepared(folder: Path, rows: list[dict], out: Path, stride: int = 4) -> PreparedDataset:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data.jsonl").write_text(lines, encoding="utf-8")
    settings = PrepareSettings(input_images=folder, captioner="none", trigger_word="TOK", resolution=32, workers=0)
    return prepare(settings, stride, out)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for name, size, colour in (
        ("before", (64, 64), "red"),
        ("after", (64, 64), "blue"),
        ("wide", (200, 50), "green"),
        ("alone", (40, 40), "white"),
    ):
        Image.new("RGB", size, colour).save(folder / "images" / f"{name}.png")
    return folder


def row(output: str, instruction: str, *inputs: str) -> dict:
    told = {"task_type": "edit" if inputs else "t2i", "instruction": instruction, "output_image": output}
    return told | ({"input_images": list(inputs)} if inputs else {})


def test_inputs_are_shown_beside_the_output_and_not_trained(pictures, tmp_path):
    rows = [
        # a full path of another machine, and one from the table's own folder
        row("/elsewhere/data/images/after.png", "make it blue", "/elsewhere/data/images/before.png", "images/wide.png"),
        row("images/alone.png", "a white square"),
    ]
    dataset = prepared(pictures, rows, tmp_path / "out")
    items = {Path(item.source).stem: item for item in dataset.items}
    assert items.keys() == {"after", "alone"} and items["alone"].conditions == ()
    assert "make it blue" in items["after"].caption and items["after"].caption_source == "user"
    shown = []
    for path in items["after"].conditions:
        with Image.open(dataset.folder / path) as picture:
            shown.append((picture.size, picture.convert("RGB").getpixel((2, 2))))
    assert shown == [((32, 32), (255, 0, 0)), ((64, 16), (0, 128, 0))]
    uses = {aside.source: aside.use for aside in dataset.asides}
    assert uses["images/before.png"] == "input image of images/after.png" and uses["data.jsonl"] == "captions"


def test_an_input_that_is_an_output_too_is_both(pictures, tmp_path):
    rows = [row("images/after.png", "make it blue", "images/before.png"), row("images/before.png", "a red square")]
    dataset = prepared(pictures, rows, tmp_path / "out")
    items = {Path(item.source).stem: len(item.conditions) for item in dataset.items}
    assert items["after"] == 1 and items["before"] == 0


def test_without_its_input_a_picture_is_not_trained(pictures, tmp_path):
    rows = [row("images/after.png", "make it blue", "images/nowhere.png"), row("images/alone.png", "a white square")]
    dataset = prepared(pictures, rows, tmp_path / "out")
    assert "after" not in {Path(item.source).stem for item in dataset.items}
    (told,) = [reject.reason for reject in dataset.rejects]
    assert "'images/nowhere.png' is not in the upload" in told and "images/after.png is not trained" in told


def test_another_input_makes_another_data_set(pictures, tmp_path):
    first = prepared(pictures, [row("images/after.png", "x", "images/before.png")], tmp_path / "a")
    second = prepared(pictures, [row("images/after.png", "x", "images/wide.png")], tmp_path / "b")
    assert first.dataset_hash != second.dataset_hash


def test_inputs_must_be_a_list(pictures, tmp_path):
    with pytest.raises(UserError, match="line 1: input_images must be a list"):
        prepared(pictures, [row("images/after.png", "x") | {"input_images": "before.png"}], tmp_path / "out")


@pytest.mark.parametrize(
    ("original", "expected"),
    [((64, 64), (32, 32)), ((200, 50), (64, 16)), ((30, 41), (24, 36)), ((3, 20), (4, 20)), ((20, 20), (20, 20))],
)
def test_a_shown_picture_keeps_its_shape_and_is_not_enlarged(original, expected):
    assert shown_size(original, 32, 4) == expected
