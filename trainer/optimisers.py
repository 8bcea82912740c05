"""Optimisers by name, and the rule that a schedule never touches the rate of one that finds its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from preprocessing.errors import UserError
from trainer.methods.base import ParameterGroup

BETAS = (0.9, 0.99)


@dataclass
class ScheduledOptimiser:
    """A parameter group with its optimiser; `factor` is the schedule's, 0 leaves the group as it is."""

    group: ParameterGroup
    optimiser: torch.optim.Optimizer
    factor: float = 1.0

    @property
    def adaptive(self) -> bool:
        return self.group.optimizer == "prodigy"

    def set_factor(self, factor: float) -> None:
        """Apply the schedule. A frozen group asks for no gradient: none is computed, none counts in the norm."""
        self.factor = factor
        for parameter in self.group.parameters:
            parameter.requires_grad_(factor != 0)
        if not self.adaptive:
            for group in self.optimiser.param_groups:
                group["lr"] = self.group.learning_rate * factor

    @property
    def learning_rate(self) -> float:
        """The rate in force; for Prodigy its own estimate d times lr."""
        if self.factor == 0:
            return 0.0
        group = self.optimiser.param_groups[0]
        return group["lr"] * group["d"] if self.adaptive else group["lr"]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) for parameters of two axes or more, kernels as [out, in * h * w]; AdamW for the rest.

    A matrix moves by its momentum made orthogonal, times 0.2 sqrt(max(rows, columns)) of the rate (Liu et al. 2025,
    arXiv:2502.16982): as far as AdamW moves it, so that one rate is for both.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self._kernels = [parameter for parameter in parameters if parameter.ndim >= 2]
        self._matrices = [nn.Parameter(kernel.detach().view(len(kernel), -1)) for kernel in self._kernels]
        others = [parameter for parameter in parameters if parameter.ndim < 2]
        self._each: list[torch.optim.Optimizer] = []
        if self._matrices:
            self._each.append(
                torch.optim.Muon(self._matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        if others:
            self._each.append(torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step at the rate of `param_groups`; without a gradient a parameter stays."""
        for kernel, matrix in zip(self._kernels, self._matrices, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.reshape_as(matrix)
        for one in self._each:
            for group in one.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            one.step()

    def state_dict(self) -> dict[str, Any]:
        groups = [{"lr": group["lr"]} for group in self.param_groups]
        return {"param_groups": groups, "each": [one.state_dict() for one in self._each]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for one, state in zip(self._each, state_dict["each"], strict=True):
            one.load_state_dict(state)


def build(group: ParameterGroup) -> ScheduledOptimiser:
    """The optimiser of one group; raises UserError for one that this machine cannot run."""
    if group.optimizer == "prodigy":
        from prodigyopt import Prodigy

        optimiser: torch.optim.Optimizer = Prodigy(
            group.parameters,
            lr=1.0,
            betas=BETAS,
            weight_decay=group.weight_decay,
            decouple=True,
            use_bias_correction=True,
            safeguard_warmup=True,
        )
    elif group.optimizer == "adamw8bit":
        optimiser = _adamw_8bit(group)
    else:
        kind = Muon if group.optimizer == "muon" else torch.optim.AdamW
        optimiser = kind(group.parameters, lr=group.learning_rate, betas=BETAS, weight_decay=group.weight_decay)
    return ScheduledOptimiser(group, optimiser)


def _adamw_8bit(group: ParameterGroup) -> torch.optim.Optimizer:
    if not torch.cuda.is_available():
        raise UserError("optimizer adamw8bit needs a CUDA device: choose adamw or prodigy on this machine.")
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("optimizer adamw8bit needs the package bitsandbytes: pip install bitsandbytes.") from error
    return bitsandbytes.optim.AdamW8bit(
        group.parameters, lr=group.learning_rate, betas=BETAS, weight_decay=group.weight_decay
    )
