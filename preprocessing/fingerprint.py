"""Hashes: of a prepared data set's content, and of everything that it is made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from preprocessing import sources
from preprocessing.archive import walk
from preprocessing.captioners import identity
from preprocessing.crop import digest_of
from preprocessing.prepared import PreparedDataset, PreparedItem
from preprocessing.settings import PrepareSettings

ALGORITHM = 3  # raised when the same input comes to be prepared in another way
LIBRARIES = ("pillow", "pillow-heif", "opencv-python-headless")
# Settings that decide what a picture becomes; the rest is about captions or about how the work is done.
OF_CROPS = ("small_pictures", "upscale_model", "mask_background", "crop_margin", "bucket_ratio", "extra_resolutions")


def dataset_hash(items: Iterable[PreparedItem]) -> str:
    """SHA-256 (hex) over the pixels, masks, captions and repeats of `items`, in order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(_framed(bytes.fromhex(item.digest)) + item.repeats.to_bytes(4, "big"))
        digest.update(_framed(item.caption.encode()))
    return digest.hexdigest()


def is_intact(dataset: PreparedDataset) -> bool:
    """Whether pictures, masks and captions are still what they were when the data set was made; OSError if one is not
    there.
    """
    if dataset.dataset_hash != dataset_hash(dataset.items):
        return False
    return all(
        digest_of(dataset.folder, item.image, item.mask, item.conditions) == item.digest for item in dataset.items
    )


def crops_hash(settings: PrepareSettings, stride: int) -> str:
    """SHA-256 (hex) over all but its own content that decides what a picture becomes."""
    words = settings.mask_words if settings.mask_source == "text" else ""
    made_by = {
        "settings": settings.model_dump(mode="json", include={*OF_CROPS, "resolution"}),
        "mask": [settings.mask_source, words, settings.mask_model if words else None, settings.crops_to_mask],
        "stride": stride,
        "algorithm": ALGORITHM,
        "libraries": [version(name) for name in (*LIBRARIES, *(["transformers"] if words else []))],
    }
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()


def inputs_hash(settings: PrepareSettings, stride: int, share: sources.Share = (0, 1)) -> str:
    """SHA-256 (hex) over the upload, the settings that matter here, and the versions of what does the work."""
    names = set(PrepareSettings.model_fields) - {"input_images", "workers"}
    made_by = {
        "settings": settings.model_dump(mode="json", include=names),
        "crops": crops_hash(settings, stride),
        "captioner": identity(settings),
        "share": share,
    }
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode())
    source = settings.input_images
    if sources.is_dataset(settings):
        digest.update(sources.identity(settings).encode())
    elif source.is_dir():
        found = walk(source)
        for file in found.files:
            digest.update(_framed(file.name.encode()) + _file_hash(file.path))
        digest.update(json.dumps([reject.model_dump() for reject in found.rejects]).encode())
    else:
        digest.update(_file_hash(source))
    return digest.hexdigest()


def _file_hash(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _framed(part: bytes) -> bytes:
    """`part` after its length, so that no two sequences of parts read the same."""
    return len(part).to_bytes(8, "big") + part
