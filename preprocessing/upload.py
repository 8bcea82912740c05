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
from preprocessing.user_conditions import pair_conditions
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
    others, conditions, told_of_conditions = pair_conditions(user.pictures)
    pictures, masks, told = pair_masks(others)
    told = (*told_of_conditions, *told)
    places = {file.name: file.path for file in pictures}
    # what a caption only speaks of is not drawn
    spoken_of = {name: picture for picture, names in user.shown.items() for name in names if name not in user.captions}
    pictures = tuple(file for file in pictures if file.name not in spoken_of and file.name not in user.unusable)
    asides = [Aside(source=name, use="a hidden or system file, passed over") for name in unpacked.ignored]
    asides += [Aside(source=name, use=f"input image of {picture}") for name, picture in spoken_of.items()]
    asides += [*user.asides, *(one for one in told if isinstance(one, Aside))]
    tasks = [
        Task(
            name=file.name,
            content=file.path,
            mask=masks[file.name].path if file.name in masks else None,
            conditions=tuple(one.path for one in conditions.get(file.name, ())),
            references=tuple(places[name] for name in user.shown.get(file.name, ())),
        )
        for file in pictures
    ]
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
