"""The causal trunk: a vertical stack that sees the rows above, and a horizontal one that sees its row to the left.

             columns                   a position's features depend on every v (vertical) and h (horizontal)
        v v v v v v v                  pixel before it and on no other: no blind spot (van den Oord et al. 2016,
   rows v v v v v v v                  arXiv:1606.05328, 2.2). The words and the frequency prior enter through the
        h h h .                        vertical stack, once a row.

The picture is moved down by a row for the one and right by a column for the other before any layer sees it; from there
on a layer may look at its own position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trainer.families.pixel_ar.layers import ColumnConv, RowConv, TextFusion, below, beside, gated
from trainer.families.pixel_ar.prior import FrequencyPrior

VERTICAL_KERNEL = (2, 3)
HORIZONTAL_KERNEL = 3
DILATIONS = (1, 2, 4)  # in turn: nine layers see 21 rows above and 21 columns to each side
FUSION_EVERY = 3  # layers: every one takes in the pooled words, every third looks at them one by one
COORDINATE_OCTAVES = 6


@dataclass(frozen=True)
class TrunkShape:
    """What a trunk is made of; `text_channels` and `condition_channels` are 0 where there is nothing to read."""

    channels: int  # of a pixel
    levels: int
    hidden_dim: int
    num_layers: int
    heads: int
    use_frequency_prior: bool
    text_channels: int
    condition_channels: int
    dropout: float


@dataclass(frozen=True)
class Condition:
    """What a picture is drawn for: words [B, L, D] with their mask [B, 1, 1, L], and one vector [B, E]; or nothing."""

    words: Tensor | None = None
    mask: Tensor | None = None
    vector: Tensor | None = None


def waves(x: Tensor, octaves: int) -> Tensor:
    """[..., C] in [-1, 1] -> [..., C * (1 + 2 * octaves)]: itself, and sines and cosines of rising frequency."""
    angles = math.pi * x[..., None] * 2.0 ** torch.arange(octaves, device=x.device)
    return torch.cat([x, angles.sin().flatten(-2), angles.cos().flatten(-2)], dim=-1)


class Layer(nn.Module):
    """One gated layer of both stacks."""

    def __init__(self, shape: TrunkShape, index: int):
        super().__init__()
        width, dilation = shape.hidden_dim, DILATIONS[index % len(DILATIONS)]
        self.v_norm, self.h_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.v_conv = RowConv(width, 2 * width, VERTICAL_KERNEL, dilation)
        self.h_conv = ColumnConv(width, 2 * width, HORIZONTAL_KERNEL, dilation)
        self.v_out, self.h_out = nn.Linear(width, width), nn.Linear(width, width)
        self.link = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(shape.dropout)
        self.fusion = self.film = None
        if shape.text_channels and index % FUSION_EVERY == 0:
            self.fusion = TextFusion(width, shape.text_channels, shape.heads)
        if shape.condition_channels:
            self.film = nn.Linear(shape.condition_channels, 4 * width)
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)

    def shifts(self, condition: Condition) -> tuple[Tensor | float, Tensor | float]:
        """What the condition adds to both stacks before their gates: [B, 1, 1, 2 C] each, or 0."""
        if self.film is None:
            return 0.0, 0.0
        return self.film(condition.vector)[:, None, None].chunk(2, dim=-1)

    def words(self, condition: Condition) -> tuple[Tensor, Tensor] | None:
        return None if self.fusion is None else self.fusion.words(condition.words)

    def vertical(self, v: Tensor, convolved: Tensor, told: Told) -> tuple[Tensor, Tensor]:
        """The vertical stack's features after this layer, and what the horizontal one takes from them."""
        v = v + self.v_out(self.dropout(gated(convolved + told.v_shift)))
        if self.fusion is not None:
            v = self.fusion(v, told.words, told.mask)
        return v, self.link(v) + told.h_shift

    def forward(self, v: Tensor, h: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        v, link = self.vertical(v, self.v_conv(self.v_norm(v)), Told.of(self, condition))
        convolved = self.h_conv(self.h_norm(h)) + link
        return v, h + self.h_out(self.dropout(gated(convolved)))


@dataclass(frozen=True)
class Told:
    """A condition as one layer reads it: worked out once for a picture."""

    words: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    v_shift: Tensor | float
    h_shift: Tensor | float

    @classmethod
    def of(cls, layer: Layer, condition: Condition) -> Told:
        return cls(layer.words(condition), condition.mask, *layer.shifts(condition))


class Trunk(nn.Module):
    """Values of pixels -> features [B, H, W, C] that tell, of each position, what its pixel may be."""

    def __init__(self, shape: TrunkShape):
        super().__init__()
        self.shape = shape
        width = shape.hidden_dim
        self.octaves = max(1, math.ceil(math.log2(shape.levels)) - 1)
        pixel_width = shape.channels * (1 + 2 * self.octaves) + 1
        self.v_in = RowConv(pixel_width, width, VERTICAL_KERNEL)
        self.h_in = ColumnConv(pixel_width, width, HORIZONTAL_KERNEL)
        self.v_place = nn.Linear(2 * (1 + 2 * COORDINATE_OCTAVES), width)
        self.h_place = nn.Linear(2 * (1 + 2 * COORDINATE_OCTAVES), width)
        self.prior = FrequencyPrior(shape.channels, width) if shape.use_frequency_prior else None
        self.layers = nn.ModuleList(Layer(shape, index) for index in range(shape.num_layers))
        self.gradient_checkpointing = False

    def scaled(self, values: Tensor) -> Tensor:
        """Values 0 .. levels - 1 -> [-1, 1]."""
        return values.float() * (2 / (self.shape.levels - 1)) - 1

    def pixel_features(self, scaled: Tensor) -> Tensor:
        """[..., channels] -> [..., F]; a one tells a pixel from what lies outside of the picture, which is zeros."""
        return torch.cat([waves(scaled, self.octaves), torch.ones_like(scaled[..., :1])], dim=-1)

    def places(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """What both stacks are told of where a pixel lies: [1, H, W, C] each."""
        rows = (torch.arange(height, device=device) + 0.5) * (2 / height) - 1
        columns = (torch.arange(width, device=device) + 0.5) * (2 / width) - 1
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        features = waves(grid, COORDINATE_OCTAVES)[None].to(self.v_place.weight.dtype)
        return self.v_place(features), self.h_place(features)

    def forward(self, values: Tensor, condition: Condition) -> Tensor:
        """Values [B, H, W, channels] -> [B, H, W, C]."""
        scaled = self.scaled(values)
        pixels = self.pixel_features(scaled).to(self.v_place.weight.dtype)
        v_place, h_place = self.places(*values.shape[1:3], values.device)
        v = self.v_in(below(pixels)) + v_place
        if self.prior is not None:
            v = v + self.prior(below(scaled))
        h = self.h_in(beside(pixels)) + h_place
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                v, h = self._gradient_checkpointing_func(layer, v, h, condition)
            else:
                v, h = layer(v, h, condition)
        return h


@dataclass
class Lines:
    """What is kept of earlier rows: the last ones of each vertical layer's input, as many as its window is high."""

    pixels: Tensor
    prior: Tensor | None
    layers: list[Tensor] = field(default_factory=list)


class Cached:
    """A trunk that goes over pictures pixel by pixel and works out nothing twice.

    `row` gives what the rows above tell of a whole row; within it, `pixel` gives one position's features after another.
    """

    def __init__(self, trunk: Trunk, condition: Condition, size: tuple[int, int, int]):
        """`size` is (B, H, W)."""
        self._trunk, (self._batch, height, self._width) = trunk, size
        weight = trunk.v_place.weight
        self._v_places, self._h_places = trunk.places(height, self._width, weight.device)
        self._told = [Told.of(layer, condition) for layer in trunk.layers]
        # in fp32 whatever the weights are: the waves of a value rounded to bf16 are other waves
        self._empty = weight.new_zeros(self._batch, 1, self._width, trunk.shape.channels, dtype=torch.float32)
        features = trunk.v_in.linear.in_features // math.prod(VERTICAL_KERNEL)
        self._zeros = self._blank(1, features)
        self._lines = Lines(
            self._blank(trunk.v_in.rows_above, features),
            None if trunk.prior is None else self._empty.expand(-1, trunk.prior.rows_above, -1, -1),
            [self._blank(layer.v_conv.rows_above, trunk.shape.hidden_dim) for layer in trunk.layers],
        )

    def _blank(self, rows: int, channels: int) -> Tensor:
        return self._trunk.v_place.weight.new_zeros(self._batch, rows, self._width, channels)

    def rows(self, values: Tensor) -> Iterator[Row]:
        """Each row in turn, while `values` [B, H, W, channels] are filled in."""
        trunk, lines = self._trunk, self._lines
        for i in range(values.shape[1]):
            scaled = trunk.scaled(values[:, i - 1 : i]) if i else self._empty
            pixels = trunk.pixel_features(scaled).to(self._zeros.dtype) if i else self._zeros
            v, lines.pixels = trunk.v_in.row(pixels, lines.pixels)
            v = v + self._v_places[:, i : i + 1]
            if trunk.prior is not None:
                seen, lines.prior = trunk.prior.row(scaled, lines.prior)
                v = v + seen
            links = []
            for index, (layer, told) in enumerate(zip(trunk.layers, self._told, strict=True)):
                convolved, lines.layers[index] = layer.v_conv.row(layer.v_norm(v), lines.layers[index])
                v, link = layer.vertical(v, convolved, told)
                links.append(link[:, 0])
            yield Row(trunk, links, self._h_places[:, i])


class Row:
    """One row's positions from left to right."""

    def __init__(self, trunk: Trunk, links: list[Tensor], places: Tensor):
        self._trunk, self._links, self._places = trunk, links, places
        batch = links[0].shape[0]
        features = trunk.h_in.linear.in_features // HORIZONTAL_KERNEL
        self._pixels = places.new_zeros(batch, trunk.h_in.columns_left, features)
        self._outside = places.new_zeros(batch, 1, features)
        self._left = [
            places.new_zeros(batch, layer.h_conv.columns_left, trunk.shape.hidden_dim) for layer in trunk.layers
        ]

    def pixel(self, column: int, before: Tensor | None) -> Tensor:
        """Features [B, C] of the position; `before` are the values [B, channels] of the one to its left, if any."""
        trunk = self._trunk
        pixels = self._outside
        if before is not None:
            pixels = trunk.pixel_features(trunk.scaled(before))[:, None].to(self._outside.dtype)
        h, self._pixels = trunk.h_in.pixel(pixels, self._pixels)
        h = h + self._places[:, column]
        for index, layer in enumerate(trunk.layers):
            convolved, self._left[index] = layer.h_conv.pixel(layer.h_norm(h)[:, None], self._left[index])
            h = h + layer.h_out(gated(convolved + self._links[index][:, column]))
        return h
