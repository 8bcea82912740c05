"""Captioners see the picture, say one tidy line each, and leave no memory behind."""

import gc
import weakref

import pytest
import torch
from PIL import Image
from transformers import BlipForConditionalGeneration

from preprocessing import captioner
from preprocessing.captioner import BlipCaptioner, BlipSource, identity, loaded_captioner, tidy
from preprocessing.errors import UserError

WORD_WITHOUT_END = 8  # "green" in the vocabulary


def squares(*colours: str) -> list[Image.Image]:
    return [Image.new("RGB", (40, 64), colour) for colour in colours]


def test_it_says_what_it_sees(blip_folder):
    lines = BlipCaptioner(BlipSource(str(blip_folder))).caption(squares("blue", "red", "lime", "red"))
    assert lines == ["a blue square", "a red square", "a green square", "a red square"]


def test_a_prompt_is_gone_on_from_and_taken_off_again(blip_folder):
    model = BlipCaptioner(BlipSource(str(blip_folder), "there is"))
    lines = model.caption(squares("blue", "red"))
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
        assert BlipCaptioner(BlipSource(str(tmp_path), prompt)).caption(squares("red")) == ["green"]


def test_a_batch_says_what_its_pictures_say_alone(blip_folder):
    model = BlipCaptioner(BlipSource(str(blip_folder)))
    pictures = squares("red", "lime", "blue")
    assert model.caption(pictures) == [line for picture in pictures for line in model.caption([picture])]


def test_its_memory_is_given_back_and_the_random_state_is_not_touched(blip_folder, monkeypatch):
    monkeypatch.setitem(captioner.SOURCES, "blip", BlipSource(str(blip_folder)))
    state = torch.get_rng_state()
    gone_when_the_cache_is_emptied = []

    def empty_cache() -> None:
        gc.collect()
        gone_when_the_cache_is_emptied.append(weights() is None)

    monkeypatch.setattr(captioner, "_free_memory", empty_cache)
    with loaded_captioner("blip") as loaded:
        loaded.caption(squares("red"))
        weights = weakref.ref(next(loaded._model.parameters()))
        assert weights() is not None
        del loaded
    assert gone_when_the_cache_is_emptied == [True]
    assert torch.equal(torch.get_rng_state(), state)


def test_none_says_nothing_for_each():
    with loaded_captioner("none") as loaded:
        assert loaded.caption(squares("red", "blue")) == ["", ""]


def test_what_is_not_at_hand_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(captioner.SOURCES, "toybox", BlipSource(str(tmp_path / "gone")))
    with (
        pytest.raises(UserError, match=r"toybox captioner is missing.*set captioner to none"),
        loaded_captioner("toybox"),
    ):
        pass
    (tmp_path / "empty").mkdir()
    monkeypatch.setitem(captioner.SOURCES, "blip", BlipSource(str(tmp_path / "empty")))
    with pytest.raises(UserError, match=r"cannot be loaded.*set captioner to none"), loaded_captioner("blip"):
        pass


def test_pickled_weights_are_not_read(blip_folder, tmp_path):
    for file in blip_folder.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        BlipCaptioner(BlipSource(str(tmp_path)))


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("  a  red\nstar ", "a red star"),
        ("the image shows a red star", "a red star"),
        ("In this image, a red star", "a red star"),
        ("there is a cat on a mat", "a cat on a mat"),
        ("A photo of a cat", "a cat"),
        ("the picture frame on a wall", "the picture frame on a wall"),
        ("thereis a cat", "thereis a cat"),
        ("a red star a red star a red star", "a red star"),
        ("a cat, a cat, a cat on a mat", "a cat on a mat"),
        ("the the the", "the"),
        ("a red star on a red ground", "a red star on a red ground"),
        ("star starfish", "star starfish"),
        ("É caffè ÀLA", "É caffè ÀLA"),
        ("", ""),
    ],
)
def test_tidy(said, kept):
    assert tidy(said) == kept
    assert tidy(f"a drawing with {said}", "a drawing with") == kept


def test_identity_follows_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(captioner, "TOYBOX_CAPTIONER", tmp_path)
    seen = {identity("none"), identity("blip"), identity("toybox")}
    for content in (b"one", b"two"):
        (tmp_path / "model.safetensors").write_bytes(content)
        seen.add(identity("toybox"))
    assert len(seen) == 5
    assert identity("toybox") == identity("toybox")
