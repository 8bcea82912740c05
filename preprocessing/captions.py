"""The user's own captions, wherever they wrote them. Their words are never changed.

Where several give one picture a caption, the first of this order counts and the others are listed as left out:
1. `x.txt` (or `x.png.txt`) beside `x.png`, then `x.json`, whose caption, text or prompt it is (a WebDataset's);
2. `captions.csv`, or any `*caption*.csv`, with the columns caption and image_file; `captions.jsonl`, which a job
   delivers, with file_name and text;
3. `metadata.jsonl` and `metadata.csv` with file_name and text, the ImageFolder layout; and instructions, any `.jsonl`
   with output_image and instruction, in which input_images lists the pictures that the instruction speaks of.
In the tables a picture is named from the table's own folder, from the top, by the end of its path where only one
picture ends so, or by its full path on the machine that it comes from. Text is UTF-8, with or without a byte-order
mark. A blank caption is the user's wish for none; a row whose caption is null leaves the picture to the captioner.
A column repeats says how often a picture counts.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from preprocessing.archive import SourceFile
from preprocessing.errors import UserError
from preprocessing.limits import LIMITS, MIB, Limits
from preprocessing.prepared import Aside, Reject

TEXT_SUFFIXES = {".txt", ".json", ".csv", ".jsonl"}
PICTURE_COLUMNS = ("image_file", "file_name", "output_image")
CAPTION_COLUMNS = ("caption", "text", "instruction")
SHOWN_COLUMN = "input_images"
OF_OBJECT = ("caption", "text", "prompt", "txt")  # in an object of its own: a WebDataset's .json or a column
BESIDE, TABLES = (0, 1), (2, 3)  # in the order of precedence
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
HALVED = "holds half of a surrogate pair (\\ud800 to \\udfff): write the whole character."
REPEATS_COLUMN, MOST_REPEATS = "repeats", 1000


@dataclass(frozen=True)
class UserCaption:
    """A caption as it was written, and the file that it stands in."""

    text: str
    source: str


@dataclass(frozen=True)
class UserCaptions:
    """Every file sorted into picture (perhaps), caption or reject; `captions`, `repeats` and `shown`, the names of the
    pictures that a caption speaks of, by the picture's name. A picture of which one of these is missing is `unusable`.
    """

    pictures: tuple[SourceFile, ...]
    captions: dict[str, UserCaption]
    rejects: tuple[Reject, ...]
    asides: tuple[Aside, ...] = ()
    repeats: dict[str, int] = field(default_factory=dict)
    shown: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unusable: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Row:
    """A row of a table: its place for messages, what it calls the picture, the caption, how often it counts, and what
    it calls the pictures that the caption speaks of.
    """

    place: str
    reference: str
    caption: str | None
    repeats: int | None
    shown: tuple[str, ...] = ()


@dataclass
class _Desk:
    """Takes captions in the order of precedence and finds the picture that each is for."""

    names: set[str]
    captions: dict[str, UserCaption] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    shown: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unusable: set[str] = field(default_factory=set)
    asides: list[Aside] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    by_stem: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    by_folded_stem: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    by_base: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for name in sorted(self.names):
            stem = str(PurePosixPath(name).with_suffix(""))
            for key in {name, stem}:
                self.by_stem[key].append(name)
            for key in {name.casefold(), stem.casefold()}:
                self.by_folded_stem[key].append(name)
            self.by_base[PurePosixPath(name).name.casefold()].append(name)

    def beside(self, text_name: str) -> list[str]:
        """The pictures that the text file `text_name` lies beside."""
        stem = str(PurePosixPath(text_name).with_suffix(""))
        # x.JPG and X.txt come from systems that do not tell them apart.
        return self.by_stem.get(stem) or self.by_folded_stem.get(stem.casefold()) or []

    def named(self, reference: str, table: str) -> list[str]:
        """The pictures that `reference` in the table `table` may mean."""
        reference = unicodedata.normalize("NFC", reference.strip().replace("\\", "/"))
        for base in (posixpath.dirname(table), ""):
            name = posixpath.normpath(posixpath.join(base, reference))
            if name in self.names:
                return [name]
        wanted = "/" + posixpath.normpath(reference).lstrip("/").casefold()
        same_base = self.by_base.get(posixpath.basename(wanted), [])
        whole = ((name, "/" + name.casefold()) for name in same_base)
        # A full path names a place on the machine where the table was written: there the archive's is the end of it.
        is_full = reference.startswith("/") or reference[1:2] == ":"
        return [name for name, path in whole if path.endswith(wanted) or (is_full and wanted.endswith(path))]

    def take(self, picture: str, caption: UserCaption) -> None:
        earlier = self.captions.setdefault(picture, caption)
        if earlier.text.strip() != caption.text.strip():
            self.reject(caption.source, f"its caption of {picture} is not used, because {earlier.source} has one too")

    def show(self, picture: str, row: _Row, table: str) -> None:
        """Find the pictures that a row's caption speaks of."""
        found = [self.named(reference, table) for reference in row.shown]
        for reference, names in zip(row.shown, found, strict=True):
            if len(names) != 1:
                what = "is not in the upload" if not names else "is several pictures: name the folder too"
                self.reject(row.place, f"its input image {reference!r} {what}, and {picture} is not trained")
                self.unusable.add(picture)
                return
        self.shown.setdefault(picture, tuple(names[0] for names in found))

    def reject(self, source: str, reason: str) -> None:
        self.rejects.append(Reject(source=source, reason=reason))


