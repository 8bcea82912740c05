"""Random draws: by seed, step and position alone, with evenly spread times."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trainer.config import JobSettings
from trainer.draws import Draw, draw, generator

SHAPE = torch.Size((4, 8, 6))
COINS = ("drop_caption", "flip", "prompt")


def same(first: Draw, second: Draw) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(vars(first).values(), vars(second).values(), strict=True)
    )


def test_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draw(5, 7, (1, 4), SHAPE, 0.1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(draw(5, 7, (1, 4), SHAPE, 0.1), first)


@pytest.mark.parametrize("other", [(1, 7, (1, 4)), (0, 8, (1, 4)), (0, 7, (2, 4)), (2**63 - 1, 7, (1, 4))])
def test_seed_step_and_position_each_change_everything(other):
    first, second = draw(0, 7, (1, 4), SHAPE, 0.0), draw(*other, SHAPE, 0.0)
    assert not torch.equal(first.noise, second.noise)
    assert not torch.equal(first.posterior, second.posterior)
    assert first.uniform != second.uniform
    assert all(getattr(first, coin) != getattr(second, coin) for coin in COINS)


def test_keys_of_generators_do_not_run_together():
    seeds = {generator(*key).initial_seed() for key in [(1, 23), (12, 3), (1, 2, 3), (123,), ("1", "epoch", 23)]}
    assert len(seeds) == 5


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_times_of_a_step_cover_every_interval_once(count):
    for step in range(20):
        times = [draw(3, step, (i, count), torch.Size((1, 1, 1)), 0.0).uniform for i in range(count)]
        # one shared offset: after taking it away the times are the fractions k / count
        offset = min(times)
        assert sorted(round((t - offset) * count, 6) for t in times) == list(range(count))
        assert all(0 <= t < 1 for t in times)
        assert all(torch.tensor(t, dtype=torch.float32) < 1 for t in times)


def test_times_are_uniform_over_steps_at_every_position():
    times = torch.tensor([[draw(0, s, (i, 4), torch.Size((1, 1, 1)), 0.0).uniform for i in (0, 3)] for s in range(800)])
    counts = torch.stack([torch.histc(column, bins=8, min=0, max=1) for column in times.T])
    # 100 are expected in each bin, with a standard deviation below 10
    assert counts.min() > 60 and counts.max() < 140


def test_noise_is_standard_normal_and_the_coins_are_fair():
    draws = [draw(0, step, (0, 1), torch.Size((4, 16, 16)), 0.0) for step in range(200)]
    for name in ("noise", "posterior"):
        values = torch.stack([getattr(d, name) for d in draws])
        assert abs(values.mean().item()) < 0.01 and abs(values.std().item() - 1) < 0.01
    both = torch.stack([torch.stack([d.noise.flatten(), d.posterior.flatten()]) for d in draws])
    assert abs((both[:, 0] * both[:, 1]).mean().item()) < 0.01  # they are independent
    for coin in COINS:
        values = torch.tensor([getattr(d, coin) for d in draws])
        assert 0.4 < values.mean().item() < 0.6 and values.min() >= 0 and values.max() < 1


def test_noise_offset_moves_each_channel_as_a_whole():
    plain, moved = draw(0, 0, (0, 2), SHAPE, 0.0), draw(0, 0, (0, 2), SHAPE, 0.5)
    added = moved.noise - plain.noise
    torch.testing.assert_close(added, added[:, :1, :1].expand_as(added))
    assert len(set(added[:, 0, 0].tolist())) == SHAPE[0]
    # nothing else changes with it, so that two runs can be compared
    assert same(replace(moved, noise=plain.noise), plain)
    spread = torch.stack(
        [draw(0, s, (0, 1), SHAPE, 0.5).noise - draw(0, s, (0, 1), SHAPE, 0.0).noise for s in range(400)]
    )
    assert spread[:, :, 0, 0].std().item() == pytest.approx(0.5, rel=0.1)


def test_the_largest_seed_that_settings_allow_can_be_drawn_with():
    largest = next(m.lt for m in JobSettings.model_fields["seed"].metadata if hasattr(m, "lt")) - 1
    assert torch.isfinite(draw(largest, 0, (0, 1), SHAPE, 0.0).noise).all()
