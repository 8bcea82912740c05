"""Several concepts in one upload: how they may be told, whose picture is whose, and what goes into each caption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from preprocessing import captioning, text_masks
from preprocessing.concepts import Concept, named_by
from preprocessing.errors import UserError
from preprocessing.findings import examine
from preprocessing.prepare import prepare
from preprocessing.prepared import PreparedDataset
from preprocessing.settings import PrepareSettings
from trainer import commandline

ROB = {"folder": "robots", "trigger_word": "ROB", "class_word": "robot"}
TEA = {"folder": "pots", "trigger_word": "TEA", "class_word": "teapot", "weight": 3}
BOTH = {"folder": "together", "concepts": ["ROB", "TEA"], "weight": 0.5}


def settings(source: Path, **changes: Any) -> PrepareSettings:
    return PrepareSettings(**{"input_images": source, "resolution": 64, "captioner": "none"} | changes)


def put(path: Path, colour: str = "red", caption: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    """Two folders, one with captions."""
    folder = tmp_path / "upload"
    put(folder / "robots/a.png", "red", "a ROB on a lawn")
    put(folder / "robots/deep/b.png", "blue", "a lake")
    put(folder / "pots/a.png", "lime")
    return folder


def told(dataset: PreparedDataset) -> dict[str, tuple[str, int | None]]:
    return {item.source: (item.caption, item.concept) for item in dataset.items}


def test_each_folder_has_its_own_trigger(upload, tmp_path):
    dataset = prepare(settings(upload, concepts=[ROB, TEA]), 8, tmp_path / "out")
    assert told(dataset) == {
        "robots/a.png": ("a ROB on a lawn", 0),
        "robots/deep/b.png": ("ROB, a lake", 0),
        "pots/a.png": ("TEA", 1),
    }
    assert dataset.triggers == ("ROB", "TEA") and dataset.trigger_word == "ROB"
    assert [dataset.triggers_of(item) for item in dataset.items] == [("ROB",), ("ROB",), ("TEA",)]
    assert [one.weight for one in dataset.concepts] == [1, 3]
    assert PreparedDataset.load(tmp_path / "out") == dataset
    assert not [one for file in examine(dataset).files for one in file.warnings if "caption has no" in one]


def test_folders_alone_make_no_concepts(upload, tmp_path):
    dataset = prepare(settings(upload), 8, tmp_path / "out")
    assert dataset.concepts == () and {item.concept for item in dataset.items} == {None}
    assert dataset.triggers == ("TOK",) and all("TOK" in item.caption for item in dataset.items)


@pytest.mark.parametrize("around", ["", "data/"])
def test_every_folder_at_the_top_is_a_concept_if_so_asked(around, tmp_path):
    upload = tmp_path / "upload"
    put(upload / f"{around}10_ROB big robot/a.png")
    put(upload / f"{around}tea/x/b.png")
    dataset = prepare(settings(upload, concepts="folders", folder_repeats=True), 8, tmp_path / "out")
    assert dataset.concepts == (
        Concept(folder=f"{around}10_ROB big robot", trigger_word="ROB", class_word="big robot"),
        Concept(folder=f"{around}tea", trigger_word="tea"),
    )
    assert told(dataset)[f"{around}tea/x/b.png"] == ("tea", 1)
    assert [item.repeats for item in dataset.items] == [10, 1]


def test_a_folder_is_found_by_the_end_of_its_path_and_the_inner_one_wins(tmp_path):
    upload = tmp_path / "upload"
    put(upload / "data/robots/a.png")
    put(upload / "data/robots/pots/b.png")
    dataset = prepare(settings(upload, concepts=[ROB, TEA]), 8, tmp_path / "out")
    assert [one.folder for one in dataset.concepts] == ["data/robots", "data/robots/pots"]
    assert [item.concept for item in dataset.items] == [0, 1]


def test_pictures_of_both_have_both_words(upload, tmp_path):
    put(upload / "together/a.png", "white", "TEA before a ROB")
    put(upload / "together/b.png", "black", "ROB on grass")
    put(upload / "together/c.png", "grey")
    dataset = prepare(settings(upload, concepts=[ROB, TEA, BOTH]), 8, tmp_path / "out")
    assert {name: one for name, one in told(dataset).items() if name.startswith("together")} == {
        "together/a.png": ("TEA before a ROB", 2),
        "together/b.png": ("TEA, ROB on grass", 2),
        "together/c.png": ("TEA, ROB", 2),
    }
    assert dataset.triggers_of(dataset.items[-1]) == ("ROB", "TEA") and dataset.triggers == ("ROB", "TEA")


class Says:
    """A captioner that says the same of every picture."""

    def caption(self, pictures, on_progress):
        lines = ["a red robot and a blue teapot on grass"] * len(pictures)
        on_progress(lines)
        return lines


def test_what_a_captioner_calls_a_subject_becomes_its_own_word(upload, tmp_path, monkeypatch):
    from contextlib import nullcontext

    asked = []
    monkeypatch.setattr(
        captioning, "loaded_captioner", lambda chosen: asked.append(chosen.class_word) or nullcontext(Says())
    )
    put(upload / "together/a.png", "white")
    for path in upload.rglob("*.txt"):
        path.unlink()
    dataset = prepare(settings(upload, concepts=[ROB, TEA, BOTH], captioner="florence2"), 8, tmp_path / "out")
    captions = {name: caption for name, (caption, _) in told(dataset).items()}
    assert captions["robots/a.png"] == "ROB and a blue teapot on grass"
    assert captions["pots/a.png"] == "a red robot and TEA on grass"
    assert captions["together/a.png"] == "ROB and TEA on grass"
    assert asked == ["robot", "teapot", "robot"]


def test_each_has_its_own_words_for_the_mask(upload, tmp_path, monkeypatch):
    asked = []

    class Masker:
        batch_size = 8

        def __init__(self, words: str, model: str):
            asked.append(words)
            self.level = 100 + 100 * len(asked) % 201

        def masks(self, pictures):
            return [Image.new("L", picture.size, self.level) for picture in pictures]

    monkeypatch.setattr(text_masks, "TextMasker", Masker)
    put(upload / "together/a.png", "white")
    concepts = [ROB | {"mask_prompt": "toy robot"}, TEA, BOTH]
    chosen = settings(upload, concepts=concepts, mask_from="text", workers=0)
    dataset = prepare(chosen, 8, tmp_path / "out")
    assert asked == ["toy robot", "teapot", "toy robot and teapot"]
    assert all(item.mask for item in dataset.items)
    # another word for one of them finds the others' masks finished
    concepts[1] = TEA | {"mask_prompt": "pot"}
    prepare(settings(upload, concepts=concepts, mask_from="text", workers=0), 8, tmp_path / "out")
    assert asked[3:] == ["pot", "toy robot and pot"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["robots", "pots"], [named_by("robots"), named_by("pots")]),
        ([json.dumps(ROB), json.dumps(TEA)], [ROB, TEA]),
        ([json.dumps([ROB, TEA])], [ROB, TEA]),
        ([{"trigger_word": "ROB"}], [{"folder": "ROB", "trigger_word": "ROB"}]),
        ([ROB | {"n_tokens": "null"}], [ROB]),
        ([ROB | {"folder": "./a//b/"}], [ROB | {"folder": "a/b"}]),
    ],
)
def test_the_ways_to_name_concepts(given, expected):
    chosen = PrepareSettings(input_images="x", concepts=given)
    assert chosen.concepts == tuple(Concept(**one) for one in expected)
    assert PrepareSettings.model_validate(chosen.model_dump(mode="json")) == chosen


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ([ROB, TEA | {"trigger_word": "rob"}], "two have the trigger word"),
        ([ROB, TEA | {"trigger_word": "ROBE"}], "'ROB' is a part of 'ROBE'"),
        ([ROB, TEA | {"class_word": "a ROB's pot"}], "'ROB' is in the class_word of 'TEA'"),
        ([ROB, TEA | {"folder": "robots"}], "'robots' is named twice"),
        ([ROB, BOTH], "shows 'TEA', which is no trigger word"),
        ([ROB, TEA, BOTH | {"class_word": "x"}], "leave the rest out"),
        ([ROB, TEA, BOTH | {"concepts": ["ROB"]}], "name two or more"),
        ([{"folder": "x"}], "x has no trigger_word"),
        (["{no json"], "is no JSON"),
        ([ROB | {"wieght": 2}], "--concepts 1: wieght: Extra inputs"),
        ([ROB, TEA | {"weight": 0}], "--concepts 2: weight: "),
        ([ROB | {"trigger_word": "two words"}], "--concepts 1: trigger_word: "),
    ],
)
def test_concepts_that_cannot_be_told_apart_are_refused(concepts, message):
    with pytest.raises(UserError) as caught:
        commandline.check(PrepareSettings, {"input_images": "x", "concepts": concepts}, {"concepts": "--concepts"})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trigger_word": "TOK2"}, "trigger_word is given for each"),
        ({"class_word": "robot"}, "class_word is given for each"),
        ({"mode": "captions"}, "mode captions"),
        ({"source": "coco"}, "source coco"),
    ],
)
def test_settings_that_do_not_go_with_concepts(changes, message):
    with pytest.raises(UserError, match=message):
        commandline.check(PrepareSettings, {"input_images": "x", "concepts": [ROB, TEA]} | changes)


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ([ROB, TEA | {"folder": "cups"}], "no folder 'cups' of pictures: name one of pots, robots, robots/deep"),
        ([ROB], r"pots/a.png lies in no concept's folder"),
        ([TEA], r"robots/a.png and 1 more pictures lie in no concept's folder"),
    ],
)
def test_folders_that_are_not_there_and_pictures_in_none(concepts, message, upload, tmp_path):
    with pytest.raises(UserError, match=message):
        prepare(settings(upload, concepts=concepts), 8, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/x.png", "b/y.png", "z.png"], "z.png lies in no concept's folder"),
        (["a/x.png", "a/y.png"], "in no two folders"),
        (["a/x.png", "ab/y.png"], "'a' is a part of 'ab'"),
        (["a/x.png", "5_/y.png"], "5_ has no trigger_word"),
    ],
)
def test_layouts_that_make_no_concepts(names, message, tmp_path):
    for name in names:
        put(tmp_path / "upload" / name)
    with pytest.raises(UserError, match=message):
        prepare(settings(tmp_path / "upload", concepts="folders"), 8, tmp_path / "out")


def test_a_concept_without_one_sound_picture_is_told(upload, tmp_path):
    (upload / "pots/a.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="pots holds no picture that can be used"):
        prepare(settings(upload, concepts=[ROB, TEA]), 8, tmp_path / "out")


def test_masks_by_words_need_words_of_each(upload, tmp_path):
    with pytest.raises(UserError, match="of the concept in 'pots'"):
        bare = TEA | {"class_word": ""}
        prepare(settings(upload, concepts=[ROB, bare], mask_from="text"), 8, tmp_path / "out")
