"""Drawing pictures value by value, with the rows above kept: each layer sees each position once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.families.pixel_ar.model import PixelAR
from trainer.families.pixel_ar.trunk import Cached, Condition


@dataclass(frozen=True)
class Sampling:
    """How a value is drawn of its logits. Temperature 0 takes the most likely one; `top_p` keeps the likeliest values
    that together have that probability; a guidance of 1 leaves the model's own probabilities.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    guidance_scale: float = 1.0


def pick(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """A value of each row of logits [B, levels], by a number [B] in [0, 1)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        probabilities = torch.zeros_like(probabilities).scatter(
            -1, order, torch.where(before < sampling.top_p, ordered, 0.0)
        )
    total = probabilities.cumsum(dim=-1)
    wanted = uniform.to(total).unsqueeze(-1) * total[:, -1:]
    # the first value whose cumulated probability is above the number: never one of probability 0
    return (total > wanted).to(torch.uint8).argmax(dim=-1)


def guided(logits: Tensor, scale: float) -> Tensor:
    """Logits of 2 B rows, told and untold, -> of B: log p(untold) + scale (log p(told) - log p(untold))."""
    if scale == 1:
        return logits
    told, untold = logits.log_softmax(dim=-1).chunk(2)
    return untold + scale * (told - untold)


@torch.no_grad()
def draw(
    model: PixelAR,
    condition: Condition,
    uniform: Tensor,
    sampling: Sampling,
    on_row: Callable[[], None] = lambda: None,
) -> Tensor:
    """Pictures [B, channels, H, W] of values, uint8.

    `uniform` [B, H, W, channels] in [0, 1) are the numbers that values are drawn by. `condition` has 2 B rows under
    guidance, those without condition behind the others.
    """
    batch, height, width, channels = uniform.shape
    doubled = 2 * batch if sampling.guidance_scale != 1 else batch
    values = torch.zeros(doubled, height, width, channels, dtype=torch.long, device=uniform.device)
    for i, row in enumerate(Cached(model.trunk, condition, (doubled, height, width)).rows(values)):
        for j in range(width):
            hidden = model.head.norm(row.pixel(j, values[:, i, j - 1] if j else None))
            drawn: list[Tensor] = []
            for channel in range(channels):
                logits = guided(model.head.channel(hidden, drawn).float(), sampling.guidance_scale)
                value = pick(logits, uniform[:, i, j, channel], sampling)
                drawn.append(value.repeat(doubled // batch))
            values[:, i, j] = torch.stack(drawn, dim=-1)
        on_row()
    return values[:batch].permute(0, 3, 1, 2).to(torch.uint8)
