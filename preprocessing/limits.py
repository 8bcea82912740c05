"""What an upload may cost: the bounds that keep a hostile or mistaken archive from filling memory or disk."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024**2


@dataclass(frozen=True)
class Limits:
    """Bounds on one upload. Beyond the pixels one picture is left out; beyond any other the upload is refused."""

    members: int = 20_000  # files and folders
    total_bytes: int = 20 * 1024 * MIB  # unpacked
    streamed_bytes: int = 1024 * MIB  # of one file in a shard, which is read into memory
    ratio: float = 100.0  # unpacked bytes to packed bytes ...
    ratio_free_bytes: int = 128 * MIB  # ... once this much is unpacked: a plain-coloured BMP shrinks 1000 times too
    pixels: int = 89_478_485  # of one picture; the size from which Pillow warns too
    table_bytes: int = 64 * MIB  # of captions.csv, metadata.jsonl and the like
    caption_bytes: int = 16_384  # of one caption: far beyond what any text encoder reads


LIMITS = Limits()
