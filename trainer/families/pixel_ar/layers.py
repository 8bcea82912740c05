"""Causal convolutions and fusion with text, each for a whole picture at once and for one row or pixel at a time.

Features are [B, H, W, C]: a linear layer takes them as they are, and a convolution's weight is that of a linear layer
over its window, so that one parameter serves both ways.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def below(x: Tensor) -> Tensor:
    """[B, H, W, C] moved down by one row: row i holds what row i - 1 held, the first one zeros."""
    return F.pad(x, (0, 0, 0, 0, 1, 0))[:, :-1]


def beside(x: Tensor) -> Tensor:
    """[B, H, W, C] moved right by one column: column j holds what column j - 1 held, the first one zeros."""
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


class RowConv(nn.Module):
    """A convolution over a position's own row and rows above it, as wide to the left as to the right."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], dilation: int = 1):
        super().__init__()
        self.kernel, self.dilation = kernel, dilation
        self.linear = nn.Linear(kernel[0] * kernel[1] * inputs, outputs)
        self.rows_above = (kernel[0] - 1) * dilation

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, outputs]."""
        return self._conv(F.pad(x, (0, 0, 0, 0, self.rows_above, 0)))

    def row(self, x: Tensor, lines: Tensor) -> tuple[Tensor, Tensor]:
        """One row [B, 1, W, C] and the `rows_above` rows before it -> its output, and the lines for the next row."""
        window = torch.cat([lines, x], dim=1)
        return self._conv(window), window[:, 1:]

    def _conv(self, x: Tensor) -> Tensor:
        side = self.kernel[1] // 2 * self.dilation
        weight = self.linear.weight.view(self.linear.out_features, *self.kernel, -1).permute(0, 3, 1, 2)
        out = F.conv2d(
            F.pad(x, (0, 0, side, side)).permute(0, 3, 1, 2), weight, self.linear.bias, dilation=self.dilation
        )
        return out.permute(0, 2, 3, 1)


class ColumnConv(nn.Module):
    """A convolution over a position and the columns to its left, within its row."""

    def __init__(self, inputs: int, outputs: int, width: int, dilation: int = 1):
        super().__init__()
        self.width, self.dilation = width, dilation
        self.linear = nn.Linear(width * inputs, outputs)
        self.columns_left = (width - 1) * dilation

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, outputs]."""
        padded = F.pad(x, (0, 0, self.columns_left, 0)).permute(0, 3, 1, 2)
        weight = self.linear.weight.view(self.linear.out_features, 1, self.width, -1).permute(0, 3, 1, 2)
        return F.conv2d(padded, weight, self.linear.bias, dilation=self.dilation).permute(0, 2, 3, 1)

    def pixel(self, x: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """One position [B, 1, C] and the `columns_left` before it -> its output [B, outputs], and the next left."""
        window = torch.cat([left, x], dim=1)
        return self.linear(window[:, :: self.dilation].flatten(1)), window[:, 1:]


def gated(x: Tensor) -> Tensor:
    """tanh of one half of the channels times the sigmoid of the other (van den Oord et al. 2016, arXiv:1606.05328,
    eq. 2).
    """
    value, gate = x.chunk(2, dim=-1)
    return torch.tanh(value) * torch.sigmoid(gate)


class TextFusion(nn.Module):
    """Each position looks at the words with its own query; a gate of its features and of what it saw lets them in.

    The last layer begins as zeros, so that a model given text anew begins as the one it was without.
    """

    def __init__(self, channels: int, text_channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(text_channels, 2 * channels)
        self.gate = nn.Linear(2 * channels, channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def words(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, L, C / heads] of the words [B, L, text_channels]."""
        key, value = (self._split(part) for part in self.key_value(text).chunk(2, dim=-1))
        return key, value

    def forward(self, x: Tensor, words: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """[B, H, W, C] with the words let in; `mask` [B, 1, 1, L] is true where there is a word."""
        normed = self.norm(x).flatten(1, 2)
        seen = F.scaled_dot_product_attention(self._split(self.query(normed)), *words, attn_mask=mask)
        seen = seen.transpose(1, 2).flatten(2)
        gate = torch.sigmoid(self.gate(torch.cat([normed, seen], dim=-1)))
        return x + self.out(gate * seen).unflatten(1, x.shape[1:3])

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
