"""The whole of preprocessing on one page: unpack, read captions, decode and crop, caption the rest, write it down."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from preprocessing.archive import SourceFile, check_source, unpack
from preprocessing.buckets import Fit, Size, buckets, fit, nearest
from preprocessing.captioning import Caption, caption_all
from preprocessing.captions import read_captions
from preprocessing.errors import UserError
from preprocessing.fingerprint import dataset_hash, inputs_hash
from preprocessing.pictures import UnreadablePicture, decode
from preprocessing.prepared import CAPTIONS, MANIFEST, PreparedDataset, PreparedItem, Reject
from preprocessing.settings import PrepareSettings

Progress = Callable[[str, int, int], None]  # stage ("unpack", "pictures" or "captions"), done, total
DECODERS = min(4, os.cpu_count() or 1)  # each may hold one picture at its full size
PNG_LEVEL = 1  # these files are read soon and often and kept briefly


@dataclass(frozen=True)
class Cropped:
    """A picture that lies cropped in the folder, its mask too where it has one; paths as in the manifest."""

    source: str
    fit: Fit
    image: str
    mask: str | None


@dataclass(frozen=True)
class Workplace:
    """Where and into what sizes pictures are cropped."""

    folder: Path
    sizes: tuple[Size, ...]
    masks: bool


def prepare(settings: PrepareSettings, stride: int, folder: Path, progress: Progress | None = None) -> PreparedDataset:
    """Turn `settings.input_images` into a PreparedDataset in `folder`, which appears whole or not at all.

    `stride` is what the sides of a trained picture are multiples of; `settings.resolution` and `settings.captioner`
    must be settled (not None, not "auto"). A folder that an earlier call made from the same input is used again if its
    pictures and captions are still what they were; else it is replaced. Every file of the upload becomes an item, a
    caption or a reject, save hidden and system files.
    Raises UserError for whatever the user can mend, above all where no picture is left.
    """
    if settings.resolution is None or settings.captioner == "auto":
        raise ValueError("the job settles resolution and captioner before it prepares")
    check_source(settings.input_images)
    _check_target(folder, settings.input_images)
    sizes = buckets(settings.resolution, stride)
    inputs = inputs_hash(settings, stride)
    earlier = _reusable(folder, inputs)
    if earlier:
        return earlier
    building, replaced = (folder.with_name(f".{folder.name}.{state}") for state in ("building", "replaced"))
    for leftover in (building, replaced):  # of a run that was killed
        _remove(leftover)
    building.mkdir(parents=True)
    try:
        items, rejects = _build(settings, Workplace(building, sizes, settings.mask_from_alpha), progress or _silent)
        dataset = PreparedDataset(
            items=items,
            rejects=rejects,
            trigger_word=settings.trigger_word,
            resolution=settings.resolution,
            horizontal_flip=settings.horizontal_flip,
            dataset_hash=dataset_hash(items, building),
            inputs_hash=inputs,
            folder=building,
        )
        dataset.save()
        dataset.write_captions(building / CAPTIONS)
        if folder.exists():
            folder.rename(replaced)
        building.rename(folder)
        _remove(replaced)
    finally:
        _remove(building)
    return dataset.model_copy(update={"folder": folder})


def _silent(stage: str, done: int, total: int) -> None:
    """The progress report of a caller that wants none."""


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _check_target(folder: Path, source: Path) -> None:
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise UserError(f"output_dir lies inside input_images ({source}), whose files would mix: choose another.")
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} holds something else than a prepared data set: move it or choose another output_dir."
        )


def _reusable(folder: Path, inputs: str) -> PreparedDataset | None:
    """The data set in `folder` if it was made from these inputs and nothing in it has changed since."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        dataset = PreparedDataset.load(folder)
        same = dataset.inputs_hash == inputs and dataset.dataset_hash == dataset_hash(dataset.items, folder)
    except (ValueError, OSError):  # written by another version, or damaged: made again
        return None
    return dataset if same else None


def _build(
    settings: PrepareSettings, place: Workplace, report: Progress
) -> tuple[tuple[PreparedItem, ...], tuple[Reject, ...]]:
    unpacked_folder = place.folder / "unpacked"
    report("unpack", 0, 1)
    unpacked = unpack(settings.input_images, unpacked_folder)
    user = read_captions(unpacked.files)
    report("unpack", 1, 1)
    cropped, unreadable = _crop_all(user.pictures, place, report)
    _remove(unpacked_folder)
    rejects = (*unpacked.rejects, *user.rejects, *unreadable)
    if not cropped:
        raise UserError(_nothing_left(settings.input_images, rejects))
    crops = {picture.source: place.folder / picture.image for picture in cropped}
    captions = caption_all(crops, user.captions, settings, report)
    return tuple(_item(picture, captions[picture.source]) for picture in cropped), rejects


def _nothing_left(source: Path, rejects: tuple[Reject, ...]) -> str:
    if not rejects:
        return f"{source} holds no pictures: put some in."
    reasons = "; ".join(f"{reject.source}: {reject.reason}" for reject in rejects[:3])
    more = f"; and {len(rejects) - 3} more" if len(rejects) > 3 else ""
    return f"{source} holds no picture that can be used ({reasons}{more}): mend these or add others."


def _crop_all(
    pictures: tuple[SourceFile, ...], place: Workplace, report: Progress
) -> tuple[list[Cropped], list[Reject]]:
    for name in ("images", "masks") if place.masks else ("images",):
        (place.folder / name).mkdir()
    cropped: list[Cropped] = []
    rejects: list[Reject] = []
    # Closing the results drops what is still queued, so that an interrupt need not wait for every picture.
    with (
        ThreadPoolExecutor(DECODERS) as pool,
        closing(pool.map(lambda numbered: _crop(*numbered, place), enumerate(pictures))) as results,
    ):
        for done, result in enumerate(results, 1):
            if isinstance(result, Reject):
                rejects.append(result)
            else:
                cropped.append(result)
            report("pictures", done, len(pictures))
    return cropped, rejects


def _crop(number: int, file: SourceFile, place: Workplace) -> Cropped | Reject:
    try:
        picture = decode(file.path)
    except UnreadablePicture as error:
        return Reject(source=file.name, reason=str(error))
    geometry = fit(picture.rgb.size, nearest(picture.rgb.size, place.sizes))
    image, mask = f"images/{number:06d}.png", None
    geometry.apply(picture.rgb).save(place.folder / image, compress_level=PNG_LEVEL)
    if place.masks and picture.alpha is not None:
        mask = f"masks/{number:06d}.png"
        # Not Lanczos: its ringing would make a faint mask where there is none.
        smooth = geometry.apply(picture.alpha, Image.Resampling.BILINEAR)
        smooth.save(place.folder / mask, compress_level=PNG_LEVEL)
    return Cropped(file.name, geometry, image, mask)


def _item(picture: Cropped, caption: Caption) -> PreparedItem:
    return PreparedItem(
        image=picture.image,
        mask=picture.mask,
        caption=caption.trained,
        original_caption=caption.original,
        caption_source=caption.source,
        caption_changes=caption.changes,
        source=picture.source,
        original_size=picture.fit.original,
        resized_size=picture.fit.resized,
        crop=picture.fit.crop,
        size=picture.fit.size,
    )
