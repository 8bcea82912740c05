"""Everyone's caption: the user's own words, else a captioner's after the local rules; trigger, prefix and suffix added.

The captioner is loaded only if a picture has no caption, sees the pictures as they are trained, and is gone afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from PIL import Image

from preprocessing import rules
from preprocessing.captioners import loaded_captioner
from preprocessing.captioners.base import Lines
from preprocessing.captions import UserCaption
from preprocessing.rules import Edited
from preprocessing.settings import PrepareSettings
from preprocessing.trigger import dressed

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Caption:
    """A picture's caption as it is trained, as it was first said, by whom ("user" or a captioner's name), and what was
    done to it.
    """

    trained: str
    original: str | None
    source: str
    changes: tuple[str, ...] = ()


class Opened(Sequence[Image.Image]):
    """Picture files as a sequence of RGB pictures, each read when it is asked for."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Opened: ...
    def __getitem__(self, index: int | slice) -> Image.Image | Opened:
        if isinstance(index, slice):
            return Opened(self._paths[index])
        with Image.open(self._paths[index]) as image:
            return image.convert("RGB")


def caption_all(
    pictures: Mapping[str, Path], user: Mapping[str, UserCaption], settings: PrepareSettings, report: Progress
) -> dict[str, Caption]:
    """The caption of every one of `pictures`, cropped pictures by their name in the upload."""
    captions = {name: _users(said.text, settings) for name, said in user.items() if name in pictures}
    rest = {name: path for name, path in pictures.items() if name not in captions}
    if rest:
        captions |= _captioned(rest, settings, report)
    return captions


def _users(text: str, settings: PrepareSettings) -> Caption:
    trained = dressed(text, settings)
    return Caption(trained, text, "user", _dressing(text.strip(), trained))


def _dressing(before: str, after: str) -> tuple[str, ...]:
    return () if before == after else ("trigger, prefix or suffix added",)


def _captioned(pictures: Mapping[str, Path], settings: PrepareSettings, report: Progress) -> dict[str, Caption]:
    said: Lines = []

    def told(lines: Lines) -> None:
        said.extend(lines)
        report("captions", len(said), len(pictures))

    with loaded_captioner(settings) as captioner:
        raw = captioner.caption(Opened(list(pictures.values())), told)
        own = captioner.subject
    edited = [_edited(line or "", settings, own) for line in raw]
    if settings.caption_common == "strip":
        shared = frozenset(rules.common_fragments([line.text for line in edited if line.text]))
        edited = [rules.without_fragments(line, shared, settings.trigger_word) for line in edited]
    return {name: _finished(first, line, settings) for name, first, line in zip(pictures, raw, edited, strict=True)}


def _edited(line: str, settings: PrepareSettings, captioners_own: str) -> Edited:
    return rules.with_identity(rules.cleaned(line), settings, captioners_own)


def _finished(first: str | None, edited: Edited, settings: PrepareSettings) -> Caption:
    trained = dressed(edited.text, settings)
    failed = ("the captioner could not describe it",) if first is None else ()
    changes = (*failed, *edited.changes, *_dressing(edited.text, trained))
    return Caption(trained, first or None, settings.captioner, changes)
