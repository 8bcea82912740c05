"""The whole of preprocessing on one page: open the upload, decode and crop, enlarge, caption, write it down."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from preprocessing.archive import check_source
from preprocessing.buckets import buckets
from preprocessing.captioning import Caption, Said, also_called, caption_all
from preprocessing.concept_folders import Part, parted
from preprocessing.concepts import Concept
from preprocessing.crop import (
    WORK,
    Crop,
    Cropped,
    Done,
    Place,
    crop_one,
    digest_of,
    finish,
    given_up,
    pending_path,
    save,
)
from preprocessing.errors import UserError
from preprocessing.fingerprint import crops_hash, dataset_hash, inputs_hash, is_intact
from preprocessing.prepared import CAPTIONS, MANIFEST, Aside, PreparedDataset, PreparedItem, Reject
from preprocessing.settings import PrepareSettings
from preprocessing.sources import Share, is_dataset, open_dataset
from preprocessing.upload import Upload, open_upload
from preprocessing.workers import Work, processes, run_all

# stage ("unpack", "pictures", "enlarge" or "captions"), done, total (0 where it is not known)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Finished:
    """A picture that lies cropped in the folder, by its name in the upload."""

    name: str
    cropped: Cropped


class Bars:
    """A bar a stage on a terminal, and every report handed on."""

    def __init__(self, told: Progress | None):
        self._told, self._stage, self._bar = told, "", None

    def __call__(self, stage: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if stage != self._stage:
            self.close()
            # None: only where somebody looks on
            self._stage, self._bar = stage, tqdm(total=total or None, desc=stage, disable=None, leave=False)
        self._bar.update(done - self._bar.n)
        if self._told:
            self._told(stage, done, total)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.close()


def prepare(
    settings: PrepareSettings, stride: int, folder: Path, progress: Progress | None = None, share: Share = (0, 1)
) -> PreparedDataset:
    """Turn `settings.input_images` into a PreparedDataset in `folder`, which appears whole or not at all.

    `stride` is what the sides of a trained picture are multiples of; `settings.resolution` and `settings.captioner`
    must be settled (not None, not "auto"). A folder that an earlier call made from the same input is used again if its
    pictures and captions are still what they were; else it is replaced, and of it and of what an interrupted call left
    every picture and caption is used again that would come out the same. Every file of the upload becomes an item, an
    aside or a reject. Of a data set (see `preprocessing.sources`) only `share` (which node of how many) is taken.
    Raises UserError for whatever the user can mend, above all where no picture is left.
    """
    if settings.resolution is None or settings.captioner == "auto":
        raise ValueError("the job settles resolution and captioner before it prepares")
    if not is_dataset(settings):
        check_source(settings.input_images)
    elif settings.concepts:
        raise UserError(f"concepts lie in folders of files, and {settings.input_images} is a data set: leave them out.")
    _check_target(folder, settings.input_images)
    for resolution in (settings.resolution, *settings.extra_resolutions):
        buckets(resolution, stride, settings.bucket_ratio)
    inputs = inputs_hash(settings, stride, share)
    earlier = _reusable(folder, inputs)
    if earlier:
        print(f"{folder}: used again as it is, {len(earlier.items)} pictures", file=sys.stderr)
        return earlier
    building, left, replaced = (
        folder.with_name(f".{folder.name}.{state}") for state in ("building", "left", "replaced")
    )
    _remove(replaced)
    if (building / WORK).is_dir():  # of a call that was interrupted
        _remove(left)
        building.rename(left)
    _remove(building)
    building.mkdir(parents=True)
    place = _place(settings, stride, building, tuple(one for one in (left, folder) if (one / WORK).is_dir()))
    bars = Bars(progress)
    try:
        dataset = _build(settings, place, (inputs, share), bars)
        if folder.exists():
            folder.rename(replaced)
        building.rename(folder)
        _remove(replaced)
        _remove(left)
    finally:
        bars.close()
        if not (building / WORK).is_dir():  # what is finished is kept for the next call
            _remove(building)
    return dataset.model_copy(update={"folder": folder})


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
        same = dataset.inputs_hash == inputs and is_intact(dataset)
    except (ValueError, OSError):  # written by another version, or damaged: made again
        return None
    return dataset if same else None


def _place(settings: PrepareSettings, stride: int, folder: Path, earlier: tuple[Path, ...]) -> Place:
    return Place(
        folder=folder,
        earlier=earlier,
        settings_hash=crops_hash(settings, stride),
        resolutions=(settings.resolution, *settings.extra_resolutions),
        stride=stride,
        ratio=settings.bucket_ratio,
        small_pictures=settings.small_pictures,
        upscales_by_model=settings.upscale_model is not None,
        mask_source=settings.mask_source,
        mask_background=settings.mask_background,
        crops_to_mask=settings.crops_to_mask,
        crop_margin=settings.crop_margin,
    )


def _build(settings: PrepareSettings, place: Place, origin: tuple[str, Share], report: Progress) -> PreparedDataset:
    inputs, share = origin
    unpacked_folder = place.folder / "unpacked"
    report("unpack", 0, 1)
    upload = open_dataset(settings, share) if is_dataset(settings) else open_upload(settings, unpacked_folder)
    report("unpack", 1, 1)
    concepts, parts = parted(upload, settings)
    cropped = [_crop_part(part, place, report) for part in parts]
    for scratch in (unpacked_folder, place.folder / "whole"):
        _remove(scratch)
    rejects = (*upload.rejects, *(one for _, unreadable, _ in cropped for one in unreadable))
    for part, (finished, _, _) in zip(parts, cropped, strict=True):
        if not finished:
            raise UserError(_nothing_left(part.settings[0].input_images, concepts, part, rejects))
    items: list[PreparedItem] = []
    for part, (finished, _, reused) in zip(parts, cropped, strict=True):
        items += _items(part, finished, reused, place, report)
    dataset = PreparedDataset(
        items=tuple(items),
        rejects=tuple(rejects),
        asides=tuple(upload.asides),
        trigger_word=next((one.trigger_word for one in concepts if not one.concepts), settings.trigger_word),
        concepts=concepts,
        resolution=settings.resolution,
        horizontal_flip=settings.horizontal_flip,
        dataset_hash=dataset_hash(items),
        inputs_hash=inputs,
        folder=place.folder,
    )
    dataset.save()
    dataset.write_captions(place.folder / CAPTIONS)
    return dataset


def _crop_part(part: Part, place: Place, report: Progress) -> tuple[list[Finished], list[Reject], int]:
    settings = part.settings[0]
    if part.concept is not None:  # its mask has words of its own
        place = replace(place, settings_hash=crops_hash(settings, place.stride))
    return _crop_all(part.upload, settings, place, report)


def _items(part: Part, finished: list[Finished], reused: int, place: Place, report: Progress) -> list[PreparedItem]:
    """A part's pictures with their captions."""
    settings = part.settings[0]
    said = Said(settings, place.folder, place.earlier)
    crops = {picture.name: place.folder / picture.cropped.crops[0].image for picture in finished}
    captions = caption_all(crops, part.upload.captions, settings, said, report)
    for other in part.settings[1:]:
        captions = {name: also_called(caption, other) for name, caption in captions.items()}
    if reused or said.reused:
        print(f"used again from an earlier run: {reused} pictures, {said.reused} captions", file=sys.stderr)
    return [
        _item(picture, crop, captions[picture.name], part) for picture in finished for crop in picture.cropped.crops
    ]


