"""Pictures from a data set that `datasets` reads: a Hub id, or a folder of Parquet files, WebDataset shards or pictures
with metadata. It is streamed: nothing is unpacked, and shards are shared out between nodes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from preprocessing.captions import UserCaption
from preprocessing.crop import Task
from preprocessing.errors import UserError
from preprocessing.pairs import PHOTO, SOURCES, Share, open_pairs, said
from preprocessing.settings import PrepareSettings
from preprocessing.upload import Upload

if TYPE_CHECKING:
    from datasets import IterableDataset

SHARDS = {".parquet", ".tar"}
CAPTION_COLUMNS = ("caption", "text", "prompt", "txt")
CLASS_COLUMNS = ("fine_label", "label")  # of names of classes, where nothing else is a caption
OF_JSON = "json"  # the column of a WebDataset's .json files


def is_dataset(settings: PrepareSettings) -> bool:
    """Whether the input is read by `datasets`: the setting says so, or it is a Parquet file or a folder of shards."""
    if settings.source != "auto":
        return settings.source != "files"
    path = settings.input_images
    if path.is_file():
        return path.suffix.lower() == ".parquet"
    if not path.is_dir():
        return False
    suffixes = {file.suffix.lower() for file in path.iterdir() if not file.name.startswith(".")}
    return bool(suffixes) and suffixes <= SHARDS


def open_dataset(settings: PrepareSettings, share: Share) -> Upload:
    """This node's share of the data set; its pictures are read as the tasks are, and their captions with them.

    Raises UserError where there is no such data set, split or column.
    """
    if settings.source in SOURCES:
        return open_pairs(settings, share)
    records = _load(settings)
    image, caption = _columns(records, settings)
    upload = Upload(tasks=(), count=None)
    upload.tasks = _tasks(_shared_out(_undecoded(records), share), (image, caption), upload, settings)
    return upload


def identity(settings: PrepareSettings) -> str:
    """What changes when the data set does: names, sizes and times of local files, or the Hub's commit."""
    path = settings.input_images
    if settings.source == "toybox":
        return "toybox"  # it is drawn: of the settings, all that matters is hashed anyhow
    if path.exists():
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        told = [[file.relative_to(path).as_posix(), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        return f"{path}@{HfApi().dataset_info(str(path)).sha}"
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise UserError(
            f"input_images {path} is neither a file nor a folder here nor could it be found among the Hub's data sets "
            f"({type(error).__name__}): give a path or a Hub id."
        ) from error


def _load(settings: PrepareSettings) -> IterableDataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from datasets.utils.logging import disable_progress_bar

    path = settings.input_images
    disable_progress_bar()
    arguments: dict[str, Any] = {"path": str(path), "split": settings.dataset_split, "streaming": True}
    if path.is_file():
        arguments |= {"path": "parquet", "data_files": [str(path)]}
    try:
        return load_dataset(**arguments)
    except (DatasetsError, OSError, ValueError) as error:
        raise UserError(
            f"input_images {path} cannot be opened as a data set, split {settings.dataset_split} "
            f"({str(error).splitlines()[0][:150]}): check path, Hub id and dataset_split."
        ) from error


def _columns(records: IterableDataset, settings: PrepareSettings) -> tuple[str, str | None]:
    """The columns of the pictures and of the captions, by the settings or by what they are."""
    from datasets import ClassLabel, Image

    features = records.features or {}
    found = ", ".join(features) or "none"
    pictures = [name for name, feature in features.items() if isinstance(feature, Image)]
    image = settings.image_column or (pictures[0] if len(pictures) == 1 else None)
    if image is None or image not in features:
        raise UserError(f"image_column: the data set has the columns {found[:200]}: name the one of the pictures.")
    caption = settings.caption_column
    if caption is not None:
        if caption not in features:
            raise UserError(f"caption_column: the data set has the columns {found[:200]}, not {caption!r}.")
        return image, caption
    told = next((name for name in (*CAPTION_COLUMNS, OF_JSON) if name in features), None)
    return image, told or next((name for name in CLASS_COLUMNS if isinstance(features.get(name), ClassLabel)), None)


def _undecoded(records: IterableDataset) -> IterableDataset:
    """Pictures as the bytes that they are: decoding is the workers' business."""
    from datasets import Image

    for name, feature in (records.features or {}).items():
        if isinstance(feature, Image):
            records = records.cast_column(name, Image(decode=False))
    return records


def _shared_out(records: IterableDataset, share: Share) -> IterableDataset:
    from datasets.distributed import split_dataset_by_node

    rank, nodes = share
    return split_dataset_by_node(records, rank, nodes) if nodes > 1 else records


def _tasks(
    records: IterableDataset, columns: tuple[str, str | None], upload: Upload, settings: PrepareSettings
) -> Iterator[Task]:
    image, caption = columns
    names = getattr((records.features or {}).get(caption), "names", None)  # of classes, which are numbers in records
    for number, record in enumerate(_sound(itertools.islice(records, settings.max_pictures), settings)):
        value = record[image]
        content: Path | bytes = b""
        if isinstance(value, bytes):
            content = value
        elif isinstance(value, Mapping):
            content = value["bytes"] or (Path(value["path"]) if value.get("path") else b"")
        name = _name(record, value, number)
        text = _caption(record.get(caption)) if caption else None
        if names and isinstance(label := record.get(caption), int) and 0 <= label < len(names):
            upload.classes[name], text = label, PHOTO.format(said(names[label]))
        if text is not None:
            upload.captions[name] = UserCaption(text, caption)
        yield Task(name, content)


def _sound(records: Iterator[dict], settings: PrepareSettings) -> Iterator[dict]:
    """The records; a damaged shard ends in a UserError."""
    import tarfile

    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    try:
        yield from records
    except (tarfile.TarError, ArrowException, DatasetsError, EOFError, UnicodeDecodeError) as error:
        raise UserError(
            f"{settings.input_images}: a shard is damaged or cut off ({str(error).splitlines()[0][:150]}): "
            "download it again."
        ) from error


def _name(record: Mapping[str, Any], value: Any, number: int) -> str:
    """A name that tells the picture from all others: of its shard and key, or of its place in the data set."""
    path = PurePosixPath(value.get("path") or "") if isinstance(value, Mapping) else PurePosixPath()
    if "__key__" in record:
        return f"{PurePosixPath(record['__url__']).name}/{record['__key__']}{path.suffix}"
    return f"{number:08d}-{path.name}" if path.name else f"{number:08d}"


def _caption(value: Any) -> str | None:
    """The caption in a column: text, or what a WebDataset's .json calls so."""
    if isinstance(value, Mapping):
        value = next((value[name] for name in CAPTION_COLUMNS if isinstance(value.get(name), str)), None)
    return value if isinstance(value, str) else None
