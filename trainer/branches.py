"""Branches of one attention: text and image in the first, each condition picture in one of its own.

After OminiControl (Tan et al. 2024, arXiv:2411.15098) and OminiControl2 (Tan et al. 2025, arXiv:2503.08280). What is
here knows no model; `trainer.families.flux_branches` computes FLUX with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAIN = 0
HOLE = "hole"  # in a conditioning: the tokens to draw where known ones are left out, bool [B, 1, h / 2, w / 2]
KeyValue = tuple[Tensor, Tensor]  # [B, n, heads, d], keys after their rotation


@dataclass(frozen=True)
class Placement:
    """Where a condition's tokens lie in the picture's grid, in tokens of the picture: its own grid times `scale` (then
    moved to the middle of the enlarged cells), then shifted by `delta` = (rows, columns)
    or, where it is None, to the left by its own width.
    """

    delta: tuple[float, float] | None = (0.0, 0.0)
    scale: float = 1.0

    def ids(self, height: int, width: int, device: torch.device) -> Tensor:
        """(0, row, column) of a grid of tokens: fp32 [height * width, 3]."""
        rows = torch.arange(height, dtype=torch.float32, device=device)
        columns = torch.arange(width, dtype=torch.float32, device=device)
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)
        delta = (0.0, -width * self.scale) if self.delta is None else self.delta
        placed = grid * self.scale + (self.scale - 1) / 2 + torch.tensor(delta, device=device)
        return torch.cat([torch.zeros_like(placed[:, :1]), placed], dim=1)


@dataclass(frozen=True)
class Layout:
    """How a method conditions a model: where each condition's tokens lie, whether conditions are independent of text
    and picture, whether the picture's known tokens are left out of the first branch (`integrated`), and which of the
    denoiser's adapters, by peft's name, acts on the conditions.
    """

    placements: tuple[Placement, ...]
    independent: bool = False
    integrated: bool = False
    adapter: str = "default"


@dataclass(frozen=True)
class BranchPlan:
    """What is computed in one forward pass, and who attends to whom.

    The first branch sees all. A condition sees itself and, unless its branch is `independent`, the first one; never
    another condition. Independent conditions are the same at every step, so that where all are their keys and values
    can be `stored` from the first step; then they are not computed again.
    """

    conditions: int
    independent: frozenset[int] = frozenset()
    stored: bool = False

    @property
    def computed(self) -> range:
        return range(1 if self.stored else 1 + self.conditions)

    def sees(self, branch: int) -> tuple[int, ...]:
        """The branches that a branch's queries attend to, itself among them."""
        if branch == MAIN:
            return tuple(range(1 + self.conditions))
        return (branch,) if branch in self.independent else (MAIN, branch)


class Store:
    """Keys and values of the conditions, layer by layer, as they were at the step that wrote them."""

    def __init__(self):
        self._layers: list[list[KeyValue]] = []

    def __bool__(self) -> bool:
        return bool(self._layers)

    def write(self, conditions: list[KeyValue]) -> None:
        """Add the next layer."""
        self._layers.append([(key.detach(), value.detach()) for key, value in conditions])

    def read(self, layer: int) -> list[KeyValue]:
        return self._layers[layer]


def joined(parts: Sequence[KeyValue], branches: Sequence[int]) -> KeyValue:
    """The keys and values of some branches, one behind the other."""
    chosen = [parts[branch] for branch in branches]
    return torch.cat([key for key, _ in chosen], dim=1), torch.cat([value for _, value in chosen], dim=1)


def strength_bias(parts: Sequence[KeyValue], strength: float) -> Tensor | None:
    """What is added to the scores of the first branch's queries, [1, 1, 1, keys]: log(strength) for every key of a
    condition, which multiplies its weight by `strength` before the weights are normalised; 0 hides the conditions.
    None for 1, so that the fast kernels, which know no bias, can be used.
    """
    if strength == 1:
        return None
    value = math.log(strength) if strength > 0 else -math.inf
    sizes = [key.shape[1] for key, _ in parts]
    bias = torch.zeros(sum(sizes), dtype=parts[MAIN][0].dtype, device=parts[MAIN][0].device)
    bias[sizes[MAIN] :] = value
    return bias.view(1, 1, 1, -1)
