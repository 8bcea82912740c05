"""Local rules for what a captioner said: empty words go, the described identity makes way for the trigger.

Nothing here touches the user's own captions. Each rule that changed a line says so in words, which are kept beside the
line as it was said (captions.jsonl).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from preprocessing.settings import PrepareSettings

# How captioners begin although the words say nothing of the picture.
_SHOWN = r"(?:image|picture|photo|photograph|drawing|illustration|scene)"
PREAMBLE = re.compile(
    rf"^(?:in (?:this|the) {_SHOWN}|(?:this|the) {_SHOWN} (?:shows|features|depicts|displays|captures|is of)"
    rf"|(?:this|it) is an? (?:close-?up )?(?:{_SHOWN}) (?:of|showing)|we (?:can )?see|there (?:is|are)"
    r"|an? (?:close-?up )?(?:photo|photograph|picture|image|shot) of)\b[\s,:]*",
    re.IGNORECASE,
)
# A small model may fall into a loop: "a red star a red star a red star".
# From the beginning of a word to the end of the last time, so that no two halves of words become one ("/0 0/").
REPETITION = re.compile(r"(?<!\S)(\w+(?: \w+){0,7}?)(?:,? (\1)\b)+", re.IGNORECASE)
SENTENCE = re.compile(r"(?<=[.!?])\s+")
ARTICLES = frozenset(("a", "an", "the", "this", "that", "one", "his", "her", "its", "their", "my", "your", "our"))
# Words that end a noun phrase when read from its noun towards its beginning.
STOPS = ARTICLES | frozenset(
    re.findall(
        r"\w+",
        """these those two three four some another each every no of in on at by to from with without and or but nor as
        is are was were be been being has have had near next under over above below behind beside between into onto
        through across around against during for about like while when where who which
        wearing holding riding standing sitting showing featuring looking""",
    )
)
LONGEST_PHRASE = 5  # words between article and noun
# What a captioner may call a person, whatever class word the user chose for them.
PEOPLE = frozenset(
    ("person", "man", "woman", "boy", "girl", "guy", "lady", "gentleman", "male", "female", "kid", "child", "human")
)
COMMON_SHARE, FEWEST_LINES = 0.8, 5


@dataclass(frozen=True)
class Edited:
    """A captioner's line after the rules, and what each of them did."""

    text: str
    changes: tuple[str, ...] = ()

    def step(self, text: str, change: str) -> Edited:
        """This line as `text`, the change noted if there is one."""
        return self if text == self.text else Edited(text, (*self.changes, change))


def cleaned(line: str) -> Edited:
    """The line without surplus white space, empty openings, repetitions and a last sentence that is cut off."""
    edited = Edited(line)
    edited = edited.step(" ".join(line.split()), "white space")
    text = edited.text
    while (shorter := PREAMBLE.sub("", text)) != text:
        text = shorter
    edited = edited.step(text, f"opening {edited.text[: len(edited.text) - len(text)].strip()!r} left out")
    edited = edited.step(REPETITION.sub(r"\2", edited.text), "repetition left out")
    edited = edited.step(_whole_sentences(edited.text), "last sentence, cut off, left out")
    return edited.step(edited.text.strip(" ,;:"), "punctuation at the ends")


def _whole_sentences(text: str) -> str:
    """Without a last sentence that has no end, where others have one; repeated sentences once."""
    sentences = list(dict.fromkeys(SENTENCE.split(text)))
    if len(sentences) > 1 and sentences[-1][-1:] not in tuple(".!?\"')"):
        sentences.pop()
    return " ".join(sentences)


def with_identity(edited: Edited, settings: PrepareSettings, captioners_own: str = "") -> Edited:
    """The first phrase that names the subject as the trigger; a mention of it that follows is left as it is.

    The noun is the class word, or a word for a person where that is one, or else the captioner's own word for what it
    has no word for: of that the adjectives stay, for they are all that is known of how the subject is shown.

    >>> settings = PrepareSettings(input_images="x", class_word="robot")
    >>> with_identity(Edited("a red robot standing on grass"), settings).text
    'TOK standing on grass'
    """
    if settings.mode == "style" or settings.caption_identity == "keep":
        return edited
    for nouns, which in ((_class_nouns(settings), settings.caption_identity), ({captioners_own} - {""}, "noun")):
        pattern = rf"\b(?:{'|'.join(map(re.escape, sorted(nouns)))})\b"
        if nouns and (noun := re.search(pattern, edited.text, re.IGNORECASE)):
            start = _phrase_start(edited.text[: noun.start()], which)
            text = edited.text[:start] + settings.trigger_word + edited.text[noun.end() :]
            return edited.step(text, f"{edited.text[start : noun.end()]!r} -> {settings.trigger_word}")
    return edited


def _class_nouns(settings: PrepareSettings) -> set[str]:
    given = {settings.class_word.lower()} - {""}
    return given | PEOPLE if settings.mode == "face" or given & PEOPLE else given


def _phrase_start(before: str, which: str) -> int:
    """Where the noun phrase begins that ends behind `before`: its article, and for "replace" its adjectives too."""
    words = [(match.group(), match.start()) for match in re.finditer(r"[\w'-]+|[^\w\s]", before)]
    if which == "noun":
        return words[-1][1] if words and words[-1][0].lower() in ARTICLES else len(before)
    start = len(before)
    for word, place in reversed(words[-LONGEST_PHRASE - 1 :]):
        if word.lower() in ARTICLES:
            return place
        if word.lower() in STOPS:  # without an article nobody knows where behind it the phrase begins
            return len(before)
        # A comma between adjectives is no end ("a small, red robot"), any other mark is.
        if not re.match(r"\w", word) and word != ",":
            return start
        start = start if word == "," else place
    # More words than a phrase has: what stands before the noun may be anything.
    return start if len(words) <= LONGEST_PHRASE else len(before)


def common_fragments(lines: Sequence[str]) -> tuple[str, ...]:
    """Fragments between commas that four in five lines share (of five lines at least): probably the identity."""
    if len(lines) < FEWEST_LINES:
        return ()
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update({fragment.strip().lower() for fragment in re.split(r"[,.;]", line)} - {""})
    return tuple(sorted(fragment for fragment, count in counts.items() if count >= COMMON_SHARE * len(lines)))


def without_fragments(edited: Edited, fragments: frozenset[str], trigger: str) -> Edited:
    """The line without those of its comma-separated fragments, save one that holds the trigger."""
    kept, gone = [], []
    for part in re.split(r"(?<=[,.;])\s*", edited.text):
        bare = part.strip(" ,.;")
        (gone if bare.lower() in fragments and trigger not in bare else kept).append(part)
    if not gone:
        return edited
    text = " ".join(part for part in kept if part).strip(" ,;")
    return edited.step(text, "shared by most captions, left out: " + "; ".join(part.strip(" ,.;") for part in gone))
