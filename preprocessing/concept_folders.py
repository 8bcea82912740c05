"""An upload of several concepts: which folder is which, and each one's pictures with its settings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from pydantic import ValidationError

from preprocessing.concepts import EVERY, Concept, check_together, named_by
from preprocessing.errors import UserError
from preprocessing.settings import PrepareSettings
from preprocessing.upload import Upload


@dataclass(frozen=True)
class Part:
    """Pictures that are prepared alike: their place among the concepts (None: there is but one), and the settings for
    each of the concepts that they show, as if it were the only one.
    """

    concept: int | None
    upload: Upload
    settings: tuple[PrepareSettings, ...]


def parted(upload: Upload, settings: PrepareSettings) -> tuple[tuple[Concept, ...], list[Part]]:
    """The concepts with the folders that they have in the upload, and a part each; of a job of one the whole upload.

    Raises UserError where a folder is not there or a picture lies in none.
    """
    if not settings.concepts:
        return (), [Part(None, upload, (settings,))]
    tasks = list(upload.tasks)
    names = [task.name for task in tasks]
    concepts = _by_layout(names) if settings.concepts[0].folder == EVERY else _placed(settings, names)
    settled = settings.model_copy(update={"concepts": concepts})
    if settings.mask_from == "text" and (
        blind := next((one for one in concepts if not settled.singles(one)[0].mask_words), None)
    ):
        raise UserError(f"mask_from text needs mask_prompt or class_word of the concept in {blind.folder!r}: give one.")
    found: dict[int, list] = defaultdict(list)
    homeless = []
    for task in tasks:
        inside = [i for i, one in enumerate(concepts) if task.name.startswith(f"{one.folder}/")]
        if inside:  # of a folder in a folder the inner one
            found[max(inside, key=lambda i: len(concepts[i].folder))].append(task)
        else:
            homeless.append(task.name)
    if homeless:
        more = f" and {len(homeless) - 1} more pictures lie" if len(homeless) > 1 else " lies"
        raise UserError(f"concepts: {homeless[0]}{more} in no concept's folder: put them into one or leave them out.")
    parts = [
        Part(i, replace(upload, tasks=found[i], count=len(found[i])), settled.singles(one))
        for i, one in enumerate(concepts)
    ]
    return concepts, parts


def _by_layout(names: Sequence[str]) -> tuple[Concept, ...]:
    """A concept for every folder at the top, below a folder that holds everything, which many programs pack."""
    parents = [PurePosixPath(name).parent.parts for name in names]
    depth = 0
    while parents and all(len(one) > depth + 1 for one in parents) and len({one[depth] for one in parents}) == 1:
        depth += 1
    folders = sorted({"/".join(one[: depth + 1]) for one in parents if len(one) > depth})
    if len(folders) < 2:
        raise UserError("concepts folders: the pictures lie in no two folders at the top: make one for each concept.")
    try:
        concepts = tuple(Concept.model_validate(named_by(folder)) for folder in folders)
        check_together(concepts)
    except (ValidationError, ValueError) as error:
        told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UserError(f"{told.removeprefix('Value error, ')}; folders are called as their trigger words.") from error
    return concepts


def _placed(settings: PrepareSettings, names: Sequence[str]) -> tuple[Concept, ...]:
    """The concepts with whole paths: a folder may be named by the end of its path where only one ends so."""
    folders = _folders(names)
    placed = []
    for one in settings.concepts:
        found = [folder for folder in folders if folder == one.folder] or [
            folder for folder in folders if folder.endswith(f"/{one.folder}")
        ]
        if len(found) != 1:
            there = ", ".join(folders[:8]) or "none"
            what = "several folders" if found else "no folder"
            raise UserError(
                f"concepts: {settings.input_images} has {what} {one.folder!r} of pictures: name one of {there}."
            )
        placed.append(one.model_copy(update={"folder": found[0]}))
    try:
        check_together(placed)
    except ValueError as error:
        raise UserError(str(error)) from error
    return tuple(placed)


def _folders(names: Iterable[str]) -> list[str]:
    """Every folder that pictures lie in, those around it too."""
    around = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    return sorted(around - {"."})
