"""Pictures with words from the published data sets of pixel_ar, as they lie on disk, and from the toybox's own world.

    source                  input_images (the data's root)                 captions
    cifar100                cifar-100-binary.tar.gz, or it unpacked        "a photo of a {class}"
    imagenet, imagenet10k   a folder of class folders, or train/ in it     the class folder's name, or its synset's
    coco                    {split}2017/ and annotations/captions_*.json   the first of each picture
    toybox                  any: the pictures are drawn                    of varied wording

Nothing here reads a pickle: of CIFAR-100 the binary version is wanted.
"""

from __future__ import annotations

import io
import itertools
import json
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from preprocessing.captions import UserCaption
from preprocessing.crop import Task
from preprocessing.errors import UserError
from preprocessing.pictures import is_picture
from preprocessing.settings import PrepareSettings
from preprocessing.upload import Upload

PHOTO = "a photo of a {}"
GENERIC = "a photo"  # of a picture that COCO has no caption for
CIFAR_SIDE = 32
CIFAR_RECORD = 2 + 3 * CIFAR_SIDE * CIFAR_SIDE  # coarse label, fine label, three planes
CIFAR_FOLDER = "cifar-100-binary"
SYNSETS = "LOC_synset_mapping.txt"  # of ImageNet's distribution: folder name, then its words
TOYBOX_SIDE, TOYBOX_PICTURES = 32, 2000
Share = tuple[int, int]  # which of how many nodes this one is
LARGEST_TABLE = 2**30  # bytes of a file of captions or names


class Pair(NamedTuple):
    """A picture: its name, bytes or place, words, and the number of its class."""

    name: str
    content: Path | bytes
    caption: str
    label: int | None = None


def open_published(settings: PrepareSettings, share: Share) -> Upload:
    """This node's share of the source, read as it is worked on. UserError where the files are not there."""
    pairs = SOURCES[settings.source](settings)
    pairs = itertools.islice(pairs, settings.max_pictures)
    upload = Upload(tasks=(), count=None)
    upload.tasks = _tasks(itertools.islice(pairs, share[0], None, share[1]), upload, settings.source)
    return upload


def _tasks(pairs: Iterator[Pair], upload: Upload, source: str) -> Iterator[Task]:
    for pair in pairs:
        upload.captions[pair.name] = UserCaption(pair.caption, source)
        if pair.label is not None:
            upload.classes[pair.name] = pair.label
        yield Task(pair.name, pair.content)


def said(name: str) -> str:
    """A class's name in words: underscores are spaces."""
    return " ".join(name.replace("_", " ").split())


