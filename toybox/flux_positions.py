"""Absolute positions for the toybox's FLUX.

FLUX knows positions by rotary embedding alone, that is, relative to other tokens. Its one fixed point is the text, all
of which lies at the origin: an image token can tell where it is by which text tokens it attends to, if some are always
the same and differ among themselves. At this size training does not find that (after 16,000 steps a linear probe missed
a token's place by two tokens of eight, and shapes came out blurred), so every text ends in eight register tokens (after
Darcet et al. 2023, arXiv:2309.16588), and the first single block starts as the layer that reads rows and columns off
them; it is trained like any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from tokenizers import processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5Tokenizer

REGISTERS = 8  # as many as the picture has rows and columns of tokens
END = "</s>"
MARK_SHARE = 0.3  # of a key's squared length: says whether the token is a register; the rest says which
FREQUENCIES = (0.5, 0.4, 0.1)  # shares of the rotary frequencies (1, 0.27 and 0.07 radians a token)
SHARPNESS = 2.0  # the attention's logits, times that
SHARE = 1.0  # size of what is written, beside the tokens' own


def with_registers(tokenizer: T5Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer, every text of which ends in the registers; a T5Tokenizer would forget them when loaded."""
    registers = [f"<register_{index}>" for index in range(REGISTERS)]
    tokenizer.add_tokens(registers, special_tokens=True)
    inner = tokenizer.backend_tokenizer
    special = [(token, inner.token_to_id(token)) for token in (END, *registers)]
    inner.post_processor = processors.TemplateProcessing(
        single=["$A", END, *registers], pair=["$A", "$B", END, *registers], special_tokens=special
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=tokenizer.model_max_length,
        pad_token=tokenizer.pad_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
    )


def _targets(dim: int, first_axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """For rows, then columns: the query [2, dim], the registers' keys [2, R, dim]; then any other token's key [dim].

    Turned by its token's place y, the query meets the key of register j in sum_f share_f cos(f (y - j)).
    """
    pairs = (dim - first_axis) // 4  # of numbers that are turned together, for each of the two axes
    query, keys, other = torch.zeros(2, dim), torch.zeros(2, REGISTERS, dim), torch.zeros(dim)
    other[0] = -1.0
    place = torch.arange(REGISTERS)
    for axis in range(2):
        query[axis, 0] = keys[axis, :, 0] = math.sqrt(MARK_SHARE)
        for index, share in enumerate(FREQUENCIES):
            size, angle = math.sqrt((1 - MARK_SHARE) * share), place * 10_000 ** (-index / pairs)
            real = first_axis + 2 * (axis * pairs + index)
            query[axis, real] = size
            keys[axis, :, real], keys[axis, :, real + 1] = size * angle.cos(), size * angle.sin()
    return query, keys, other


@dataclass(frozen=True)
class Seen:
    """What a block saw of some tokens of text and picture: what its attention was given [N, D], the tokens' root mean
    square, and which register each is [N], -1 for none.
    """

    states: Tensor
    size: float
    registers: Tensor


@torch.no_grad()
def install(block: FluxSingleTransformerBlock, first_axis: int, seen: Seen) -> None:
    """Make the block's first two heads write each token's row and column, and the block nothing else.

    Keys and values are fitted to the tokens seen by least squares. `first_axis`: numbers of a head that are not turned.
    """
    attention, width, known = block.attn, seen.states.shape[1], seen.registers >= 0
    dim, which = width // attention.heads, seen.registers.clamp(min=0)
    query, keys, other = _targets(dim, first_axis)
    value = nn.functional.one_hot(which, dim) * known[:, None]
    weight = torch.where(known, (~known).sum() / known.sum(), 1.0).sqrt()[:, None]  # both kinds count alike
    inputs = torch.cat([seen.states, torch.ones(len(known), 1)], dim=1) * weight
    written = nn.init.orthogonal_(torch.empty(width, 2 * REGISTERS)) * SHARE * seen.size * math.sqrt(width)
    block.proj_out.weight.zero_()
    for axis in range(2):
        rows = slice(axis * dim, (axis + 1) * dim)
        attention.to_q.weight[rows], attention.to_q.bias[rows] = 0.0, query[axis]
        key = torch.where(known[:, None], keys[axis, which], other)
        for layer, wanted in ((attention.to_k, key), (attention.to_v, value.float())):
            found = torch.linalg.lstsq(inputs, wanted * weight).solution
            layer.weight[rows], layer.bias[rows] = found[:-1].T, found[-1]
        block.proj_out.weight[:, axis * dim : axis * dim + REGISTERS] = written[:, axis * REGISTERS :][:, :REGISTERS]
    for norm in (attention.norm_q, attention.norm_k):
        norm.weight.fill_(math.sqrt(SHARPNESS))
    block.norm.linear.bias[-width:] = 1.0  # the gate
