"""The trigger word in captions: put there by code, because a captioner that is asked for it often leaves it out."""

from __future__ import annotations

import re


def trigger_pattern(trigger: str) -> re.Pattern[str]:
    """Matches the trigger as a word of its own, spelt exactly so.

    Not inside "stoking" (TOK), nor in another case: a caption's "man" is no trigger MAN. Neither neighbour may be a
    letter, digit or underscore; a trigger may hold or end in other characters ("<s0>", "C++").
    """
    return re.compile(rf"(?<!\w){re.escape(trigger)}(?!\w)")


def in_place_of(subject: str, caption: str, trigger: str) -> str:
    """A captioner's caption with the trigger where it calls the subject by the word `subject`, the first time.

    >>> in_place_of("sticker", "a big sticker on a table", "TOK")
    'a big TOK on a table'
    >>> in_place_of("sticker", "a sticker on a table", "TOK")
    'TOK on a table'
    """
    if not subject:
        return caption
    return re.sub(rf"\b(?:an? )?{re.escape(subject)}\b", lambda _: trigger, caption, count=1, flags=re.IGNORECASE)


def with_trigger(caption: str, trigger: str) -> str:
    """The caption, stripped, with the trigger before it unless it holds it; an empty one is the trigger alone.

    >>> with_trigger("stoking the fire", "TOK")
    'TOK, stoking the fire'
    """
    caption = caption.strip()
    if trigger_pattern(trigger).search(caption):
        return caption
    return f"{trigger}, {caption}" if caption else trigger
