"""Settings that do not fit together are refused, and auto means what the mode asks for."""

import pytest
from pydantic import ValidationError

from preprocessing.settings import PrepareSettings


def settings(**changes) -> PrepareSettings:
    return PrepareSettings(**{"input_images": "x"} | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "face", "horizontal_flip": True}, "horizontal_flip would teach another face"),
        ({"mask_from": "text"}, "needs mask_prompt or class_word"),
        ({"extra_resolutions": (512, 8)}, "from 16 to 4096"),
        ({"mask": "alpha"}, "Extra inputs are not permitted"),
        ({"mode": "object"}, "'subject', 'face', 'style' or 'captions'"),
        ({"crop_margin": float("nan")}, "finite"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(ValidationError, match=words):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "mask", "crops"),
    [
        ({}, "user", False),
        ({"mode": "style"}, "user", False),
        ({"mode": "face"}, "face", True),
        ({"mode": "face", "mask_from": "none", "crop": "centre"}, "none", False),
        ({"mask_from": "alpha", "crop": "mask"}, "alpha", True),
    ],
)
def test_auto_follows_the_mode(changes, mask, crops):
    assert (settings(**changes).mask_source, settings(**changes).crops_to_mask) == (mask, crops)


def test_what_a_text_mask_looks_for():
    assert settings(mask_from="text", class_word="dog").mask_words == "dog"
    assert settings(mask_from="text", class_word="dog", mask_prompt="a  tail\n").mask_words == "a tail"
    assert settings(mask_from="text", mode="face").mask_words == "face"