def read_captions(files: Iterable[SourceFile], limits: Limits = LIMITS) -> UserCaptions:
    """Tell the captions among `files` from the pictures and give each picture its own.

    Raises UserError where a caption file is not UTF-8, too long, or a table cannot be understood.
    """
    texts, pictures = [], []
    for file in files:
        (texts if PurePosixPath(file.name).suffix.casefold() in TEXT_SUFFIXES else pictures).append(file)
    desk = _Desk({file.name for file in pictures})
    for kind, file in sorted(((_precedence(file), file) for file in texts), key=lambda pair: pair[0]):
        if kind in BESIDE:
            _take_text(desk, file, limits)
        elif kind in TABLES:
            _take_table(desk, file, limits)
        else:
            desk.reject(
                file.name, "neither a picture nor captions (x.txt, captions.csv or .jsonl, metadata.csv or .jsonl)"
            )
    return UserCaptions(
        tuple(pictures),
        desk.captions,
        tuple(desk.rejects),
        tuple(desk.asides),
        desk.repeats,
        desk.shown,
        frozenset(desk.unusable),
    )


def _precedence(file: SourceFile) -> int:
    base = PurePosixPath(file.name).name.casefold()
    if base.endswith(".txt"):
        return 0
    if base.endswith(".json"):
        return 1
    if "caption" in base and base.endswith((".csv", ".jsonl")):
        return 2
    return 3 if base in ("metadata.jsonl", "metadata.csv") or _holds_instructions(file) else 4


def _holds_instructions(file: SourceFile) -> bool:
    """Whether the first line of a .jsonl file is a JSON object with an output_image."""
    if not file.name.casefold().endswith(".jsonl"):
        return False
    with file.path.open("rb") as lines:
        first = lines.readline(MIB)
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "output_image" in row


def _take_text(desk: _Desk, file: SourceFile, limits: Limits) -> None:
    pictures = desk.beside(file.name)
    if not pictures:
        desk.reject(file.name, "a text without a picture of the same name beside it")
        return
    is_object = file.name.casefold().endswith(".json")
    text = _text_of_object(file, limits) if is_object else _read_text(file, limits.caption_bytes)
    if text is None:
        desk.asides.append(Aside(source=file.name, use=f"beside {', '.join(pictures)}: tells no caption"))
        return
    for picture in pictures:
        desk.take(picture, UserCaption(text, file.name))
    desk.asides.append(Aside(source=file.name, use=f"caption of {', '.join(pictures)}"))


