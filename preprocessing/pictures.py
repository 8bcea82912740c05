"""A picture file -> RGB in sRGB, upright, flattened on white, and its alpha channel where that shows anything."""

from __future__ import annotations

import errno
import functools
import io
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from preprocessing.limits import LIMITS, Limits

# Only formats that hold photographs or drawings: EPS would start an interpreter, TGA is told from noise by luck.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
# What decoders raise on malformed files; of OSError see `_is_damage`.
MALFORMED = (EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, struct.error)
DAMAGE = (OSError, *MALFORMED)
UPRIGHT_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PROFILE_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}
SRGB_NAMES = ("sRGB", "sRGB IEC61966-2.1", "sRGB built-in")


class UnreadablePicture(Exception):
    """The file gives no picture to train on; the message says why, to follow the file's name and a colon."""


@dataclass(frozen=True)
class Picture:
    """A decoded picture: `rgb`, and `alpha` ("L", 0 = transparent) of the same size unless it is opaque.

    `format` is Pillow's name of the format, `notes` say what was done to the picture.
    """

    rgb: Image.Image
    alpha: Image.Image | None
    format: str = ""
    notes: tuple[str, ...] = ()


def decode(source: Path | bytes, limits: Limits = LIMITS) -> Picture:
    """Read the picture in a file or in memory, whatever its name; of several frames the first.

    Raises UnreadablePicture where it is no picture, damaged, over the limit of pixels or wholly transparent.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
            kind, notes = image.format or "", _told(image)
            pixels = image.width * image.height
            if pixels > limits.pixels:
                raise UnreadablePicture(
                    f"{image.width} x {image.height} pixels, over the limit of {limits.pixels:,}: scale it down"
                )
            profile = image.info.get("icc_profile")
            upright = _upright(image)
            if upright is not image:
                notes.append("turned upright")
            alpha = _alpha(upright)
            flat = _eight_bit(upright)
            rgb = _srgb(flat, profile)
            if rgb is None:
                rgb = flat.convert("RGB")
            else:
                notes.append("its colour profile converted to sRGB")
    except UnidentifiedImageError as error:
        raise UnreadablePicture("not a picture of a known format") from error
    except PermissionError as error:
        raise UnreadablePicture("may not be read: change its permissions") from error
    except Image.DecompressionBombError as error:
        raise UnreadablePicture(f"over the limit of {limits.pixels:,} pixels: scale it down") from error
    except DAMAGE as error:
        if not _is_damage(error):
            raise
        raise UnreadablePicture(f"damaged ({str(error)[:100]})") from error
    if alpha is None:
        return Picture(rgb, None, kind, tuple(notes))
    if alpha.getextrema() == (0, 0):
        raise UnreadablePicture("wholly transparent")
    flat = Image.new("RGB", rgb.size, "white")
    flat.paste(rgb, mask=alpha)
    return Picture(flat, alpha, kind, (*notes, "transparency laid on white"))


def _told(image: Image.Image) -> list[str]:
    """What of a file is left behind by any decoding to 8 bits of RGB."""
    frames = getattr(image, "n_frames", 1)
    notes = [f"first of {frames} frames"] if frames > 1 else []
    if image.mode == "CMYK":
        notes.append("CMYK made RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        notes.append("more than 8 bits of grey scaled to 8")
    return notes


def is_picture(path: Path) -> bool:
    """Whether the file begins like a picture of a known format."""
    try:
        with Image.open(path, formats=_formats()):
            return True
    except Image.DecompressionBombError:
        return True
    except DAMAGE as error:
        if not _is_damage(error):
            raise
        return False


def _is_damage(error: Exception) -> bool:
    """Whether the file is at fault: what the machine reports has an errno, as have seeks to before the start."""
    return not isinstance(error, OSError) or error.errno in (None, errno.EINVAL)


def _upright(image: Image.Image) -> Image.Image:
    """The decoded picture turned by its EXIF orientation.

    ImageOps.exif_transpose would also write the EXIF data anew, and fails on photographs with one malformed tag.
    """
    image.load()
    try:
        method = UPRIGHT_BY.get(image.getexif().get(ExifTags.Base.Orientation))
    except MALFORMED:  # malformed EXIF data do not spoil the picture they are attached to
        return image
    return image if method is None else image.transpose(method)


@functools.cache
def _formats() -> tuple[str, ...]:
    from pillow_heif import register_heif_opener

    register_heif_opener()
    return (*FORMATS, "HEIF")


def _alpha(image: Image.Image) -> Image.Image | None:
    """The alpha channel, also a palette's or a transparent colour's; None where everything is opaque."""
    if not image.has_transparency_data or image.mode.startswith("I"):
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def _eight_bit(image: Image.Image) -> Image.Image:
    """The colours alone as RGB, L or CMYK with 8 bits a channel."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _scaled(image)
    if image.mode == "CMYK":
        return image
    if image.mode in ("1", "L", "LA"):
        return image.convert("L")
    if image.has_transparency_data:  # undoes premultiplied colours, and a palette's alpha would be warned about
        image = image.convert("RGBA")
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and floating-point grey -> L.

    The white of 16 bits is 65535. The wider modes do not say what white is: 1 for floats that stay within it, otherwise
    the smallest of 255 and 65535 that holds the brightest pixel, or that pixel itself.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    brightest = float(values.max())
    if image.mode.startswith("I;16"):
        white = 65535.0
    elif image.mode == "F" and brightest <= 1:
        white = 1.0
    else:
        white = next((white for white in (255.0, 65535.0) if brightest <= white), brightest)
    return Image.fromarray(np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8))


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image | None:
    """`image` (RGB, L or CMYK) as RGB in sRGB by its ICC profile, as viewers do; None where that is not needed, or not
    sound, or for other colours.
    """
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(source).strip()
        if name in SRGB_NAMES or source.profile.xcolor_space != PROFILE_SPACES[image.mode]:
            return None
        return ImageCms.profileToProfile(
            image,
            source,
            ImageCms.createProfile("sRGB"),
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            "RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError):  # a broken profile does not spoil the picture it is attached to
        return None
