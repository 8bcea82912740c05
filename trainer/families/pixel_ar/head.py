"""From a pixel's features to its channels' values, one after the other: p(R | h) p(G | h, R) p(B | h, R, G)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SubPixelHead(nn.Module):
    """A softmax over `levels` values for each channel, told the channels before it by an embedding of their values."""

    def __init__(self, inputs: int, channels: int, levels: int):
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.features = nn.ModuleList(nn.Linear(inputs, inputs) for _ in range(channels))
        self.earlier = nn.ModuleList(
            nn.ModuleList(nn.Embedding(levels, inputs) for _ in range(channel)) for channel in range(channels)
        )
        self.logits = nn.ModuleList(nn.Linear(inputs, levels) for _ in range(channels))

    def channel(self, hidden: Tensor, values: list[Tensor]) -> Tensor:
        """Logits [..., levels] of the channel after those whose `values` [...] are given; `hidden` is normed."""
        index = len(values)
        features = self.features[index](hidden)
        for embedding, value in zip(self.earlier[index], values, strict=True):
            features = features + embedding(value).to(features.dtype)
        return self.logits[index](F.gelu(features))

    def forward(self, hidden: Tensor, values: Tensor) -> list[Tensor]:
        """Features [..., C] and values [..., channels] -> logits [..., levels] of each channel."""
        hidden = self.norm(hidden)
        return [self.channel(hidden, [values[..., k] for k in range(channel)]) for channel in range(len(self.features))]
