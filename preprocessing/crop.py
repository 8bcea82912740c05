"""One picture of the upload -> its crops and masks in the folder that is being built. Runs in worker processes.

Finished work is found again by content: everything that a picture becomes is named after the SHA-256 of its bytes and
of the settings, and a file `work/<name>.json`, written last, says that it is complete. A later run links what it finds.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, ValidationError

from preprocessing import masks, pairs, quality
from preprocessing.buckets import RATIO, Box, Fit, buckets, fit, is_enlarged, nearest, shown_size, smaller
from preprocessing.pictures import Picture, UnreadablePicture, decode
from preprocessing.prepared import Reject

PNG_LEVEL = 1  # these files are read soon and often and kept briefly
WORK, IMAGES, MASKS, CONDITIONS = "work", "images", "masks", "conditions"
NAME_LENGTH = 24  # hexadecimal digits of a hash in a file name
MUCH = 0.1  # a larger share of a picture than this that is cut away is told
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "TIFF": (".tif", ".tiff"),
    "HEIF": (".heic", ".heif", ".hif"),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
}


@dataclass(frozen=True)
class Task:
    """A picture of the upload: its name, its bytes or where they lie, the user's mask, one that was found, the user's
    conditions, and the pictures that its caption speaks of. Of a picture that is two side by side (see `pairs`), `half`
    is meant, and the other half is its condition.
    """

    name: str
    content: Path | bytes
    mask: Path | None = None
    found_mask: Path | None = None
    conditions: tuple[Path | bytes, ...] = ()
    references: tuple[Path, ...] = ()
    half: str | None = None


@dataclass(frozen=True)
class Place:
    """Where crops go and how they are made; `settings_hash` names all of it but the folders."""

    folder: Path
    earlier: tuple[Path, ...]  # folders of earlier runs in which finished work may lie
    settings_hash: str
    resolutions: tuple[int, ...]  # the main one first
    stride: int
    ratio: float = RATIO
    small_pictures: str = "keep"
    upscales_by_model: bool = False
    mask_source: str = "user"
    mask_background: float = 0.0
    crops_to_mask: bool = False
    crop_margin: float = 0.4


class Crop(BaseModel):
    """A cropped picture that lies in the folder; paths inside it, sizes and positions in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str
    mask: str | None
    conditions: tuple[str, ...] = ()
    digest: str  # SHA-256 of pixels, mask and conditions
    size: tuple[int, int]
    resized_size: tuple[int, int]
    crop: tuple[int, int]
    window: Box
    enlarged: float  # 1 or, where the picture was too small, how many times it was enlarged


