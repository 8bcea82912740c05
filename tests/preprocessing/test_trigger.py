"""The trigger word: in every caption, as a word of its own, and nothing else of the caption touched."""

import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.settings import PrepareSettings
from preprocessing.trigger import dressed, trigger_pattern, with_trigger


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
    ("mode", "caption", "expected"),
    [
        ("subject", "a lake.", "TOK, a lake."),
        ("face", "smiling", "a photo of TOK, smiling"),
        ("face", "", "a photo of TOK"),
        ("style", "a lake.", "a lake, in the style of TOK"),
        ("style", "...", "..., in the style of TOK"),
        ("style", "", "in the style of TOK"),
        ("style", "TOK drawing", "TOK drawing"),
    ],
)
def test_each_mode_puts_the_trigger_where_prompts_will(mode, caption, expected):
    assert with_trigger(caption, "TOK", mode) == expected


@pytest.mark.parametrize(
    ("caption", "prefix", "suffix", "expected"),
    [
        ("a cat", "a photo of", "", "a photo of TOK, a cat"),
        ("a cat", "a photo of TOK,", "", "a photo of TOK, a cat"),
        ("TOK and a cat", "", ", film grain", "TOK and a cat, film grain"),
        ("TOK and a cat", "", "on film", "TOK and a cat on film"),
        ("a cat, film grain", "", ", film grain", "TOK, a cat, film grain"),
        ("photo of TOK", "photo", "", "photo of TOK"),
        ("", "photo of", "on film", "photo of TOK on film"),
    ],
)
def test_prefix_and_suffix_are_added_where_they_are_missing(caption, prefix, suffix, expected):
    settings = PrepareSettings(input_images="x", caption_prefix=prefix, caption_suffix=suffix)
    assert dressed(caption, settings) == expected


WORDS = st.text(st.sampled_from("TOK a,.:-\n"), max_size=12)


@given(WORDS, WORDS, WORDS, st.sampled_from(("subject", "face", "style")), st.sampled_from(("TOK", "<s0>", "a", "C++")))
def test_a_caption_that_was_delivered_is_taken_back_unchanged(caption, prefix, suffix, mode, trigger):
    settings = PrepareSettings(
        input_images="x", caption_prefix=prefix, caption_suffix=suffix, mode=mode, trigger_word=trigger
    )
    once = dressed(caption, settings)
    assert dressed(once, settings) == once
    assert trigger_pattern(trigger).search(once)
    assert once.startswith(settings.caption_prefix) and once.endswith(settings.caption_suffix)
