"""Captioners see the picture, say one line each, and leave no memory behind."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BlipForConditionalGeneration

from preprocessing import captioners, models
from preprocessing.captioners import blip, identity, loaded_captioner
from preprocessing.captioners.base import Batched
from preprocessing.captioners.blip import BlipCaptioner, BlipSource
from preprocessing.captioners.florence2 import Florence2Captioner
from preprocessing.captioners.qwen_vl import QwenVlCaptioner, instruction
from preprocessing.errors import UserError
from preprocessing.settings import PrepareSettings

WORD_WITHOUT_END = 8  # "green" in the vocabulary
QUESTION = "what is in the image ?"


def settings(captioner: str, **changes: object) -> PrepareSettings:
    return PrepareSettings(input_images=Path("x"), captioner=captioner, **changes)


def squares(*colours: str) -> list[Image.Image]:
    return [Image.new("RGB", (40, 64), colour) for colour in colours]


def say(captioner: captioners.Captioner, pictures: list[Image.Image]) -> list[str | None]:
    return captioner.caption(pictures, lambda lines: None)


@pytest.fixture(params=["blip", "florence2", "qwen-vl"])
def captioner(request):
    """Each of the captioners that run here, and the colours that it was taught."""
    if request.param == "blip":
        return BlipCaptioner(BlipSource(str(request.getfixturevalue("blip_folder")))), ("blue", "red", "lime")
    if request.param == "florence2":
        return Florence2Captioner(str(request.getfixturevalue("florence_folder"))), ("red", "lime")
    return QwenVlCaptioner(QUESTION, str(request.getfixturevalue("qwen_folder"))), ("blue", "red", "lime")


WORDS = {"blue": "blue", "red": "red", "lime": "green"}


def test_it_says_what_it_sees_whatever_the_batch(captioner):
    model, colours = captioner
    pictures = squares(*colours, *colours[::-1])
    expected = [WORDS[colour] for colour in (*colours, *colours[::-1])]
    model.batch_size = 4
    told = []
    lines = model.caption(pictures, told.append)
    assert [line.split()[-2] for line in lines] == expected
    assert [line.split()[-1] for line in lines] == ["square"] * len(expected)
    assert [len(batch) for batch in told] == [4, len(pictures) - 4] if len(pictures) > 4 else [len(pictures)]
    assert [line for batch in told for line in batch] == lines
    assert [line for picture in pictures for line in say(model, [picture])] == lines


def test_pictures_of_several_sizes_go_into_one_batch(captioner):
    model, colours = captioner
    pictures = [Image.new("RGB", size, colours[0]) for size in ((20, 90), (90, 20), (32, 32))]
    assert say(model, pictures) == [line for picture in pictures for line in say(model, [picture])]


def test_a_prompt_is_gone_on_from_and_taken_off_again(blip_folder):
    lines = say(BlipCaptioner(BlipSource(str(blip_folder), "there is")), squares("blue", "red"))
    assert lines[0] == "a blue square"
    assert not any("there is" in line for line in lines)


def test_it_stops_where_the_model_knows_no_more_positions(blip_folder, tmp_path):
    stock = BlipForConditionalGeneration.from_pretrained(blip_folder, dtype=torch.float32)
    with torch.no_grad():
        stock.text_decoder.cls.predictions.bias[WORD_WITHOUT_END] = 1e4
    stock.save_pretrained(tmp_path)
    for file in blip_folder.iterdir():
        if not (tmp_path / file.name).exists():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    for prompt in ("", "there is"):
        (line,) = say(BlipCaptioner(BlipSource(str(tmp_path), prompt)), squares("red"))
        assert set(line.split()) == {"green"}


class Greedy(Batched):
    """Runs out of memory with more than `most` pictures at a time."""

    def __init__(self, most: int):
        self.most, self.batch_size, self.sizes = most, 16, []

    def say(self, pictures):
        self.sizes.append(len(pictures))
        if len(pictures) > self.most:
            raise torch.OutOfMemoryError
        return [picture.getpixel((0, 0)) for picture in pictures]


def test_where_memory_is_short_batches_become_smaller_and_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    pictures = [Image.new("L", (1, 1), value) for value in range(9)]
    model = Greedy(3)
    assert say(model, pictures) == list(range(9))
    assert model.sizes == [9, 8, 4, 2, 2, 2, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        say(Greedy(0), pictures)


def test_its_memory_is_given_back_and_the_random_state_is_not_touched(blip_folder, monkeypatch):
    state = torch.get_rng_state()
    gone_when_the_cache_is_emptied = []

    def empty_cache() -> None:
        gc.collect()
        gone_when_the_cache_is_emptied.append(weights() is None)

    monkeypatch.setattr(models, "free_memory", empty_cache)
    with loaded_captioner(settings("blip", captioner_model=str(blip_folder))) as loaded:
        say(loaded, squares("red"))
        weights = weakref.ref(next(loaded._model.parameters()))
        assert weights() is not None
        del loaded
    assert gone_when_the_cache_is_emptied == [True]
    assert torch.equal(torch.get_rng_state(), state)


def test_none_says_nothing_for_each():
    with loaded_captioner(settings("none")) as loaded:
        assert say(loaded, squares("red", "blue")) == ["", ""]


@pytest.mark.parametrize("name", ["blip", "florence2", "qwen-vl"])
def test_a_model_that_is_not_at_hand_is_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    chosen = settings(name, captioner_model=str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"empty cannot be loaded.*set captioner to none"), loaded_captioner(chosen):
        pass


def test_a_missing_toybox_captioner_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(blip, "TOYBOX", BlipSource(str(tmp_path / "gone")))
    with (
        pytest.raises(UserError, match=r"toybox captioner is missing.*set captioner to none"),
        loaded_captioner(settings("toybox")),
    ):
        pass


def test_pickled_weights_are_not_read(blip_folder, tmp_path):
    for file in blip_folder.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        BlipCaptioner(BlipSource(str(tmp_path)))


def test_identity_follows_model_weights_and_instruction(tmp_path):
    chosen = [settings(name) for name in ("none", "blip", "toybox", "lavis", "florence2", "qwen-vl")]
    chosen += [settings("blip", captioner_model="x"), settings("qwen-vl", mode="style")]
    chosen += [settings("qwen-vl", class_word="dog"), settings("qwen-vl", caption_instruction="what is this?")]
    seen = {identity(one) for one in chosen}
    for content in (b"one", b"two"):
        (tmp_path / "model.safetensors").write_bytes(content)
        seen.add(identity(settings("blip", captioner_model=str(tmp_path))))
    assert len(seen) == len(chosen) + 2
    assert identity(chosen[2]) == identity(settings("toybox", trigger_word="SKS"))


def test_what_qwen_is_asked_leaves_the_trigger_out_and_calls_the_subject_by_its_class():
    for mode in ("subject", "face", "style"):
        asked = instruction(settings("qwen-vl", mode=mode, class_word="robot", trigger_word="ZQX"))
        assert "ZQX" not in asked and "{" not in asked
        assert ("the robot" in asked) == (mode != "style")
    asked = settings("qwen-vl", caption_instruction="Is {subject} red?", class_word="robot")
    assert instruction(asked) == "Is the robot red?"


def test_choosing_a_captioner_imports_no_heavy_library(root):
    code = "import sys, preprocessing.captioning; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
