"""Where in a picture new tokens are attended to, read off a denoiser's cross-attention while it predicts.

After DAAM (Tang et al. 2022, arXiv:2210.04885), whose maps these are, and the loss on them of Break-A-Scene (Avrahami
et al. 2023, arXiv:2305.16311), of which only the side outside of the mask is kept here, as a share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from preprocessing.errors import UserError


class TokenMaps:
    """Queries and keys of cross-attention layers, taken from the first prediction inside `reading`.

    They are taken by hooks, so that the layers go on attending with whatever kernel they use.
    """

    def __init__(self, layers: Sequence[Attention]):
        self._layers = layers
        self._taken: list[dict[str, Tensor]] = [{} for _ in layers]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, the first prediction is looked at."""
        with ExitStack() as stack:
            for layer, taken in zip(self._layers, self._taken, strict=True):
                for name in ("to_q", "to_k"):
                    hook = getattr(layer, name).register_forward_hook(_keeper(taken, name))
                    stack.callback(hook.remove)
            yield

    def outside(self, columns: Tensor, mask: Tensor) -> Tensor:
        """The share of the tokens' attention that lies outside of the mask, from 0 to 1: [B].

        `columns`, bool [B, L], says which states of the text are the tokens, `mask` [B, 1, h, w] is the latents'. With
        A_l(p) the probabilities of the columns at place p of layer l, their mean over the heads, and m_l the mask in
        the layer's size: mean_l sum_p A_l(p) (1 - m_l(p)) / sum_p A_l(p), over the layers of less than the latents'
        size. 0 for a sample without tokens, and for one with an empty mask, which is trained on whole.
        """
        mask = torch.where(mask.flatten(1).any(dim=1)[:, None, None, None], mask.float(), 1.0)
        shares = []
        for layer, taken in zip(self._layers, self._taken, strict=True):
            size = _size(taken["to_q"].shape[1], mask.shape[-2:])
            if size == tuple(mask.shape[-2:]):
                continue
            attended = probabilities(layer, taken["to_q"], taken["to_k"], columns)
            excluded = 1 - nn.functional.adaptive_avg_pool2d(mask, size).flatten(1)
            total = attended.sum(dim=1).clamp(min=torch.finfo(attended.dtype).tiny)
            shares.append((attended * excluded).sum(dim=1) / total)
        if not shares:
            raise UserError(
                "token_attention_penalty: the base model reads text at its latents' size alone: leave it out."
            )
        return torch.stack(shares).mean(dim=0)


def probabilities(layer: Attention, query: Tensor, key: Tensor, columns: Tensor) -> Tensor:
    """The attention that places [B, N, heads * d] pay to those of the text's states [B, L, heads * d] that `columns`
    [B, L] names, together, the mean over the heads: fp32 [B, N].
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key = (one.float().unflatten(-1, (layer.heads, -1)).transpose(1, 2) for one in (query, key))
        found = (query @ key.transpose(-1, -2) * layer.scale).softmax(dim=-1)
        return (found * columns[:, None, None, :]).sum(dim=-1).mean(dim=1)


def _keeper(taken: dict[str, Tensor], name: str) -> object:
    """A hook that keeps the first output."""

    def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        taken.setdefault(name, output)

    return keep


def _size(places: int, latents: torch.Size) -> tuple[int, int]:
    """Height and width of a layer of so many places, after halvings of the latents' that round up."""
    height, width = latents
    while height * width > places and (height, width) != (1, 1):
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    if height * width != places:
        raise ValueError(f"{places} places are no halving of {tuple(latents)}")
    return height, width
