"""Which of the upload's pictures are masks of others: `x.mask.png` beside `x.jpg`, or `masks/x.png` for `x.jpg`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath

from preprocessing.archive import SourceFile
from preprocessing.prepared import Aside, Reject

MARK, FOLDER = ".mask", "masks"


def pair_masks(
    files: Iterable[SourceFile],
) -> tuple[tuple[SourceFile, ...], dict[str, SourceFile], tuple[Aside | Reject, ...]]:
    """The pictures, their masks by the picture's name, and what became of each mask's file.

    A file in a folder masks/ that belongs to no picture is a picture itself; one called x.mask.png is not.
    """
    files = tuple(files)
    by_stem: dict[str, list[str]] = defaultdict(list)
    for file in files:
        if not _is_marked(file.name) and FOLDER not in PurePosixPath(file.name).parts[:-1]:
            for key in {_stem(file.name), file.name}:
                by_stem[key.casefold()].append(file.name)
    pictures, masks, told = [], {}, []
    for file in files:
        owners = [name for stem in _stems(file.name) for name in by_stem.get(stem.casefold(), [])]
        free = [name for name in dict.fromkeys(owners) if name not in masks]
        if free:
            masks |= dict.fromkeys(free, file)
            told.append(Aside(source=file.name, use=f"mask of {', '.join(free)}"))
        elif owners:
            told.append(Reject(source=file.name, reason=f"another mask of {owners[0]} is used"))
        elif _is_marked(file.name):
            told.append(Reject(source=file.name, reason="a mask without a picture of the same name beside it"))
        else:
            pictures.append(file)
    return tuple(pictures), masks, tuple(told)


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _is_marked(name: str) -> bool:
    return _stem(name).casefold().endswith(MARK)


def _stems(name: str) -> list[str]:
    """What a picture may be called, without its suffix, that the file `name` is the mask of; none for a plain one."""
    stem = _stem(name)
    if _is_marked(name):
        return [stem[: -len(MARK)]]
    parts = PurePosixPath(stem).parts
    places = [place for place, part in enumerate(parts[:-1]) if part.casefold() == FOLDER]
    # masks/a/x for a/x or images/a/x
    return ["/".join((*parts[:at], *other, *parts[at + 1 :])) for at in places for other in ((), ("images",))]