def _nothing_left(source: Path, concepts: Sequence[Concept], part: Part, rejects: Sequence[Reject]) -> str:
    if part.concept is not None:
        folder = concepts[part.concept].folder
        source, rejects = source / folder, [one for one in rejects if one.source.startswith(f"{folder}/")]
    if not rejects:
        return f"{source} holds no pictures: put some in."
    reasons = "; ".join(f"{reject.source}: {reject.reason}" for reject in rejects[:3])
    more = f"; and {len(rejects) - 3} more" if len(rejects) > 3 else ""
    return f"{source} holds no picture that can be used ({reasons}{more}): mend these or add others."


def _crop_all(
    upload: Upload, settings: PrepareSettings, place: Place, report: Progress
) -> tuple[list[Finished], list[Reject], int]:
    """Every picture as cropped or rejected, and how many of them were found finished."""
    tasks: Iterable = upload.tasks
    if place.mask_source == "text":
        from preprocessing.text_masks import with_text_masks

        tasks = with_text_masks(tasks, place, settings)
    work = Work(partial(crop_one, place=place), given_up)
    finished: list[Finished] = []
    rejects: list[Reject] = []
    small: list[Done] = []
    reused = 0
    with closing(run_all(work, tasks, processes(settings.workers, upload.count))) as results:
        for number, done in enumerate(results, 1):
            if isinstance(done.result, Reject):
                rejects.append(done.result)
            else:
                finished.append(Finished(done.name, done.result))
                reused += done.reused
                if not done.reused and any(pending_path(crop, place).exists() for crop in done.result.crops):
                    small.append(done)
            report("pictures", number, upload.count or 0)
    if small:
        enlarged = _enlarged(small, settings, place, report)
        finished = [Finished(one.name, enlarged.get(one.name, one.cropped)) for one in finished]
    return finished, rejects, reused


