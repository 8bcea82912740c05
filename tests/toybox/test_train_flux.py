"""What the training of the toybox's FLUX computes in another way than the stock transformer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from toybox.train_flux import FluxLearner, SigmoidGelu, read_tokenizers

FLUX = Path(__file__).parents[2] / "toybox" / "flux"


def test_the_faster_gelu_is_the_stock_one() -> None:
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64, requires_grad=True)
    stock, own = torch.nn.functional.gelu(x, approximate="tanh"), SigmoidGelu()(x)
    torch.testing.assert_close(own, stock)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (own, stock)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("whole", [True, False])
def test_going_on_begins_with_the_same_words_and_weights(whole: bool) -> None:
    stock = FluxPipeline.from_pretrained(FLUX, vae=None, torch_dtype=torch.float32)
    learner = FluxLearner(read_tokenizers(FLUX), shift=0.0, scale=1.0)
    learner.read_as(FLUX, whole)
    text = ["a big red star on a striped blue background"]
    assert learner.tokenizer(text).input_ids == stock.tokenizer(text).input_ids
    assert learner.tokenizer_2(text).input_ids == stock.tokenizer_2(text).input_ids
    for name, value in stock.text_encoder.state_dict().items():
        assert torch.equal(learner.text_encoder.state_dict()[name], value)
    own, theirs = learner.transformer.state_dict(), stock.transformer.state_dict()
    apart = [name for name in theirs if not torch.equal(own[name], theirs[name])]
    assert not apart if whole else apart and all("blocks" in name or "_out" in name for name in apart)
