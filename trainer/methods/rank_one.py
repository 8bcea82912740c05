"""Gated rank-one edits of the layers that read a text (Tewel et al. 2023, Perfusion, arXiv:2305.01644, section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BIAS, TEMPERATURE = 0.75, 0.1  # of the gate, as the paper trains
RIDGE = 1e-3  # of the covariance's mean diagonal, added to the diagonal
REMEMBERED = 0.99  # share of the concept's encoding that an update keeps


def inverse_covariance(encoded: Tensor) -> Tensor:
    """C^-1 of the uncentred covariance C = E[e e^T] of encodings [N, D], fp32 [D, D]."""
    encoded = encoded.double()
    covariance = encoded.T @ encoded / len(encoded)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    return torch.linalg.inv(covariance).float()


class Concept(nn.Module):
    """What the edits of all layers share: i*, the encoding of the concept's word, and how alike a word is to it."""

    def __init__(self, direction: Tensor, inverse: Tensor | None = None, key: Tensor | None = None):
        """`direction`: i* [D], with the inverse covariance [D, D] to follow it in training, or the finished key [D]."""
        super().__init__()
        self.register_buffer("direction", direction.float(), persistent=False)
        self.register_buffer("inverse", inverse, persistent=False)
        self.register_buffer("finished", key, persistent=False)
        self.strength = 1.0

    def key(self) -> Tensor:
        """C^-1 i* / (i*^T C^-1 i*): its product with an encoding is 1 for i* itself, about 0 for other words."""
        if self.finished is not None:
            return self.finished
        found = self.inverse @ self.direction
        return found / (found @ self.direction)

    @torch.no_grad()
    def follow(self, encoded: Tensor) -> None:
        """Move i* towards the mean of the word's encodings [N, D] in a step's captions, on all processes alike."""
        told = torch.cat([encoded.float().sum(dim=0), torch.tensor([float(len(encoded))], device=encoded.device)])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(told)
        if told[-1] > 0:
            self.direction.lerp_(told[:-1] / told[-1], 1 - REMEMBERED)


class RankOne(nn.Module):
    """The edit of one linear layer W: what it gives for the concept is `output`, o*.

        h = W (e - c i*) + o* sigmoid((c - bias) / temperature),   c = <key, e>                              (eq. 6, 7)

    With strength s the layer gives W e + s (h - W e).
    """

    def __init__(self, layer: nn.Linear, concept: Concept, output: Tensor, trained: bool):
        super().__init__()
        self.output = nn.Parameter(output.float(), requires_grad=trained)
        self._concept = [concept]  # in a list, so that it is no part of every layer's
        self._handle = layer.register_forward_hook(self._edit)

    def _edit(self, layer: nn.Linear, given: tuple[Any, ...], plain: Tensor) -> Tensor:
        (concept,) = self._concept
        if concept.strength == 0:
            return plain
        alike = (given[0].float() @ concept.key())[..., None]
        along = nn.functional.linear(concept.direction.to(layer.weight.dtype), layer.weight).float()
        gate = ((alike - BIAS) / TEMPERATURE).sigmoid()
        return plain + (concept.strength * (gate * self.output - alike * along)).to(plain.dtype)

    def remove(self) -> None:
        self._handle.remove()
