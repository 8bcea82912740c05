"""The frequency prior: how strong which frequencies are in the pixels above a row."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW = 8  # pixels on a side, as in JPEG
FREQUENCIES = 16  # the lowest of WINDOW * WINDOW
FLOOR = 1e-3  # energy below which a frequency counts as absent


def dct_bank(window: int, count: int) -> Tensor:
    """The `count` lowest two-dimensional DCT-II functions, orthonormal: [count, window, window]."""
    position = torch.arange(window, dtype=torch.float64)
    waves = torch.cos(math.pi / window * (position + 0.5) * position[:, None]) * math.sqrt(2 / window)
    waves[0] /= math.sqrt(2)
    order = sorted((u + v, u, v) for u in range(window) for v in range(window))[:count]
    return torch.stack([torch.outer(waves[u], waves[v]) for _, u, v in order]).float()


class FrequencyPrior(nn.Module):
    """Signed DCT coefficients and their log energies over the WINDOW rows strictly above, through a learned 1x1.

    The transform is fixed and local and sees no pixel of the row it speaks for, so it leaks none; the model's other
    layers may only look where it looks or earlier.
    """

    def __init__(self, channels: int, outputs: int):
        super().__init__()
        self.register_buffer("bank", dct_bank(WINDOW, FREQUENCIES)[:, None], persistent=False)
        self.project = nn.Linear(2 * FREQUENCIES * channels, outputs)
        self.rows_above = WINDOW - 1

    def forward(self, x: Tensor) -> Tensor:
        """Pixels already moved down by one row, [B, H, W, channels] -> [B, H, W, outputs]."""
        return self._features(F.pad(x, (0, 0, 0, 0, self.rows_above, 0)))

    def row(self, x: Tensor, lines: Tensor) -> tuple[Tensor, Tensor]:
        """One row [B, 1, W, channels] and the WINDOW - 1 before it -> its features, and the lines for the next row."""
        window = torch.cat([lines, x], dim=1)
        return self._features(window), window[:, 1:]

    def _features(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[0], x.shape[-1]
        planes = F.pad(x, (0, 0, WINDOW // 2, WINDOW - 1 - WINDOW // 2)).permute(0, 3, 1, 2).flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):  # a logarithm of bf16 differences would be noise
            waves = F.conv2d(planes.float()[:, None], self.bank.float())
            features = torch.cat([waves, torch.log(waves.square() + FLOOR) / 4], dim=1)
        features = features.unflatten(0, (batch, channels)).permute(0, 3, 4, 1, 2).flatten(3)
        return self.project(features.to(self.project.weight.dtype))