class Cropped(BaseModel):
    """What a picture became: a crop a resolution, what was done to it, and what was measured of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    original_size: tuple[int, int]
    crops: tuple[Crop, ...]
    notes: tuple[str, ...]
    perceptual_hash: str  # 16 hexadecimal digits
    blur: float | None


@dataclass(frozen=True)
class Done:
    """The result of a task: what the picture became or why it is left out, and whether it was found finished."""

    name: str
    result: Cropped | Reject
    key: str = ""
    reused: bool = False


def crop_one(task: Task, place: Place) -> Done:
    """Decode a picture, find its mask, and write its crops; or link those of an earlier run."""
    key = key_of(task, place)
    found = _finished(key, place)
    if found is not None:
        return Done(task.name, found, key, reused=True)
    try:
        result = _cropped(task, place, key)
    except UnreadablePicture as error:
        return Done(task.name, Reject(source=task.name, reason=str(error)), key)
    if not any(_is_pending(crop, place) for crop in result.crops):
        finish(result, key, place)
    return Done(task.name, result, key)


def given_up(task: Task, reason: str) -> Done:
    """The result of a picture that could not be worked on."""
    return Done(task.name, Reject(source=task.name, reason=reason))


def is_finished(task: Task, place: Place) -> bool:
    """Whether the work on this picture will be found."""
    key = key_of(task, place)
    return any((folder / WORK / f"{key}.json").is_file() for folder in (place.folder, *place.earlier))


def key_of(task: Task, place: Place) -> str:
    """The name of everything that is made of the picture: by content, mask, conditions, ending and settings."""
    digest = hashlib.sha256(place.settings_hash.encode())
    digest.update(PurePosixPath(task.name).suffix.lower().encode() + b"\0")
    for content in (task.content, task.mask, *task.conditions):
        digest.update(_content_hash(content) if content is not None else bytes(32))
    for path in task.references:
        digest.update(b"reference" + _content_hash(path))
    digest.update((task.half or "").encode())
    return digest.hexdigest()[:NAME_LENGTH]


def _content_hash(content: Path | bytes) -> bytes:
    if isinstance(content, bytes):
        return hashlib.sha256(content).digest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _finished(key: str, place: Place) -> Cropped | None:
    """What an earlier run made of the picture, its files now in the folder too; None where that is not whole."""
    for folder in (place.folder, *place.earlier):
        record = folder / WORK / f"{key}.json"
        try:
            cropped = Cropped.model_validate_json(record.read_bytes())
            for crop in cropped.crops:
                if digest_of(folder, crop.image, crop.mask, crop.conditions) != crop.digest:
                    break
            else:
                if folder != place.folder:
                    for name in _files(cropped):
                        _link(folder / name, place.folder / name)
                    _link(record, place.folder / WORK / record.name)
                return cropped
        except (OSError, ValidationError):  # not there, or not whole: the work is done again
            continue
    return None


def _files(cropped: Cropped) -> Iterator[str]:
    for crop in cropped.crops:
        yield crop.image
        if crop.mask:
            yield crop.mask
        yield from crop.conditions


def _link(source: Path, target: Path) -> None:
    """`target` as another name of `source`, or a copy where the file system knows no links."""
    target.parent.mkdir(exist_ok=True)
    if target.exists():  # of a picture with the same content
        return
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:
        shutil.copyfile(source, target)


def _cropped(task: Task, place: Place, key: str) -> Cropped:
    picture, other = opened(task)
    mask, notes = _mask(task, picture, place)
    notes = [*_name_note(task.name, picture), *picture.notes, *notes]
    box = masks.box_of(mask) if mask is not None and place.crops_to_mask else None
    fits = _fits(picture.rgb.size, place, box)
    conditions = [_condition(content, picture.rgb.size) for content in task.conditions]
    conditions += [other] if other else []
    references = [_opened(path, "input image") for path in task.references]
    crops = [_written(picture, (mask, conditions, references), fitted, (key, place)) for fitted in fits]
    notes += _size_notes(fits[0], place)
    with Image.open(place.folder / crops[0].image) as image:
        shown = image.convert("RGB")
    return Cropped(
        original_size=picture.rgb.size,
        crops=tuple(crops),
        notes=tuple(notes),
        perceptual_hash=f"{quality.perceptual_hash(shown):016x}",
        blur=quality.blur(shown),
    )


def opened(task: Task) -> tuple[Picture, Image.Image | None]:
    """The task's picture, and the one beside it where it is one of two. Raises UnreadablePicture."""
    picture = decode(task.content)
    return (picture, None) if task.half is None else pairs.parted(picture, task.half)


def _name_note(name: str, picture: Picture) -> list[str]:
    suffix = PurePosixPath(name).suffix.lower()
    usual = SUFFIXES.get(picture.format, (f".{picture.format.lower()}",))
    return [] if not suffix or suffix in usual else [f"is {picture.format} although its name ends in {suffix}"]


def _mask(task: Task, picture: Picture, place: Place) -> tuple[Image.Image | None, list[str]]:
    """The mask of the whole picture, and what there is to say of it."""
    wanted = place.mask_source
    if wanted == "none":
        return None, []
    if task.mask is not None:
        try:
            return masks.read_mask(task.mask, picture.rgb.size), ["masked by the mask in the upload"]
        except UnreadablePicture as error:
            return None, [f"its mask is not used: {error}"]
    if wanted == "alpha":
        return picture.alpha, ["masked by its alpha channel"] if picture.alpha is not None else []
    if wanted == "face":
        mask = masks.face_mask(picture.rgb)
        return mask, ["masked by the faces found"] if mask is not None else ["no face found: trained without a mask"]
    if task.found_mask is not None:
        with Image.open(task.found_mask) as image:
            small = image.convert("L")
        return small.resize(picture.rgb.size, Image.Resampling.BILINEAR), ["masked by words"]
    return None, ["nothing of mask_prompt found: trained without a mask"] if wanted == "text" else []


def _fits(original: tuple[int, int], place: Place, box: Box | None) -> list[Fit]:
    """A fit a resolution; at the further ones only where the picture is not enlarged, and no size twice."""
    fits = [_main_fit(original, place, box)]
    for resolution in place.resolutions[1:]:
        size = nearest(original, buckets(resolution, place.stride, place.ratio))
        fitted = fit(original, size, box, place.crop_margin)
        if not is_enlarged(fitted) and size not in [one.size for one in fits]:
            fits.append(fitted)
    return fits


def _main_fit(original: tuple[int, int], place: Place, box: Box | None) -> Fit:
    resolution = place.resolutions[0]
    size = nearest(original, buckets(resolution, place.stride, place.ratio))
    fitted = fit(original, size, box, place.crop_margin)
    if not is_enlarged(fitted) or place.small_pictures == "upscale":
        return fitted
    told = "{} x {} pixels, fewer than its bucket's {} x {}".format(*original, *size)
    if place.small_pictures == "refuse":
        raise UnreadablePicture(f"{told}: give a larger one, or set small_pictures to keep or upscale")
    below = smaller(original, resolution, place.stride, place.ratio)
    if below is None:
        raise UnreadablePicture(
            f"{told} and than any smaller one's: give a larger one, or set small_pictures to upscale"
        )
    return fit(original, below, box, place.crop_margin)


