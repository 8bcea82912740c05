"""Pictures from a data set that `datasets` reads: a Hub id, or a folder of Parquet files, WebDataset shards or pictures
with metadata. It is streamed: nothing is unpacked, and shards are shared out between nodes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from preprocessing import pairs
from preprocessing.archive import check_shard
from preprocessing.captions import OF_OBJECT, UserCaption, caption_in
from preprocessing.crop import Task
from preprocessing.errors import UserError
from preprocessing.prepared import Reject
from preprocessing.published import PHOTO, SOURCES, Share, open_published, said
from preprocessing.settings import PrepareSettings
from preprocessing.upload import Upload

if TYPE_CHECKING:
    from datasets import IterableDataset

SHARDS = {".parquet", ".tar"}
CLASS_COLUMNS = ("fine_label", "label")  # of names of classes, where nothing else is a caption
OF_JSON = "json"  # the column of a WebDataset's .json files
# condition.png and condition.1.png beside a WebDataset's png, or columns called condition and condition_1, or
# conditioning_image as in data sets for ControlNet
CONDITION = re.compile(r"condition(?:ing)?(?:_image)?(?:[._](\d{1,2}))?(?:\.[a-z0-9]+)?", re.IGNORECASE)
READERS = {".parquet": "parquet", ".tar": "webdataset"}  # of a single file


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; `pairs` where a picture is two side by side, and tells its captions itself."""

    image: str
    caption: str | None = None
    conditions: tuple[str, ...] = ()
    pairs: bool = False


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

    Raises UserError where there is no such data set, split or column, or a local shard is refused.
    """
    if settings.source in SOURCES:
        return open_published(settings, share)
    for shard in _local_shards(settings.input_images):
        check_shard(shard)
    records = _load(settings)
    columns = _columns(records, settings)
    upload = Upload(tasks=(), count=None)
    tasks = _tasks(_shared_out(_undecoded(records), share), columns, upload, settings)
    upload.tasks = itertools.islice(tasks, settings.max_pictures)
    return upload


def _local_shards(source: Path) -> list[Path]:
    files = [source] if source.is_file() else sorted(source.rglob("*")) if source.is_dir() else []
    return [file for file in files if file.suffix.lower() == ".tar" and file.is_file()]


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
        arguments |= {"path": READERS.get(path.suffix.lower(), "parquet"), "data_files": [str(path)]}
    try:
        return load_dataset(**arguments)
    except (DatasetsError, OSError, ValueError) as error:
        raise UserError(
            f"input_images {path} cannot be opened as a data set, split {settings.dataset_split} "
            f"({str(error).splitlines()[0][:150]}): check path, Hub id and dataset_split."
        ) from error


def _columns(records: IterableDataset, settings: PrepareSettings) -> Columns:
    """The columns of pictures, captions and conditions, by the settings or by what they are."""
    from datasets import ClassLabel, Image

    features = records.features or {}
    found = (", ".join(features) or "none")[:200]
    conditions = settings.condition_columns
    if conditions is None:
        others = [name for name, kind in features.items() if isinstance(kind, Image) and name != settings.image_column]
        numbered = {name: int(hit[1] or 0) for name in others if (hit := CONDITION.fullmatch(name))}
        conditions = tuple(sorted(numbered, key=numbered.get))
    elif missing := [name for name in conditions if name not in features]:
        raise UserError(f"condition_columns: the data set has the columns {found}, not {missing[0]!r}.")
    pictures = [name for name, kind in features.items() if isinstance(kind, Image) and name not in conditions]
    image = settings.image_column or (pictures[0] if len(pictures) == 1 else None)
    if image is None or image not in features:
        raise UserError(f"image_column: the data set has the columns {found}: name the one of the pictures.")
    of_pairs = pairs.is_of_pairs(features)
    if settings.dataset_layout == "pairs" and not of_pairs:
        raise UserError(
            f"dataset_layout pairs: the data set has the columns {found}, and {pairs.QUALITY} and {pairs.DESCRIPTION} "
            "are wanted: leave it out."
        )
    if of_pairs and settings.dataset_layout != "single":
        for name in ("caption_column", "condition_columns"):
            if getattr(settings, name) is not None:
                raise UserError(
                    f"{name}: pairs of pictures tell their captions and are each other's condition: leave it out, or "
                    "set dataset_layout to single."
                )
        return Columns(image, pairs=True)
    caption = settings.caption_column
    if caption is not None and caption not in features:
        raise UserError(f"caption_column: the data set has the columns {found}, not {caption!r}.")
    if caption is None:
        caption = next((name for name in (*OF_OBJECT, OF_JSON) if name in features), None)
    if caption is None:
        caption = next((name for name in CLASS_COLUMNS if isinstance(features.get(name), ClassLabel)), None)
    return Columns(image, caption, conditions)


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


def _tasks(records: IterableDataset, columns: Columns, upload: Upload, settings: PrepareSettings) -> Iterator[Task]:
    names = getattr((records.features or {}).get(columns.caption), "names", None)  # of classes: numbers in records
    for number, record in enumerate(_sound(records, settings)):
        value = record[columns.image]
        name, content = _name(record, value, number), _content(value, settings.input_images)
        if columns.pairs:
            yield from _both(record, name, content, upload)
            continue
        text = caption_in(record.get(columns.caption)) if columns.caption else None
        if names and isinstance(label := record.get(columns.caption), int) and 0 <= label < len(names):
            upload.classes[name], text = label, PHOTO.format(said(names[label]))
        if text is not None:
            upload.captions[name] = UserCaption(text, columns.caption)
        shown = (record[column] for column in columns.conditions)
        conditions = tuple(_content(one, settings.input_images) for one in shown if one is not None)
        yield Task(name, content, conditions=conditions)


def _both(record: Mapping[str, Any], name: str, content: Path | bytes, upload: Upload) -> Iterator[Task]:
    """The two pictures of a record, each with the other as its condition; none where its scores are too low."""
    if fault := pairs.fault_of(record):
        upload.rejects.append(Reject(source=name, reason=fault))
        return
    for half in pairs.HALVES:
        own = pairs.name_of(name, half)
        if (text := pairs.description_of(record, half)) is not None:
            upload.captions[own] = UserCaption(text, pairs.DESCRIPTION)
        yield Task(own, content, half=half)


def _content(value: Any, source: Path) -> Path | bytes:
    """A picture's bytes, or where it lies: inside a local data set alone, for a table may name any file."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, Mapping):
        return b""
    if value.get("bytes") or not value.get("path"):
        return value.get("bytes") or b""
    path = Path(value["path"])
    folder = (source if source.is_dir() else source.parent).resolve()
    return path if not source.exists() or path.resolve().is_relative_to(folder) else b""


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
