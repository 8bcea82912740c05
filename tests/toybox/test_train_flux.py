"""What the training of the toybox's FLUX computes in another way than the stock transformer."""

from __future__ import annotations

import torch

from toybox.train_flux import SigmoidGelu


def test_the_faster_gelu_is_the_stock_one() -> None:
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64, requires_grad=True)
    stock, own = torch.nn.functional.gelu(x, approximate="tanh"), SigmoidGelu()(x)
    torch.testing.assert_close(own, stock)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (own, stock)]
    torch.testing.assert_close(*gradients)