def _enlarged(small: list[Done], settings: PrepareSettings, place: Place, report: Progress) -> dict[str, Cropped]:
    """The small pictures, by name, after the model has enlarged them."""
    from preprocessing.upscaling import loaded_upscaler

    finished: dict[str, Cropped] = {}
    by_key: dict[str, Cropped] = {}
    with loaded_upscaler(settings.upscale_model) as upscaler:
        for number, done in enumerate(small, 1):
            if done.key in by_key:  # the same picture twice
                finished[done.name] = by_key[done.key]
                continue
            crops = []
            for crop in done.result.crops:
                path = pending_path(crop, place)
                if path.exists():
                    with Image.open(path) as image:
                        save(upscaler.enlarge(image.convert("RGB"), crop.size), place.folder / crop.image)
                    path.unlink()
                    crop = crop.model_copy(
                        update={"digest": digest_of(place.folder, crop.image, crop.mask, crop.conditions)}
                    )
                crops.append(crop)
            finished[done.name] = done.result.model_copy(update={"crops": tuple(crops)})
            by_key[done.key] = finished[done.name]
            finish(finished[done.name], done.key, place)
            report("enlarge", number, len(small))
    return finished


def _item(picture: Finished, crop: Crop, caption: Caption, part: Part) -> PreparedItem:
    cropped, upload = picture.cropped, part.upload
    return PreparedItem(
        image=crop.image,
        mask=crop.mask,
        conditions=crop.conditions,
        caption=caption.trained,
        original_caption=caption.original,
        caption_source=caption.source,
        caption_changes=caption.changes,
        source=picture.name,
        original_size=cropped.original_size,
        resized_size=crop.resized_size,
        crop=crop.crop,
        size=crop.size,
        repeats=upload.repeats.get(picture.name, 1),
        notes=cropped.notes,
        perceptual_hash=cropped.perceptual_hash,
        blur=cropped.blur,
        digest=crop.digest,
        class_label=upload.classes.get(picture.name),
        concept=part.concept,
    )


def merge(parts: Sequence[PreparedDataset], folder: Path) -> PreparedDataset:
    """The parts, each in a subfolder of `folder`, as one data set there: the shares of several nodes."""
    items = tuple(
        item.model_copy(
            update={
                "source": f"{part.folder.name}/{item.source}",
                "image": f"{part.folder.name}/{item.image}",
                "mask": f"{part.folder.name}/{item.mask}" if item.mask else None,
                "conditions": tuple(f"{part.folder.name}/{path}" for path in item.conditions),
            }
        )
        for part in parts
        for item in part.items
    )
    told = [
        one.model_copy(update={"source": f"{part.folder.name}/{one.source}"})
        for part in parts
        for one in (*part.rejects, *part.asides)
    ]
    merged = parts[0].model_copy(
        update={
            "items": items,
            "rejects": tuple(one for one in told if isinstance(one, Reject)),
            "asides": tuple(one for one in told if isinstance(one, Aside)),
            "dataset_hash": dataset_hash(items),
            "inputs_hash": hashlib.sha256("".join(part.inputs_hash for part in parts).encode()).hexdigest(),
            "folder": folder,
        }
    )
    merged.save()
    merged.write_captions(folder / CAPTIONS)
    return merged
