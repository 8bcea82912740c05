"""Random draws that depend on (seed, step, position in the step) alone.

So the same step draws the same numbers on one process or two, with or without accumulation, on any device, and after
a resume, with no generator's state to save.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by everything in `key`."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def normal(shape: Sequence[int], *key: int | str) -> Tensor:
    """Standard normal numbers of a key, fp32; of a longer first dimension the first rows are those of a shorter one."""
    count = math.prod(shape)
    # torch draws in blocks of 16, and the last 16 anew where a block is not full
    return torch.randn(-(-count // 16) * 16, generator=generator(*key))[:count].reshape(tuple(shape))


@dataclass(frozen=True)
class Draw:
    """One sample's random numbers."""

    posterior: Tensor  # as the sample, [C, h, w] or [D]: picks the latents within their posterior
    noise: Tensor  # as the sample
    uniform: float  # [0, 1)
    drop_caption: float  # [0, 1)
    flip: float  # [0, 1)
    prompt: float  # [0, 1), picks a preserved prompt


def draw(seed: int, step: int | str, position: tuple[int, int], shape: torch.Size, noise_offset: float) -> Draw:
    """Draws of sample `position` = (index, count) of one optimiser step (or of what else is told by a name).

    Times are stratified: the step's samples lie evenly around one random offset, which lowers the variance of the
    gradient (low-discrepancy sampler, Kingma et al. 2021, arXiv:2107.00630, appendix I.1). `noise_offset` adds one
    normal number per channel, times it, to the noise.
    """
    index, count = position
    source = generator(seed, step, index)
    noise = torch.randn(shape, generator=source)
    posterior = torch.randn(shape, generator=source)
    coins = torch.rand(3, generator=source, dtype=torch.float64).tolist()
    if noise_offset:
        noise = noise + noise_offset * torch.randn(shape[0], *[1] * (len(shape) - 1), generator=source)
    shared = generator(seed, step, "time")
    offset = torch.rand((), generator=shared, dtype=torch.float64).item()
    order = torch.randperm(count, generator=shared)
    uniform = min((offset + order[index].item() / count) % 1.0, 1 - 2**-24)
    return Draw(posterior, noise, uniform, *coins)
