"""The Muon optimiser, for many small matrices: their orthogonal steps are found together, on their short sides."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton–Schulz polynomial, as of Jordan 2024
ITERATIONS = 5
LEAST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) for parameters of two axes or more, kernels as [out, in * h * w]; AdamW for the rest.

    A matrix moves by its momentum made orthogonal, times 0.2 sqrt(max(rows, columns)) of the rate (Liu et al. 2025,
    arXiv:2502.16982): as far as AdamW moves it, so that one rate is for both. The steps are `torch.optim.Muon`'s but
    for its rounding to bf16.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self._kernels = [parameter for parameter in parameters if parameter.ndim >= 2]
        vectors = [parameter for parameter in parameters if parameter.ndim < 2]
        self._rest = torch.optim.AdamW(vectors, lr=lr, betas=betas, weight_decay=weight_decay) if vectors else None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step at the rate of `param_groups`; without a gradient a parameter stays."""
        settings = self.param_groups[0]
        moved = [kernel for kernel in self._kernels if kernel.grad is not None]
        if moved:
            self._move(moved, settings["lr"], settings["weight_decay"])
        if self._rest is not None:
            self._rest.param_groups[0]["lr"] = settings["lr"]
            self._rest.step()

    def _move(self, kernels: list[nn.Parameter], rate: float, weight_decay: float) -> None:
        gradients = [kernel.grad for kernel in kernels]
        for kernel in kernels:
            if "momentum" not in self.state[kernel]:
                self.state[kernel]["momentum"] = torch.zeros_like(kernel)
        momenta = [self.state[kernel]["momentum"] for kernel in kernels]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's
        steps = orthogonalised([step.flatten(1) for step in ahead])
        if weight_decay:
            torch._foreach_mul_(kernels, 1 - rate * weight_decay)
        for kernel, step in zip(kernels, steps, strict=True):
            kernel.add_(step.reshape_as(kernel), alpha=-rate * 0.2 * math.sqrt(max(step.shape)))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"rest": self._rest.state_dict() if self._rest is not None else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._rest is not None:
            self._rest.load_state_dict(state_dict["rest"])
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "rest"})


def orthogonalised(matrices: list[Tensor]) -> list[Tensor]:
    """The matrices with their singular values brought near 1, by Newton–Schulz iterations X ← (aI + bXXᵀ + c(XXᵀ)²) X.

    All of an X's iterations are polynomials P of its first XXᵀ: they are multiplied up as square matrices of the short
    side, those of one side as one batch, and X itself is multiplied once.
    """
    wide = [matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T for matrix in matrices]
    found: list[Tensor] = list(wide)
    for side in {len(matrix) for matrix in wide}:
        members = [index for index, matrix in enumerate(wide) if len(matrix) == side]
        factors = _polynomials(torch.stack([(wide[index] @ wide[index].T).float() for index in members]))
        for index, factor in zip(members, factors.to(wide[members[0]].dtype), strict=True):
            found[index] = factor @ wide[index]
    pairs = zip(matrices, found, strict=True)
    return [step if step.shape == matrix.shape else step.T for matrix, step in pairs]


def _polynomials(grams: Tensor) -> Tensor:
    """For XXᵀ [n, side, side] what X is to be multiplied with from the left, of the same shape."""
    a, b, c = COEFFICIENTS
    norms = grams.diagonal(dim1=1, dim2=2).sum(1).sqrt().clamp(min=LEAST_NORM)[:, None, None]
    grams = grams / norms**2
    unit = torch.eye(grams.shape[1], device=grams.device)
    whole = unit / norms
    for _ in range(ITERATIONS):
        factor = a * unit + b * grams + c * (grams @ grams)
        grams, whole = factor @ grams @ factor, factor @ whole
    return whole
