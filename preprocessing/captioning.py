"""Everyone's caption: the user's own words, else a captioner's after the local rules; trigger, prefix and suffix added.

The captioner is loaded only if a picture has no caption, sees the pictures as they are trained, and is gone afterwards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from PIL import Image

from preprocessing import rules
from preprocessing.captioners import identity, loaded_captioner, subject_of
from preprocessing.captioners.base import Lines
from preprocessing.captions import UserCaption
from preprocessing.crop import WORK
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


class Said:
    """What a captioner said of a picture in this run or an earlier one: a file a picture, in its folder's `work`."""

    def __init__(self, settings: PrepareSettings, folder: Path, earlier: Sequence[Path]):
        self._ending = f"{hashlib.sha256(identity(settings).encode()).hexdigest()[:12]}.said.json"
        self._folder = folder
        # Of a captioner that says nothing there is nothing to keep.
        self._folders = () if settings.captioner == "none" else (folder, *earlier)
        self.reused = 0

    def recall(self, picture: Path) -> str | None:
        """The line about a cropped picture, which is named after its content; None where there is none."""
        for folder in self._folders:
            path = folder / WORK / f"{picture.stem}.{self._ending}"
            try:
                line = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):  # not said yet, or cut off: it is said again
                continue
            if isinstance(line, str):
                if folder != self._folder:
                    self.reused += 1
                    self.keep(picture, line)
                return line
        return None

    def keep(self, picture: Path, line: str | None) -> None:
        """Write the line down for the next run; a failure is tried again."""
        if line is not None and self._folders:
            path = self._folder / WORK / f"{picture.stem}.{self._ending}"
            path.write_text(json.dumps(line), encoding="utf-8")


def caption_all(
    pictures: Mapping[str, Path],
    user: Mapping[str, UserCaption],
    settings: PrepareSettings,
    said: Said,
    report: Progress,
) -> dict[str, Caption]:
    """The caption of every one of `pictures`, cropped pictures by their name in the upload."""
    captions = {name: _users(caption.text, settings) for name, caption in user.items() if name in pictures}
    rest = {name: path for name, path in pictures.items() if name not in captions}
    if rest:
        captions |= _captioned(rest, settings, said, report)
    return captions


def also_called(caption: Caption, settings: PrepareSettings) -> Caption:
    """A caption of one concept as that of another one too, which the picture shows as well; `settings` are its own."""
    edited = Edited(caption.trained)
    if caption.source != "user":
        edited = rules.with_identity(edited, settings)
    trained = dressed(edited.text, settings)
    return replace(
        caption, trained=trained, changes=(*caption.changes, *edited.changes, *_dressing(edited.text, trained))
    )


def _users(text: str, settings: PrepareSettings) -> Caption:
    trained = dressed(text, settings)
    return Caption(trained, text, "user", _dressing(text.strip(), trained))


def _dressing(before: str, after: str) -> tuple[str, ...]:
    return () if before == after else ("trigger, prefix or suffix added",)


def _captioned(
    pictures: Mapping[str, Path], settings: PrepareSettings, said: Said, report: Progress
) -> dict[str, Caption]:
    lines: dict[str, str | None] = {
        name: line for name, path in pictures.items() if (line := said.recall(path)) is not None
    }
    missing = [name for name in pictures if name not in lines]
    if missing:
        done = 0

        def told(batch: Lines) -> None:
            nonlocal done
            for name, line in zip(missing[done:], batch, strict=False):
                said.keep(pictures[name], line)
            done += len(batch)
            report("captions", done, len(missing))

        with loaded_captioner(settings) as captioner:
            new = captioner.caption(Opened([pictures[name] for name in missing]), told)
        lines |= zip(missing, new, strict=True)
    own = subject_of(settings)
    edited = {name: _edited(lines[name] or "", settings, own) for name in pictures}
    if settings.caption_common == "strip":
        shared = frozenset(rules.common_fragments([line.text for line in edited.values() if line.text]))
        trigger = settings.trigger_word
        edited = {name: rules.without_fragments(line, shared, trigger) for name, line in edited.items()}
    return {name: _finished(lines[name], line, settings) for name, line in edited.items()}


def _edited(line: str, settings: PrepareSettings, captioners_own: str) -> Edited:
    return rules.with_identity(rules.cleaned(line), settings, captioners_own)


def _finished(first: str | None, edited: Edited, settings: PrepareSettings) -> Caption:
    trained = dressed(edited.text, settings)
    failed = ("the captioner could not describe it",) if first is None else ()
    changes = (*failed, *edited.changes, *_dressing(edited.text, trained))
    return Caption(trained, first or None, settings.captioner, changes)
