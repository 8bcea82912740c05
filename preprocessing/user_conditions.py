"""Which of the upload's pictures are conditions of others: `x.condition.png`, `x.condition.1.png` beside `x.jpg`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from preprocessing.archive import SourceFile
from preprocessing.prepared import Aside, Reject

MARKED = re.compile(r"(.+)\.condition(?:\.(\d{1,2}))?", re.IGNORECASE)


def pair_conditions(
    files: Iterable[SourceFile],
) -> tuple[tuple[SourceFile, ...], dict[str, tuple[SourceFile, ...]], tuple[Aside | Reject, ...]]:
    """The other files, the conditions by the picture's name in order, and what became of each condition's file."""
    files = tuple(files)
    marked = {file.name: found for file in files if (found := MARKED.fullmatch(_stem(file.name)))}
    plain = tuple(file for file in files if file.name not in marked)
    owners = {_stem(file.name).casefold(): file.name for file in reversed(plain)}
    numbered: dict[str, dict[int, SourceFile]] = {}
    told: list[Aside | Reject] = []
    for file in (file for file in files if file.name in marked):
        stem, number = marked[file.name][1].casefold(), int(marked[file.name][2] or 0)
        if stem not in owners:
            told.append(Reject(source=file.name, reason="a condition without a picture of the same name beside it"))
        elif number in (taken := numbered.setdefault(owners[stem], {})):
            told.append(Reject(source=file.name, reason=f"another condition {number} of {owners[stem]} is used"))
        else:
            taken[number] = file
            told.append(Aside(source=file.name, use=f"condition {number} of {owners[stem]}"))
    conditions = {name: tuple(found[number] for number in sorted(found)) for name, found in numbered.items()}
    return plain, conditions, tuple(told)


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))
