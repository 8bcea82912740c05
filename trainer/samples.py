"""The units that flow through training: a picture to encode, a cached sample, a batch on the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from preprocessing.prepared import PreparedDataset, PreparedItem

Conditioning = dict[str, Tensor]


@dataclass(frozen=True)
class Picture:
    """One prepared picture. Sizes and crop are (height, width) and (top, left) in pixels of the prepared picture."""

    pixels: Tensor  # [3, H, W] in [-1, 1]
    mask: Tensor | None  # [1, H, W] in [0, 1]
    original_size: tuple[int, int]
    crop: tuple[int, int]
    conditions: tuple[Tensor, ...] = ()  # pictures uploaded beside it, [3, H, W] in [-1, 1]
    class_label: int | None = None


@dataclass(frozen=True)
class Sample:
    """What is cached of one picture: everything of it that training reads."""

    mean: Tensor  # posterior of the latents, scaled as the denoiser sees them: [C, h, w], or [D] for a vector
    std: Tensor  # as the mean, or of a shape that broadcasts to it
    caption: str
    mask: Tensor | None = None  # [1, h, w]
    conditioning: Conditioning = field(default_factory=dict)  # per-sample tensors without a batch dimension


@dataclass(frozen=True)
class Batch:
    """Samples of one size on the device, with this step's random draws."""

    data: Tensor  # [B, C, h, w], or [B, D] for vectors
    noise: Tensor  # as the data
    uniform: Tensor  # [B] in [0, 1): becomes the time
    captions: list[str]
    mask: Tensor | None
    conditioning: Conditioning  # [B, ...]
    preserved: list[tuple[int, str]]  # sample of the batch, prompt whose prediction should stay the base model's
    keys: tuple[str, ...] = ()  # of each sample's own random numbers, for a method that draws some


def padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors filled up with zeros at the ends of their dimensions to one shape; untouched where they have one."""
    shape = [max(sides) for sides in zip(*(tensor.shape for tensor in tensors), strict=True)]
    filled = []
    for tensor in tensors:
        missing = [most - side for most, side in zip(shape, tensor.shape, strict=True)]
        pairs = [end for side in reversed(missing) for end in (0, side)]
        filled.append(nn.functional.pad(tensor, pairs) if any(missing) else tensor)
    return filled


def load_pictures(dataset: PreparedDataset, flip: bool = False) -> Iterator[tuple[PreparedItem, Picture]]:
    """Read the prepared pictures in order, mirrored if `flip`."""
    for item in dataset.items:
        pixels = _read(dataset.folder / item.image, "RGB") * 2 - 1
        mask = _read(dataset.folder / item.mask, "L") if item.mask else None
        conditions = tuple(_read(dataset.folder / path, "RGB") * 2 - 1 for path in item.conditions)
        left, top = item.crop
        if flip:
            pixels, mask = pixels.flip(-1), None if mask is None else mask.flip(-1)
            conditions = tuple(condition.flip(-1) for condition in conditions)
            left = item.resized_size[0] - item.size[0] - left
        yield item, Picture(pixels, mask, item.original_size[::-1], (top, left), conditions, item.class_label)


def _read(path: Path, mode: str) -> Tensor:
    """A picture file as [C, H, W] in [0, 1]."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert(mode), dtype=np.float32) / 255
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).contiguous()
