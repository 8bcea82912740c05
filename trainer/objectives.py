"""What a diffusion family learns: how data and noise are mixed, what is predicted, how samples weigh.

Time is canonical: t lies in (0, 1], t = 1 is noise. Shapes: data and noise are [B, ...], t and weights are [B].
"""

from __future__ import annotations

from typing import Protocol

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor


class Objective(Protocol):
    """What the loop needs of an objective; families pick one."""

    noise_sign: float  # 1 where a larger prediction stands for more noise, -1 where for more of the data

    def times(self, uniform: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) -> the times trained on, rising with them."""

    def mix(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The noisy sample at time t."""

    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the net should predict at time t."""

    def data(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """What a prediction at time t < 1 says that the data are."""

    def weights(self, t: Tensor, snr_gamma: float | None) -> Tensor:
        """How much each sample's squared error counts."""


class Ddpm:
    """Variance-preserving diffusion on a scheduler's discrete steps (Ho et al. 2020, arXiv:2006.11239).

    Predicts noise, v (Salimans & Ho 2022, arXiv:2202.00512) or the data, as the scheduler's `prediction_type` says.
    """

    def __init__(self, scheduler: DDPMScheduler):
        self.scheduler = scheduler
        self.steps = scheduler.config.num_train_timesteps
        self.prediction_type = scheduler.config.prediction_type
        self.noise_sign = -1.0 if self.prediction_type == "sample" else 1.0
        self.zero_terminal_snr = float(scheduler.alphas_cumprod[-1] < 1e-6)
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"unknown prediction_type {self.prediction_type!r}")

    def times(self, uniform: Tensor) -> Tensor:
        return ((uniform * self.steps).floor() + 1) / self.steps

    def timesteps(self, t: Tensor) -> Tensor:
        """The scheduler's integer steps, 0 to steps - 1."""
        return (t * self.steps).round().long() - 1

    def mix(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.scheduler.add_noise(data, noise, self.timesteps(t))

    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return data
        return self.scheduler.get_velocity(data, noise, self.timesteps(t))

    def data(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        kept = self.scheduler.alphas_cumprod.to(noisy)[self.timesteps(t)].reshape(-1, *[1] * (noisy.ndim - 1))
        if self.prediction_type == "sample":
            return prediction
        if self.prediction_type == "v_prediction":
            return kept.sqrt() * noisy - (1 - kept).sqrt() * prediction
        return (noisy - (1 - kept).sqrt() * prediction) / kept.sqrt()

    def weights(self, t: Tensor, snr_gamma: float | None) -> Tensor:
        """Min-SNR weights (Hang et al. 2023, arXiv:2303.09556, section 3.4); ones without `snr_gamma`.

        They are the paper's, not normalised: with gamma 5 their mean over the times is 0.9 where noise is predicted
        and 2.0 where data is, on Kandinsky 2.2's schedules.
        """
        if snr_gamma is None:
            return torch.ones_like(t)
        snr = compute_snr(self.scheduler, self.timesteps(t)).to(t)
        clipped = snr.clamp(max=snr_gamma)
        if self.prediction_type == "sample":
            return clipped
        if self.prediction_type == "v_prediction":
            # on a zero-terminal-SNR schedule one more, or the step of pure noise, where drawing starts, weighs nothing
            return (clipped + self.zero_terminal_snr) / (snr + 1)
        # min(snr, gamma) / snr, written so that its limit at snr = 0 (a zero-terminal-SNR schedule) is 1, not NaN
        return torch.where(snr > snr_gamma, snr_gamma / snr.clamp(min=snr_gamma), torch.ones_like(snr))


class Flow:
    """Rectified flow (Liu et al. 2022, arXiv:2209.03003); the velocity is noise - data.

    `shift` > 1 moves times towards noise (Esser et al. 2024, arXiv:2403.03206, section 5.3.2); with `logit_normal` they
    are, before it, distributed so that their logit is normal (section 3.1).
    """

    noise_sign = 1.0

    def __init__(self, shift: float = 1.0, logit_normal: bool = False):
        self.shift, self.logit_normal = shift, logit_normal

    def times(self, uniform: Tensor, shift: float | None = None) -> Tensor:
        """As `Objective.times`; `shift` in place of its own where that depends on the picture's size."""
        shift = self.shift if shift is None else shift
        t = uniform.clamp(min=1e-4)
        if self.logit_normal:
            t = torch.special.ndtri(t.double()).sigmoid().to(uniform)
        return shift * t / (1 + (shift - 1) * t)

    def mix(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, *[1] * (data.ndim - 1))
        return (1 - t) * data + t * noise

    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - data

    def data(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        return noisy - t.reshape(-1, *[1] * (noisy.ndim - 1)) * prediction

    def weights(self, t: Tensor, snr_gamma: float | None) -> Tensor:
        return torch.ones_like(t)


def masked_mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `error` [B, ...] per sample, [B]; with `mask` [B, 1, H, W] on [B, C, H, W] sum(e * m) / (C * sum(m)).

    A sample whose mask is empty is trained on whole.
    """
    if mask is None:
        return error.flatten(1).mean(dim=1)
    area = mask.flatten(1).sum(dim=1)
    mask = torch.where((area > 0)[:, None, None, None], mask, torch.ones_like(mask))
    return (error * mask).flatten(1).sum(dim=1) / (error.shape[1] * mask.flatten(1).sum(dim=1))
