"""Optimisers by name, and the rule that a schedule never touches the rate of one that finds its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from preprocessing.errors import UserError
from trainer.methods.base import ParameterGroup
from trainer.muon import Muon

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
