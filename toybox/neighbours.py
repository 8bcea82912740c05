"""Start a FLUX transformer with heads that look at a token's neighbours.

With rotary positions (Su et al. 2021, arXiv:2104.09864) the product of a query and a key turns with the distance of
their tokens, so a query and a key that do not depend on what the tokens hold (the biases of their layers) make a head
look a fixed distance away. A transformer learns such heads by itself, from many more pictures than a convolution needs;
here it begins with them, as d'Ascoli et al. 2021 (ConViT, arXiv:2103.10697) do with another kind of positions.
"""

from __future__ import annotations

import math

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

ROTARY_BASE = 10000.0  # of diffusers' FluxPosEmbed
BESIDE = ((1, 0), (-1, 0), (0, 1), (0, -1))  # rows down, columns to the right; of one block
ACROSS = ((1, 1), (-1, -1), (1, -1), (-1, 1))  # of the next
ENERGY = (0.3, 0.2)  # of the fastest and the second rotation of each axis: the first tells neighbours apart, the second
# a neighbour from a token six further on, where the first has turned once
CONTENT = 0.4  # what is left of these heads' weights, so that content still counts
SHARPNESS = 1.5  # of queries and of keys, after their norms


def look_at_neighbours(transformer: FluxTransformer2DModel) -> None:
    """Make as many heads of each block as there are offsets look one token away, in eight directions in two blocks."""
    config = transformer.config
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for number, block in enumerate(blocks):
        block.attn.norm_q.weight.data.fill_(SHARPNESS)
        block.attn.norm_k.weight.data.fill_(SHARPNESS)
        for head, offset in enumerate(BESIDE if number % 2 == 0 else ACROSS):
            place = slice(head * config.attention_head_dim, (head + 1) * config.attention_head_dim)
            query, key = query_and_key(offset, tuple(config.axes_dims_rope))
            _set(block.attn.to_q, place, query)
            _set(block.attn.to_k, place, key)


def query_and_key(offset: tuple[int, int], axes: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Both [sum of axes], of length sqrt(sum of axes) as after a norm: their product, each turned by its token's
    place, is greatest where the key lies `offset` (rows, columns) from the query.
    """
    width, start = sum(axes), axes[0]
    query, key = torch.zeros(width), torch.zeros(width)
    for distance, axis in zip(offset, axes[1:], strict=True):
        for turn, energy in enumerate(ENERGY):
            angle = distance * ROTARY_BASE ** (-2 * turn / axis)
            length, pair = math.sqrt(width * energy), start + 2 * turn
            query[pair], query[pair + 1] = length * math.cos(angle), length * math.sin(angle)
            key[pair] = length
        start += axis
    return query, key


@torch.no_grad()
def _set(layer: nn.Linear, place: slice, bias: torch.Tensor) -> None:
    layer.weight[place] *= CONTENT
    layer.bias[place] = bias
