"""What is taught: a word that calls it, and all that goes with the word."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field


def trigger_pattern(*triggers: str) -> re.Pattern[str]:
    """Matches each of the triggers as a word of its own, spelt exactly so.

    Not inside "stoking" (TOK), nor in another case: a caption's "man" is no trigger MAN. Neither neighbour may be a
    letter, digit or underscore; a trigger may hold or end in other characters ("<s0>", "C++").
    """
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, triggers))})(?!\w)")


def without_triggers(caption: str, class_words: Mapping[str, str]) -> str:
    """The caption with the class word, or nothing, where a trigger was; `class_words` are by trigger.

    >>> without_triggers("a photo of TOK on a beach", {"TOK": "robot"})
    'a photo of robot on a beach'
    """
    return " ".join(trigger_pattern(*class_words).sub(lambda found: class_words[found.group()], caption).split())


class Concept(BaseModel):
    """One thing that is taught."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    trigger_word: str = Field(pattern=r"^\S+$", description="Word that calls it.")
    class_word: str = Field("", description="What it is, in one word.")
