"""Hashes: of a prepared data set's content, and of everything that it is made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from preprocessing.archive import walk
from preprocessing.captioners import identity
from preprocessing.prepared import PreparedItem
from preprocessing.settings import PrepareSettings

ALGORITHM = 2  # raised when the same input comes to be prepared in another way


def dataset_hash(items: Iterable[PreparedItem], folder: Path) -> str:
    """SHA-256 (hex) over the pixels, masks and captions of `items` as they lie in `folder`, in order.

    Of pixels and not of files, so that another PNG compressor makes no difference.
    """
    digest = hashlib.sha256()
    for item in items:
        for path in (item.image, item.mask):
            digest.update(_framed(_pixels(folder / path) if path else b""))
        digest.update(_framed(item.caption.encode()))
    return digest.hexdigest()


def inputs_hash(settings: PrepareSettings, stride: int) -> str:
    """SHA-256 (hex) over the upload, the settings that matter here, and the versions of what does the work."""
    names = set(PrepareSettings.model_fields) - {"input_images"}
    made_by = {
        "settings": settings.model_dump(mode="json", include=names),
        "stride": stride,
        "algorithm": ALGORITHM,
        "captioner": identity(settings),
        "libraries": [version("pillow"), version("pillow-heif")],
    }
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode())
    source = settings.input_images
    if source.is_dir():
        found = walk(source)
        for file in found.files:
            digest.update(_framed(file.name.encode()) + _file_hash(file.path))
        digest.update(json.dumps([reject.model_dump() for reject in found.rejects]).encode())
    else:
        digest.update(_file_hash(source))
    return digest.hexdigest()


def _pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return f"{image.mode} {image.width} {image.height} ".encode() + image.tobytes()


def _file_hash(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _framed(part: bytes) -> bytes:
    """`part` after its length, so that no two sequences of parts read the same."""
    return len(part).to_bytes(8, "big") + part
