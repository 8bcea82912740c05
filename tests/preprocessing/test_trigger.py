"""The trigger word: in every caption, as a word of its own, and nothing else of the caption touched."""

import random
import string

import pytest

from preprocessing.trigger import in_place_of, trigger_pattern, with_trigger


@pytest.mark.parametrize(
    "caption",
    [
        "TOK",
        "a photo of TOK",
        "TOK, a toy",
        "a toy (TOK)",
        "TOK's toy",
        "a TOK-like toy",
        "x\nTOK\ny",
        "«TOK»",
        "TOK 中",
    ],
)
def test_a_caption_that_has_it_is_left_alone(caption):
    assert with_trigger(caption, "TOK") == caption


@pytest.mark.parametrize(
    "caption",
    ["stoking the fire", "STOKING", "TOKS", "aTOK", "TOK2", "TOK_", "_TOK", "éTOK", "tok", "Tok", "T O K", "a"],
)
def test_a_caption_that_only_looks_like_it_gets_it(caption):
    assert with_trigger(caption, "TOK") == f"TOK, {caption}"


@pytest.mark.parametrize("caption", ["", " ", "\n\t", "\ufeff".strip("\ufeff")])
def test_an_empty_caption_is_the_trigger_alone(caption):
    assert with_trigger(caption, "TOK") == "TOK"


@pytest.mark.parametrize("trigger", ["<s0>", "C++", "a.c", "(x", "[", "\\d", "$", "^", "x|y", "*", "?"])
def test_characters_that_mean_something_in_patterns_are_plain(trigger):
    assert with_trigger(f"a {trigger} here", trigger) == f"a {trigger} here"
    assert with_trigger("abc 1 xy", trigger) == f"{trigger}, abc 1 xy"
    assert with_trigger("", trigger) == trigger


def test_the_words_of_any_caption_survive_and_doing_it_twice_changes_nothing():
    rng = random.Random(0)
    for _ in range(2000):
        caption = "".join(rng.choices(string.printable + "TOK" * 20 + "éß中", k=rng.randrange(30)))
        trigger = rng.choice(("TOK", "<s>", "x", "C++", "中"))
        once = with_trigger(caption, trigger)
        assert once.endswith(caption.strip())
        assert trigger_pattern(trigger).search(once)
        assert with_trigger(once, trigger) == once


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a big sticker on the left", "a big TOK\\1 on the left"),
        ("a Sticker and a sticker", "TOK\\1 and a sticker"),
        ("an odd sticker", "an odd TOK\\1"),
        ("two stickers", "two stickers"),
        ("a red star", "a red star"),
    ],
)
def test_a_captioners_word_for_the_subject_becomes_the_trigger_once(caption, expected):
    assert in_place_of("sticker", caption, "TOK\\1") == expected
    assert in_place_of("", caption, "TOK") == caption
