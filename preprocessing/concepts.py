"""What is taught: a word that calls it, and all that goes with the word. Several of them may be taught in one job."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

FOLDERS, EVERY = "folders", "*"  # the setting that makes a concept of every folder, and how it stands among concepts
NUMBER = re.compile(r"\d{1,3}_")  # which a folder's name may begin with: how often its pictures count


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


def named_by(folder: str) -> dict[str, str]:
    """A concept as its folder's name tells it: the trigger word, then the class word if there is one.

    >>> named_by("10_ROB robot")
    {'folder': '10_ROB robot', 'trigger_word': 'ROB', 'class_word': 'robot'}
    """
    words = NUMBER.sub("", folder.rpartition("/")[2], count=1).split()
    return {"folder": folder, "trigger_word": "".join(words[:1]), "class_word": " ".join(words[1:])}


class Concept(BaseModel):
    """One thing that is taught, or with `concepts` a folder of pictures that show several of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    folder: str = Field("", description="Where its pictures lie in the upload; empty: in a folder called as the word.")
    trigger_word: str = Field("", pattern=r"^\S*$", description="Word that calls it.")
    class_word: str = Field("", description="What it is, in one word.")
    n_tokens: int | None = Field(None, ge=1, le=64, description="New tokens; null: the setting n_tokens.")
    weight: float = Field(1.0, gt=0, description="Its share of the training beside the others', by whatever pictures.")
    mask_prompt: str = Field("", description="What mask_from text looks for; empty: class_word.")
    concepts: tuple[str, ...] = Field((), description="In place of a trigger word those of all that the folder shows.")

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, given: Any) -> Any:
        """The name of a folder, or JSON as a flag holds it."""
        if isinstance(given, str):
            given = _read(given) if given.lstrip().startswith("{") else named_by(given)
        if isinstance(given, dict):
            given = {"folder": given.get("trigger_word", "")} | given
        return given

    @field_validator("folder")
    @classmethod
    def _is_inside(cls, value: str) -> str:
        return "/".join(part for part in value.split("/") if part not in ("", "."))

    @field_validator("class_word", "mask_prompt")
    @classmethod
    def _one_line(cls, value: str) -> str:
        return " ".join(value.split())

    @field_validator("n_tokens", mode="before")
    @classmethod
    def _null(cls, value: Any) -> Any:
        return None if value in ("null", "~", "") else value

    @model_validator(mode="after")
    def _is_one_or_several(self) -> Concept:
        if not self.concepts and not self.trigger_word:
            raise ValueError(f"concepts: {self.folder or 'one'} has no trigger_word: give it one")
        if self.concepts and (self.trigger_word or self.class_word or self.n_tokens or not self.folder):
            raise ValueError(
                "concepts: a folder that shows several concepts has a folder, their trigger words in concepts, and "
                "perhaps weight and mask_prompt: leave the rest out"
            )
        if self.concepts and (len(set(self.concepts)) < len(self.concepts) or len(self.concepts) < 2):
            raise ValueError(f"concepts: the folder {self.folder!r} shows several: name two or more, each once")
        return self

    @property
    def triggers(self) -> tuple[str, ...]:
        """The trigger words that a caption of its pictures should hold."""
        return self.concepts or (self.trigger_word,)


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"concepts: {text:.40} is no JSON ({error})") from error


def as_entries(given: Any) -> Any:
    """What `concepts` may be given as, as a list: "folders" alone or as the one entry, or a list in JSON."""
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Sequence) and len(given) == 1:
        if given[0] == FOLDERS:
            return [{"folder": EVERY, "trigger_word": EVERY}]
        if isinstance(given[0], str) and given[0].lstrip().startswith("["):
            return _read(given[0])
    return given


def check_together(concepts: Sequence[Concept]) -> None:
    """Raise ValueError where two concepts could be taken for one another, or a folder shows what is not taught."""
    taught = [one for one in concepts if not one.concepts]
    for one, other in itertools.combinations(taught, 2):
        short, long = sorted((one.trigger_word, other.trigger_word), key=len)
        if short.casefold() == long.casefold():
            raise ValueError(f"concepts: two have the trigger word {short!r}: give each its own")
        if short.casefold() in long.casefold():
            raise ValueError(f"concepts: the trigger word {short!r} is a part of {long!r}: choose another")
    for one, other in itertools.permutations(taught, 2):
        if trigger_pattern(one.trigger_word).search(other.class_word):
            raise ValueError(
                f"concepts: the trigger word {one.trigger_word!r} is in the class_word of {other.trigger_word!r}: "
                "choose another"
            )
    folders = [one.folder for one in concepts]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise ValueError(f"concepts: the folder {twice!r} is named twice: name each once")
    known = {one.trigger_word for one in taught}
    for one in concepts:
        if missing := next((word for word in one.concepts if word not in known), None):
            raise ValueError(f"concepts: the folder {one.folder!r} shows {missing!r}, which is no trigger word of any")