def cifar100(settings: PrepareSettings) -> Iterator[Pair]:
    """CIFAR-100 in its binary version (Krizhevsky 2009)."""
    names = [said(line) for line in _cifar_file(settings, "fine_label_names.txt").decode().split("\n") if line.strip()]
    content = _cifar_file(settings, f"{settings.dataset_split}.bin")
    if len(content) % CIFAR_RECORD:
        raise UserError(
            f"{settings.input_images}: {settings.dataset_split}.bin is cut off or not CIFAR-100's: download it again."
        )
    for number in range(len(content) // CIFAR_RECORD):
        record = content[number * CIFAR_RECORD : (number + 1) * CIFAR_RECORD]
        label = record[1]
        if label >= len(names):
            raise UserError(f"{settings.input_images}: record {number} has class {label} of {len(names)}: wrong files.")
        yield Pair(
            f"{settings.dataset_split}/{number:05d}.png", _cifar_png(record[2:]), PHOTO.format(names[label]), label
        )


def _cifar_png(planes: bytes) -> bytes:
    import numpy as np
    from PIL import Image

    pixels = np.frombuffer(planes, np.uint8).reshape(3, CIFAR_SIDE, CIFAR_SIDE).transpose(1, 2, 0)
    return _png(Image.fromarray(np.ascontiguousarray(pixels)))


def _png(picture) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _cifar_file(settings: PrepareSettings, name: str) -> bytes:
    """A file of the binary version, in its folder, in a folder around it, or in the archive as it is downloaded."""
    root = settings.input_images
    if root.is_dir():
        archive = root / f"{CIFAR_FOLDER}.tar.gz"
        for path in (root / name, root / CIFAR_FOLDER / name):
            if path.is_file():
                return path.read_bytes()
        if not archive.is_file():
            raise UserError(f"{root} has no {name}: give the folder or the .tar.gz of CIFAR-100's binary version.")
        root = archive
    try:
        with tarfile.open(root) as tar:
            member = tar.getmember(f"{CIFAR_FOLDER}/{name}")
            file = tar.extractfile(member) if member.isfile() and member.size <= LARGEST_TABLE else None
            if file is not None:
                return file.read()
    except (OSError, EOFError, tarfile.TarError, KeyError) as error:
        raise UserError(
            f"{root} has no {CIFAR_FOLDER}/{name} ({type(error).__name__}): give CIFAR-100's binary version."
        ) from error
    raise UserError(f"{root}: {CIFAR_FOLDER}/{name} is no plain file: download it again.")


def class_folders(settings: PrepareSettings) -> Iterator[Pair]:
    """A folder for each class, as ImageNet has it; classes are numbered in the order of their folders' names."""
    root = settings.input_images
    if (root / settings.dataset_split).is_dir():
        root = root / settings.dataset_split
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not folders:
        raise UserError(f"{root} has no class folders: give a folder with a folder of pictures for each class.")
    names = _synsets(settings.input_images)
    for label, folder in enumerate(folders):
        for path in sorted(folder.rglob("*")):
            if path.is_file() and is_picture(path):
                name = path.relative_to(root).as_posix()
                yield Pair(name, path, names.get(folder.name, said(folder.name)), label)


def _synsets(root: Path) -> dict[str, str]:
    """What ImageNet's numbers of classes stand for, the first of each one's words, where the list lies there."""
    path = root / SYNSETS
    if not path.is_file():
        return {}
    rows = (line.partition(" ") for line in path.read_text(encoding="utf-8").splitlines())
    return {number: words.partition(",")[0].strip() for number, _, words in rows if words}


def coco(settings: PrepareSettings) -> Iterator[Pair]:
    """COCO's pictures of 2017, each with its first caption, or with a generic one where there is none."""
    root, split = settings.input_images, f"{settings.dataset_split}2017"
    folder = next((path for path in (root / split, root / "images" / split) if path.is_dir()), None)
    if folder is None:
        raise UserError(
            f"{root} has no {split}: give the folder that COCO was unpacked in, dataset_split train or val."
        )
    captions = _coco_captions(root / "annotations" / f"captions_{split}.json")
    for path in sorted(folder.iterdir()):
        if is_picture(path):
            yield Pair(f"{split}/{path.name}", path, captions.get(path.name, GENERIC))


def _coco_captions(path: Path) -> dict[str, str]:
    """The first caption of each picture by its file's name; none where there is no such file."""
    if not path.is_file():
        return {}
    if path.stat().st_size > LARGEST_TABLE:
        raise UserError(f"{path} is larger than COCO's: download it again.")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        files = {int(image["id"]): str(image["file_name"]) for image in stored["images"]}
        found: dict[str, str] = {}
        for note in stored["annotations"]:
            if (name := files.get(int(note["image_id"]))) is not None:
                found.setdefault(name, " ".join(str(note["caption"]).split()))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged or holds no captions ({type(error).__name__}): download it again."
        ) from error
    return found


def toybox(settings: PrepareSettings) -> Iterator[Pair]:
    """Scenes of the drawn world in the size of its autoregressive model; always the same."""
    from toybox.small import captioned

    wording = random.Random(1)
    for number, (picture, caption) in enumerate(captioned(settings.max_pictures or TOYBOX_PICTURES, 0, wording)):
        yield Pair(f"{number:06d}.png", _png(picture), caption)


SOURCES: dict[str, Callable[[PrepareSettings], Iterator[Pair]]] = {
    "cifar100": cifar100,
    "imagenet": class_folders,
    "imagenet10k": class_folders,
    "coco": coco,
    "toybox": toybox,
}