def _size_notes(fitted: Fit, place: Place) -> list[str]:
    notes = []
    usual = nearest(fitted.original, buckets(place.resolutions[0], place.stride, place.ratio))
    if is_enlarged(fitted):
        way = "by the model" if place.upscales_by_model else "by Lanczos"
        notes.append(f"enlarged {fitted.scale:.2g} times {way}")
    elif fitted.size != usual:
        notes.append("small: trained at {} x {} in place of {} x {}".format(*fitted.size, *usual))
    if 1 - fitted.kept > MUCH:
        notes.append(f"{1 - fitted.kept:.0%} cut away")
    return notes


def _is_pending(crop: Crop, place: Place) -> bool:
    return crop.enlarged > 1 and place.upscales_by_model


def pending_path(crop: Crop, place: Place) -> Path:
    """Where the window of a small picture lies at its own size until the model has enlarged it."""
    return place.folder / WORK / f"{Path(crop.image).stem}.small.png"


def _condition(content: Path | bytes, size: tuple[int, int]) -> Image.Image:
    """A condition of a picture of `size`: of that size where it has the picture's shape, else a picture by itself."""
    condition = _opened(content, "condition")
    if abs(condition.width * size[1] / (condition.height * size[0]) - 1) > masks.RATIO_SLACK:
        return condition
    return condition if condition.size == size else condition.resize(size, Image.Resampling.LANCZOS)


def _opened(content: Path | bytes, what: str) -> Image.Image:
    """A picture that belongs to another one, as its `what`."""
    try:
        return decode(content).rgb
    except UnreadablePicture as error:
        raise UnreadablePicture(f"its {what} is {error}") from error


Beside = tuple[Image.Image | None, list[Image.Image], list[Image.Image]]


def _written(picture: Picture, beside: Beside, fitted: Fit, where: tuple[str, Place]) -> Crop:
    """The files of one crop; `beside` the picture are its mask, its conditions and its references."""
    (mask, conditions, references), (key, place) = beside, where
    name = "{}-{}x{}.png".format(key, *fitted.size)
    image, mask_name = f"{IMAGES}/{name}", None
    save(fitted.apply(picture.rgb), place.folder / image)
    if mask is not None:
        mask_name = f"{MASKS}/{name}"
        # Not Lanczos: its ringing would make a faint mask where there is none.
        smooth = fitted.apply(mask, Image.Resampling.BILINEAR)
        if place.mask_background:
            least = round(255 * place.mask_background)
            smooth = smooth.point(lambda value: max(least, value))
        save(smooth, place.folder / mask_name)
    sizes = [fitted.size] * len(conditions)
    resolution = math.isqrt(fitted.size[0] * fitted.size[1])
    sizes += [shown_size(one.size, resolution, place.stride) for one in references]
    names = tuple(f"{CONDITIONS}/{number}-{name}" for number in range(len(sizes)))
    for other, size, path in zip([*conditions, *references], sizes, names, strict=True):
        same = other.size == picture.rgb.size
        save(fitted.apply(other) if same else ImageOps.fit(other, size), place.folder / path)
    crop = Crop(
        image=image,
        mask=mask_name,
        conditions=names,
        digest=digest_of(place.folder, image, mask_name, names),
        size=fitted.size,
        resized_size=fitted.resized,
        crop=fitted.crop,
        window=fitted.window,
        enlarged=fitted.scale if is_enlarged(fitted) else 1.0,
    )
    if _is_pending(crop, place):
        save(picture.rgb.crop([round(edge) for edge in fitted.window]), pending_path(crop, place))
    return crop


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG whole: two pictures of the same content may be at it at the same time."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    image.save(temporary, "PNG", compress_level=PNG_LEVEL)
    temporary.replace(path)


def finish(cropped: Cropped, key: str, place: Place) -> None:
    """Write down that the work on a picture is complete."""
    path = place.folder / WORK / f"{key}.json"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    temporary.write_text(cropped.model_dump_json(), encoding="utf-8")
    temporary.replace(path)


def digest_of(folder: Path, image: str, mask: str | None, conditions: tuple[str, ...] = ()) -> str:
    """SHA-256 (hex) of the pixels of a crop, its mask and its conditions as they lie in `folder`.

    Of pixels and not of files, so that another PNG compressor makes no difference.
    """
    digest = hashlib.sha256()
    for name in (image, mask, *conditions):
        pixels = b""
        if name is not None:
            with Image.open(folder / name) as opened:
                pixels = f"{opened.mode} {opened.width} {opened.height} ".encode() + opened.tobytes()
        digest.update(len(pixels).to_bytes(8, "big") + pixels)
    return digest.hexdigest()
