"""What the pages of the reports share: templates, times for people, pictures inside the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from jinja2 import Environment

LOSSLESS_SIDE = 256  # pixels; pictures up to this side are kept as PNG


@dataclass(frozen=True)
class Shown:
    """A picture in a page; width and height are those of the file, in pixels."""

    address: str
    width: int
    height: int


def environment(folder: Path) -> Environment:
    """Templates from `folder`, and from this one what all pages share (page.css); names and captions are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["duration"] = duration
    return made


def duration(seconds: float) -> str:
    """A time for people: "0.42 s", "12.3 s", "2 min 5 s", "1 h 3 min"."""
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def shown(picture: Path | Image.Image, side: int) -> Shown:
    """A picture (of a file, or RGB) for a page, made smaller until its longer side has `side` pixels."""
    if isinstance(picture, Path):
        with Image.open(picture) as opened:
            picture = opened.convert("RGB")
    width, height = picture.size
    smaller = picture.copy()
    smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind, options = ("png", {"optimize": True}) if max(smaller.size) <= LOSSLESS_SIDE else ("jpeg", {"quality": 88})
    encoded = io.BytesIO()
    smaller.save(encoded, kind, **options)
    return Shown(address(f"image/{kind}", encoded.getvalue()), width, height)


def address(media_type: str, content: bytes) -> str:
    """The content as an address that a page can hold."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