def _text_of_object(file: SourceFile, limits: Limits) -> str | None:
    """The caption that the JSON object in a file tells; None where it tells none."""
    try:
        found = caption_in(json.loads(_read_text(file, limits.table_bytes)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.name} is not JSON: mend it or leave it out.") from error
    if found is not None:
        _check_caption(file.name, found, limits)
    return found


def caption_in(value: object) -> str | None:
    """The caption in a column or in JSON: text, or what an object calls so."""
    if isinstance(value, Mapping):
        value = next((value[name] for name in OF_OBJECT if isinstance(value.get(name), str)), None)
    return value if isinstance(value, str) else None


def _check_caption(place: str, caption: str, limits: Limits) -> None:
    if HALF_CHARACTER.search(caption):
        raise UserError(f"{place} {HALVED}")
    if len(caption.encode()) > limits.caption_bytes:
        raise UserError(f"{place} has a caption of more than {limits.caption_bytes:,} bytes: shorten it.")


def _take_table(desk: _Desk, file: SourceFile, limits: Limits) -> None:
    text = _read_text(file, limits.table_bytes)
    rows = _csv_rows(file.name, text) if file.name.casefold().endswith(".csv") else _json_rows(file.name, text)
    for row in rows:
        place, caption = row.place, row.caption
        if caption is not None:
            _check_caption(place, caption, limits)
        pictures = desk.named(row.reference, file.name)
        if len(pictures) != 1:
            what = "there is no such picture" if not pictures else "several pictures are called so: name the folder too"
            desk.reject(place, f"the caption is for {row.reference!r}, but {what}")
            continue
        if caption is not None:
            desk.take(pictures[0], UserCaption(caption, place))
        if row.repeats is not None:
            desk.repeats[pictures[0]] = row.repeats
        if row.shown and pictures[0] not in desk.shown:
            desk.show(pictures[0], row, file.name)
    desk.asides.append(Aside(source=file.name, use="captions"))


def _read_text(file: SourceFile, limit: int) -> str:
    size = file.path.stat().st_size
    if size > limit:
        unit = f"{limit // MIB:,} MiB" if limit >= MIB else f"{limit:,} bytes"
        raise UserError(f"{file.name} is longer than {unit}, the limit for a caption file of its kind: shorten it.")
    try:
        return file.path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file.name} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error


def _csv_rows(name: str, text: str) -> Iterator[_Row]:
    header = text.partition("\n")[0]
    # A spreadsheet of many countries writes semicolons; the header's column names hold neither.
    separator = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        columns = {column.strip().casefold(): column for column in reader.fieldnames or ()}
        picture, caption = _columns(name, columns, PICTURE_COLUMNS), _columns(name, columns, CAPTION_COLUMNS)
        for row in reader:
            place = f"{name} line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(
                    f"{place} has not as many fields as there are columns: "
                    f"put a caption that holds {separator!r} into quotation marks."
                )
            yield _Row(place, row[picture], row[caption], _repeats(place, row.get(columns.get(REPEATS_COLUMN))))
    except csv.Error as error:
        raise UserError(f"{name} line {reader.line_num} is not sound CSV ({error}): mend it.") from error


def _repeats(place: str, value: object) -> int | None:
    """How often a row's picture counts; None where the row does not say."""
    if value in (None, ""):
        return None
    text = str(value).strip()
    if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= MOST_REPEATS:
        raise UserError(
            f"{place}: {REPEATS_COLUMN} must be a whole number from 1 to {MOST_REPEATS}, not {text[:20]!r}."
        )
    return int(text)


def _columns(name: str, columns: dict[str, str], wanted: tuple[str, ...]) -> str:
    for column in wanted:
        if column in columns:
            return columns[column]
    found = ", ".join(columns) or "none"
    raise UserError(f"{name} has no column {' or '.join(wanted)} (found: {found[:200]}): name the columns so.")


def _json_rows(name: str, text: str) -> Iterator[_Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{name} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place} is not JSON: write one object a line.") from error
        if not isinstance(row, dict):
            raise UserError(f'{place} is not a JSON object: write {{"file_name": ..., "text": ...}}.')
        columns = {str(column).casefold(): column for column in row}
        picture = row[_columns(place, columns, PICTURE_COLUMNS)]
        caption = row[_columns(place, columns, CAPTION_COLUMNS)]
        if not isinstance(picture, str) or not isinstance(caption, str | None):
            raise UserError(f"{place}: the picture's name and the caption must be text in quotation marks.")
        if HALF_CHARACTER.search(picture):
            raise UserError(f"{place} {HALVED}")
        shown = row.get(columns.get(SHOWN_COLUMN)) or []
        if not isinstance(shown, list) or not all(isinstance(one, str) for one in shown):
            raise UserError(f"{place}: {SHOWN_COLUMN} must be a list of names of pictures.")
        repeats = _repeats(place, row.get(columns.get(REPEATS_COLUMN)))
        yield _Row(place, picture, caption, repeats, tuple(shown))
