"""What was given -> the pictures in it, each with its mask, caption and weight, and what became of every other file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from preprocessing.archive import unpack
from preprocessing.captions import UserCaption, read_captions
from preprocessing.crop import Task
from preprocessing.prepared import Aside, Reject
from preprocessing.settings import PrepareSettings
from preprocessing.user_masks import pair_masks

REPEATED = re.compile(r"(\d{1,3})_")


@dataclass
class Upload:
    """Pictures to work on, in order, and the words beside them by the picture's name.

    `tasks` may be read once, and the rest may be filled as it is; `count` is None where the number is not known before.
    """

    tasks: Iterable[Task]
    count: int | None
    captions: dict[str, UserCaption] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)
    asides: list[Aside] = field(default_factory=list)


def open_upload(settings: PrepareSettings, into: Path) -> Upload:
    """The upload that the settings name; an archive is unpacked into the folder `into`.

    Raises UserError for whatever the user can mend.
    """
    unpacked = unpack(settings.input_images, into)
    user = read_captions(unpacked.files)
    pictures, masks, told = pair_masks(user.pictures)
    asides = [Aside(source=name, use="a hidden or system file, passed over") for name in unpacked.ignored]
    asides += [*user.asides, *(one for one in told if isinstance(one, Aside))]
    tasks = [Task(file.name, file.path, masks[file.name].path if file.name in masks else None) for file in pictures]
    by_folder = {file.name: _folder_repeats(file.name) for file in pictures} if settings.folder_repeats else {}
    return Upload(
        tasks=tasks,
        count=len(tasks),
        captions=user.captions,
        repeats=by_folder | user.repeats,
        rejects=[*unpacked.rejects, *user.rejects, *(one for one in told if isinstance(one, Reject))],
        asides=sorted(asides, key=lambda aside: aside.source),
    )


def _folder_repeats(name: str) -> int:
    """The number that the innermost folder with one begins with: 10 of `10_dog/x.png`."""
    for part in reversed(PurePosixPath(name).parts[:-1]):
        if found := REPEATED.match(part):
            return max(1, int(found[1]))
    return 1
