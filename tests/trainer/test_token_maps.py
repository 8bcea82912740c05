"""Attention to the new tokens outside of the mask: its maps, its share, and that training on it moves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import Attention
from pydantic import ValidationError

from preprocessing.errors import UserError
from tests.trainer.bench import Bench, set_up
from trainer import families
from trainer.config import JobSettings
from trainer.methods.token_maps import TokenMaps, probabilities

SD_ONLY = pytest.mark.parametrize("tiny_model", ["sd"], indirect=True)


@pytest.fixture
def bench(lab, tiny_model, settings, masked_dataset) -> Callable[..., Bench]:
    """A method on pictures whose subject is in the middle, attached."""
    common = {"caption_dropout": 0.0, "token_std_penalty": 0.0, "token_attention_penalty": 0.5}
    return lambda **changes: set_up(
        lab.family, settings(base_model=str(tiny_model), **common | changes), masked_dataset
    )


class StockMaps:
    """Attention as diffusers writes it out, which keeps its probabilities."""

    def __init__(self, found: list[torch.Tensor]):
        self.found = found

    def __call__(self, attn: Attention, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(one) for one in (attn.to_q(hidden_states), attn.to_k(states), attn.to_v(states))
        )
        scores = attn.get_attention_scores(query, key)
        if encoder_hidden_states is not None:
            self.found.append(scores.unflatten(0, (len(hidden_states), attn.heads)))
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(torch.bmm(scores, value))))


def shares_by_stock(setup: Bench, batch) -> torch.Tensor:
    """The same share from the probabilities that diffusers' own plain attention computes: [B]."""
    found: list[torch.Tensor] = []
    setup.family.module("unet").set_attn_processor(StockMaps(found))
    text = setup.module.conditioning(batch.captions)
    setup.family.training_loss(batch, batch.conditioning | text, 5.0)
    words = setup.method.words(batch.captions)
    tower = setup.family.text[0]
    ids = tower.tokenizer(words, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    new = ids >= tower.tokenizer.convert_tokens_to_ids("<s0>")
    shares = []
    for one in found:
        side = int(one.shape[2] ** 0.5)
        if side == batch.mask.shape[-1]:
            continue
        mask = torch.nn.functional.interpolate(batch.mask, (side, side), mode="area").flatten(1)
        attended = torch.stack([maps[..., columns].sum(-1).mean(0) for maps, columns in zip(one, new, strict=True)])
        shares.append((attended * (1 - mask)).sum(1) / attended.sum(1))
    assert 0 < len(shares) < len(found) and new.sum(dim=1).eq(2).all()
    return torch.stack(shares).mean(0)


def test_the_term_is_the_share_of_the_probabilities_of_stock_attention(bench):
    setup = bench()
    batch = setup.batch()
    with torch.no_grad():
        loss = setup.module(batch)
        text = setup.module.conditioning(batch.captions)
        plain = setup.family.training_loss(batch, batch.conditioning | text, 5.0)
        wanted = shares_by_stock(setup, batch)
    assert (wanted > 0.3).all() and (wanted < 0.95).all()
    torch.testing.assert_close(loss - plain, 0.5 * wanted.mean(), rtol=1e-3, atol=1e-5)


def test_one_text_state_in_all_has_all_of_the_attention():
    layer = Attention(query_dim=8, cross_attention_dim=8, heads=2, dim_head=4)
    query, key = torch.randn(3, 16, 8), torch.randn(3, 5, 8)
    everything = probabilities(layer, query, key, torch.ones(3, 5, dtype=torch.bool))
    torch.testing.assert_close(everything, torch.ones(3, 16))
    alike = probabilities(layer, query, torch.zeros(3, 5, 8), torch.tensor([[True, True, False, False, False]] * 3))
    torch.testing.assert_close(alike, torch.full((3, 16), 0.4))


def share_of(mask: torch.Tensor, columns: torch.Tensor, query: torch.Tensor | None = None) -> torch.Tensor:
    """Of one layer of half the mask's size, with even attention unless a query says otherwise."""
    layer = Attention(query_dim=4, cross_attention_dim=4, heads=1, dim_head=4)
    maps = TokenMaps([layer])
    height, width = (-(-side // 2) for side in mask.shape[-2:])
    with maps.reading():
        layer(torch.zeros(len(mask), height * width, 4), encoder_hidden_states=torch.randn(len(mask), 3, 4))
        layer(torch.ones(len(mask), 7, 4), encoder_hidden_states=torch.randn(len(mask), 3, 4))  # is not looked at
    assert not layer.to_q._forward_hooks and not layer.to_k._forward_hooks
    return maps.outside(columns, mask)


def test_even_attention_lies_outside_by_the_masks_area():
    mask = torch.zeros(4, 1, 6, 10)
    mask[0, :, :, :4] = 1
    mask[1] = 1
    mask[3, :, :, :4] = 1
    columns = torch.tensor([[False, True, True]] * 3 + [[False] * 3])
    # of an empty mask the picture is trained on whole; the last one's caption has no token
    torch.testing.assert_close(share_of(mask, columns), torch.tensor([0.6, 0.0, 0.0, 0.0]))
    odd = torch.ones(1, 1, 5, 7)
    assert share_of(odd, columns[:1]).item() == 0.0


@SD_ONLY
@pytest.mark.parametrize("method", ["pivotal", "textual_inversion"])
def test_training_brings_the_attention_into_the_mask(method, bench):
    setup = bench(method=method, lora_targets="attention" if method == "pivotal" else None)
    batch = setup.batch()
    parameters = [p for group in setup.groups for p in group.parameters]

    def share() -> torch.Tensor:
        layers, columns = setup.family.attended(setup.method.words(batch.captions), setup.method.tokens())
        maps = TokenMaps(layers)
        with maps.reading():
            setup.family.training_loss(batch, batch.conditioning | setup.module.conditioning(batch.captions), 5.0)
        return maps.outside(columns, batch.mask).mean()

    before, optimiser = share().item(), torch.optim.Adam(parameters, lr=0.02)
    for _ in range(15):
        optimiser.zero_grad()
        share().backward()
        optimiser.step()
    assert share().item() < before - (0.05 if method == "pivotal" else 0.005)


@SD_ONLY
def test_gradient_checkpointing_changes_no_gradient(bench):
    setup = bench()
    batch, parameters = setup.batch(), [p for group in setup.groups for p in group.parameters]
    expected = torch.autograd.grad(setup.module(batch), parameters)
    setup.family.enable_gradient_checkpointing()
    setup.module.train()
    found = torch.autograd.grad(setup.module(batch), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@SD_ONLY
def test_without_a_mask_or_without_the_switch_the_loss_is_what_it_was(bench):
    setup = bench()
    batch = replace(setup.batch(), mask=None)
    text = setup.module.conditioning(batch.captions)
    assert torch.equal(setup.module(batch), setup.family.training_loss(batch, batch.conditioning | text, 5.0))
    setup.method.detach(setup.family)
    off = bench(token_attention_penalty=0.0)
    text = off.module.conditioning(batch.captions)
    wanted = off.family.training_loss(off.batch(), batch.conditioning | text, 5.0)
    assert torch.equal(off.module(off.batch()), wanted)


def test_it_is_refused_where_it_cannot_work(settings, train_on, dataset, tiny_flux):
    with pytest.raises(ValidationError, match="token_attention_penalty"):
        settings(method="lora", token_attention_penalty=1.0)
    with pytest.raises(UserError, match="masks"):
        train_on(settings(token_attention_penalty=1.0), dataset)
    flux: JobSettings = settings(token_attention_penalty=1.0, base_model=str(tiny_flux))
    with pytest.raises(UserError, match="token_attention_penalty"):
        families.family_class(str(tiny_flux)).check_own(flux)
