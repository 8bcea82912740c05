"""The local rules: empty words go, the described identity makes way for the trigger, each change is told."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from preprocessing import rules
from preprocessing.rules import Edited, cleaned, common_fragments, with_identity, without_fragments
from preprocessing.settings import PrepareSettings


def settings(class_word: str = "robot", **changes: object) -> PrepareSettings:
    return PrepareSettings(input_images="x", class_word=class_word, **changes)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("  a  red\nstar ", "a red star"),
        ("the image shows a red star", "a red star"),
        ("The image features a photo of a red star", "a red star"),
        ("In this image, a red star", "a red star"),
        ("In this image, there is a red star", "a red star"),
        ("there is a cat on a mat", "a cat on a mat"),
        ("A photo of a cat", "a cat"),
        ("a close-up photo of a cat", "a cat"),
        ("the picture frame on a wall", "the picture frame on a wall"),
        ("a photographer on a hill", "a photographer on a hill"),
        ("thereis a cat", "thereis a cat"),
        ("a red star a red star a red star", "a red star"),
        ("a cat, a cat, a cat on a mat", "a cat on a mat"),
        ("the the the", "the"),
        ("a red star on a red ground", "a red star on a red ground"),
        ("star starfish", "star starfish"),
        ("É caffè ÀLA", "É caffè ÀLA"),
        ("A cat sits. It looks at the", "A cat sits."),
        ("A cat sits. It sleeps.", "A cat sits. It sleeps."),
        ("A cat sits. A cat sits. It sleeps.", "A cat sits. It sleeps."),
        ("a cat that sits on the", "a cat that sits on the"),
        ("", ""),
    ],
)
def test_cleaning(said, kept):
    edited = cleaned(said)
    assert edited.text == kept
    assert bool(edited.changes) == (said != kept)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("a red robot standing on grass", "TOK standing on grass"),
        ("A Robot on a hill", "TOK on a hill"),
        ("red robot on a hill", "TOK on a hill"),
        ("a man riding a big, red robot", "a man riding TOK"),
        ("on grass stands robot", "on grass stands TOK"),
        ("the robot's arm", "TOK's arm"),
        ("a robot beside a robot", "TOK beside a robot"),
        ("two robots", "two robots"),
        ("robotic arm", "robotic arm"),
        ("a cat", "a cat"),
        ("", ""),
    ],
)
def test_the_phrase_of_the_class_word_becomes_the_trigger_once(said, kept):
    edited = with_identity(Edited(said), settings())
    assert edited.text == kept
    assert bool(edited.changes) == (said != kept)


def test_how_much_of_the_phrase_goes_is_a_setting():
    line = Edited("a red robot on grass")
    assert with_identity(line, settings(caption_identity="noun")).text == "a red TOK on grass"
    assert with_identity(line, settings(caption_identity="keep")) == line
    assert with_identity(line, settings(mode="style")) == line
    assert with_identity(line, settings("")) == line


@pytest.mark.parametrize(("class_word", "mode"), [("man", "subject"), ("", "face"), ("person", "face")])
def test_a_captioner_may_choose_another_word_for_a_person(class_word, mode):
    assert with_identity(Edited("an old woman with a hat"), settings(class_word, mode=mode)).text == "TOK with a hat"


def test_of_a_captioners_own_word_the_adjectives_stay():
    own = "sticker"
    for said, kept in {
        "a big sticker on the left": "a big TOK\\1 on the left",
        "a Sticker and a sticker": "TOK\\1 and a sticker",
        "two stickers": "two stickers",
        "a red star": "a red star",
    }.items():
        assert with_identity(Edited(said), settings("", trigger_word="TOK\\1"), own).text == kept
    assert with_identity(Edited("a robot and a sticker"), settings(), own).text == "TOK and a sticker"


def test_fragments_that_most_lines_share_are_found_and_left_out():
    lines = [f"a thing {n}, Red hat, blue sky." for n in range(8)] + ["a cat, red hat", "TOK, red hat"]
    assert common_fragments(lines) == ("blue sky", "red hat")
    assert common_fragments(lines[:4]) == ()
    edited = without_fragments(Edited(lines[0]), frozenset({"red hat"}), "TOK")
    assert edited.text == "a thing 0, blue sky."
    assert "Red hat" in edited.changes[0]
    untouched = Edited("a cat, TOK")
    assert without_fragments(untouched, frozenset({"tok"}), "TOK") is untouched


@given(st.text(max_size=60))
@example("/0 0/")
@example("A a, b")
def test_rules_take_any_text_and_cleaning_twice_changes_no_more_words(said):
    once = cleaned(said)
    with_identity(once, settings())
    ends = (str.strip, str.lstrip, str.rstrip)  # punctuation is taken off both ends of the line
    assert set(once.text.split()) <= set(said.split()) | {cut(word, " ,;:") for word in said.split() for cut in ends}
    assert (once.text == said) == (not once.changes)


def test_every_rule_that_changes_a_line_names_itself():
    edited = with_identity(cleaned("The image shows  a red robot. It is. It is. And then"), settings())
    assert edited.text == "TOK. It is."
    assert len(edited.changes) == 4
    assert rules.ARTICLES <= rules.STOPS
