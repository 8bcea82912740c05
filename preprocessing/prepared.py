"""The PreparedDataset: the folder between preprocessing and training, and the only thing that training reads.

<folder>/manifest.json      what the classes below hold
<folder>/captions.jsonl     every caption as it is trained and as it was said; an upload may bring it back
<folder>/images/*.png       RGB, exactly the size of its bucket
<folder>/masks/*.png        "L", the same size; only where there is a mask
<folder>/conditions/*.png   RGB, the same size; only where the upload has conditions
<folder>/work/              what lets the next run use finished work again
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from preprocessing.concepts import Concept

MANIFEST = "manifest.json"
CAPTIONS = "captions.jsonl"


class PreparedItem(BaseModel):
    """One picture as it is trained on. Sizes are (width, height), `crop` is (left, top), all in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str  # path inside the folder
    mask: str | None = None
    conditions: tuple[str, ...] = ()  # pictures uploaded beside it to draw it from, of the same size
    caption: str  # what is trained, the trigger in it
    original_caption: str | None = None  # as the user or the captioner wrote it
    caption_source: str  # "user", "none" or the captioner's name
    caption_changes: tuple[str, ...] = ()  # what was done to the original
    source: str  # name in the archive
    original_size: tuple[int, int]  # after EXIF orientation
    resized_size: tuple[int, int]  # before the crop
    crop: tuple[int, int]
    size: tuple[int, int]  # the bucket's
    repeats: int = 1  # how often it counts
    notes: tuple[str, ...] = ()  # what was done to the picture
    perceptual_hash: str = ""  # 16 hexadecimal digits; near-duplicates differ by a few bits
    blur: float | None = None  # 0 sharp, 1 without detail
    digest: str = ""  # SHA-256 of pixels, mask and conditions
    class_label: int | None = None  # number of its class, of a source that has classes
    concept: int | None = None  # its place in the data set's concepts, where there are several


class Reject(BaseModel):
    """A file of the archive that is not trained on, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    reason: str


class Aside(BaseModel):
    """A file of the archive that is no picture, and what it is used for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    use: str


class PreparedDataset(BaseModel):
    """What was prepared; `folder` is where it lies and is not written down."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    items: tuple[PreparedItem, ...]
    rejects: tuple[Reject, ...] = ()
    asides: tuple[Aside, ...] = ()  # captions, masks, and files of the system that are passed over
    trigger_word: str  # of several the first
    concepts: tuple[Concept, ...] = ()  # where there are several, with the folders that they have in the upload
    resolution: int
    horizontal_flip: bool = False
    dataset_hash: str  # SHA-256 over pictures, masks, captions and repeats, in order
    inputs_hash: str = ""  # SHA-256 over what it was made from: the upload, the settings, the versions
    folder: Path

    def triggers_of(self, item: PreparedItem) -> tuple[str, ...]:
        """The triggers that an item's caption should hold."""
        return (self.trigger_word,) if item.concept is None else self.concepts[item.concept].triggers

    @property
    def triggers(self) -> tuple[str, ...]:
        """All triggers."""
        return tuple(one.trigger_word for one in self.concepts if not one.concepts) or (self.trigger_word,)

    def save(self) -> None:
        """Write the manifest into the folder, whole (temporary name, then rename)."""
        temporary = self.folder / (MANIFEST + ".tmp")
        temporary.write_text(self.model_dump_json(indent=2, exclude={"folder"}), encoding="utf-8")
        temporary.replace(self.folder / MANIFEST)

    def write_captions(self, path: Path) -> None:
        """Write captions.jsonl: a line a picture with the trained text, the original, who said it and the changes."""
        rows = {
            item.source: {
                "file_name": item.source,
                "text": item.caption,
                "original": item.original_caption,
                "by": item.caption_source,
                "changes": item.caption_changes,
            }
            for item in self.items
        }
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values())
        path.write_text(lines, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> PreparedDataset:
        """Read a prepared folder; raises FileNotFoundError where there is none."""
        stored = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return cls.model_validate(stored | {"folder": folder})
