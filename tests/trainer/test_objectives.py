"""The objectives against their closed forms, written out here from the papers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from trainer.objectives import Ddpm, Flow, masked_mean

STEPS = 1000
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def ddpm(prediction_type: str = "epsilon", zero_terminal_snr: bool = False) -> Ddpm:
    return Ddpm(
        DDPMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type=prediction_type,
            rescale_betas_zero_snr=zero_terminal_snr,
        )
    )


def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a) and sqrt(1 - a) of the scaled linear schedule, a being the product of 1 - beta: [B, 1, 1, 1], float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
    products = torch.cumprod(1 - betas, dim=0)
    a = products[(t.double() * STEPS).round().long() - 1].view(-1, 1, 1, 1)
    return a.sqrt(), (1 - a).sqrt()


@pytest.fixture
def pair() -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    t = torch.tensor([1, 2, 137, 500, 999, 1000]) / STEPS
    data, noise = torch.randn(2, len(t), 4, 3, 5, generator=source)
    return data, noise, t


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=2e-5)


def test_ddpm_mixes_data_and_noise(pair):
    data, noise, t = pair
    alpha, sigma = alpha_sigma(t)
    close(ddpm().mix(data, noise, t), alpha * data + sigma * noise)


@pytest.mark.parametrize("objective", [*map(ddpm, PREDICTIONS), Flow(), Flow(shift=3.0)])
def test_the_data_are_found_again_from_the_true_prediction(objective, pair):
    data, noise, t = (one[:-2] for one in pair)
    noisy, target = objective.mix(data, noise, t), objective.target(data, noise, t)
    close(objective.data(noisy, target, t), data)
    more = objective.target(data, noise + 1.0, t) - target
    assert (more * objective.noise_sign >= 0).all() and objective.noise_sign in (1.0, -1.0)


def test_ddpm_targets(pair):
    data, noise, t = pair
    alpha, sigma = alpha_sigma(t)
    assert torch.equal(ddpm("epsilon").target(data, noise, t), noise)
    assert torch.equal(ddpm("sample").target(data, noise, t), data)
    close(ddpm("v_prediction").target(data, noise, t), alpha * noise - sigma * data)


def test_data_is_recovered_from_what_is_predicted(pair):
    data, noise, t = pair
    alpha, sigma = alpha_sigma(t)
    noisy = ddpm().mix(data, noise, t).double()
    close((noisy - sigma * ddpm("epsilon").target(data, noise, t)) / alpha, data)
    close(alpha * noisy - sigma * ddpm("v_prediction").target(data, noise, t), data)


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="flow_prediction"):
        ddpm("flow_prediction")


@pytest.mark.parametrize("gamma", [1.0, 5.0, 1e9])
def test_min_snr_weights(gamma):
    t = torch.arange(1, STEPS + 1) / STEPS
    alpha, sigma = (part.flatten() for part in alpha_sigma(t))
    snr = (alpha / sigma) ** 2
    clipped = snr.clamp(max=gamma)
    # of x0's error the weight is min(snr, gamma), of eps's error x0's over snr, of v's error x0's over snr + 1
    expected = {"sample": clipped, "epsilon": clipped / snr, "v_prediction": clipped / (snr + 1)}
    for prediction, weights in expected.items():
        found = ddpm(prediction).weights(t, gamma).double()
        torch.testing.assert_close(found, weights, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_without_gamma_samples_weigh_the_same(prediction):
    t = torch.tensor([0.001, 0.5, 1.0])
    assert torch.equal(ddpm(prediction).weights(t, None), torch.ones(3))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weights_are_finite_where_no_signal_is_left(prediction):
    objective = ddpm(prediction, zero_terminal_snr=True)
    assert objective.scheduler.alphas_cumprod[-1] == 0
    weights = objective.weights(torch.arange(1, STEPS + 1) / STEPS, 5.0)
    assert torch.isfinite(weights).all() and (weights >= 0).all()
    limit = {"epsilon": 1.0, "v_prediction": 1.0, "sample": 0.0}[prediction]
    assert weights[-1].item() == pytest.approx(limit, abs=1e-6)


def test_v_weighs_one_more_of_x0s_error_where_drawing_starts_from_pure_noise():
    objective, t = ddpm("v_prediction", zero_terminal_snr=True), torch.tensor([0.05, 0.4, 0.8, 1.0])
    signal = objective.scheduler.alphas_cumprod[(t * STEPS).long() - 1]
    snr = signal / (1 - signal)
    torch.testing.assert_close(objective.weights(t, 5.0), (snr.clamp(max=5.0) + 1) / (snr + 1), rtol=1e-4, atol=1e-6)


def test_at_the_last_step_of_a_zero_terminal_schedule_only_noise_is_seen(pair):
    data, noise, _ = pair
    t = torch.ones(len(data))
    objective = ddpm("v_prediction", zero_terminal_snr=True)
    close(objective.mix(data, noise, t), noise)
    close(objective.target(data, noise, t), -data)


def test_every_time_is_trained_on_and_no_other():
    uniform = torch.tensor([0.0, 0.0004, 0.0011, 0.5, 0.9994, 1 - 2**-24])
    times = ddpm().times(uniform)
    assert ddpm().timesteps(times).tolist() == [0, 0, 1, 500, 999, 999]
    assert times.max() == 1 and times.min() > 0
    even = (torch.arange(STEPS) + 0.5) / STEPS
    assert ddpm().timesteps(ddpm().times(even)).tolist() == list(range(STEPS))


def test_flow_is_a_straight_line(pair):
    data, noise, _ = pair
    flow, t = Flow(), torch.tensor([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
    noisy, velocity = flow.mix(data, noise, t), flow.target(data, noise, t)
    assert torch.equal(velocity, noise - data)
    assert torch.equal(noisy[0], data[0]) and torch.equal(noisy[-1], noise[-1])
    close(noisy - t.view(-1, 1, 1, 1) * velocity, data)
    close(noisy + (1 - t).view(-1, 1, 1, 1) * velocity, noise)
    later = flow.mix(data, noise, t.clamp(max=0.99) + 0.01)
    close((later - flow.mix(data, noise, t.clamp(max=0.99))) / 0.01, velocity * torch.ones_like(later))


def test_flow_mixes_data_of_any_rank():
    data, noise, t = torch.zeros(2, 7, 5), torch.ones(2, 7, 5), torch.tensor([0.25, 0.75])
    assert Flow().mix(data, noise, t)[:, 0, 0].tolist() == [0.25, 0.75]
    assert Flow().weights(t, 5.0).tolist() == [1.0, 1.0]


def test_shift_moves_times_towards_noise():
    uniform = torch.linspace(0, 0.999, 50)
    plain, shifted = Flow(1.0).times(uniform), Flow(3.0).times(uniform)
    torch.testing.assert_close(plain[1:], uniform[1:])
    assert (shifted[1:-1] > plain[1:-1]).all() and (shifted.diff() > 0).all()
    assert shifted[0] > 0 and shifted[-1] < 1
    # the odds t : (1 - t) grow threefold
    torch.testing.assert_close(shifted / (1 - shifted), 3 * plain / (1 - plain), rtol=1e-3, atol=1e-6)


def test_masked_mean_counts_what_the_mask_shows():
    source = torch.Generator().manual_seed(2)
    error = torch.rand(3, 4, 6, 6, generator=source)
    mask = torch.rand(3, 1, 6, 6, generator=source).round()
    mask[2] = 0.25  # a faint mask counts as much as a full one
    found = masked_mean(error, mask)
    for i in range(2):
        assert found[i].item() == pytest.approx(error[i][:, mask[i, 0] == 1].mean().item(), rel=1e-5)
    assert found[2].item() == pytest.approx(error[2].mean().item(), rel=1e-5)


def test_without_a_mask_or_with_a_full_one_all_counts():
    error = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(3))
    expected = torch.stack([e.mean() for e in error])
    torch.testing.assert_close(masked_mean(error, None), expected)
    torch.testing.assert_close(masked_mean(error, torch.ones(2, 1, 6, 6)), expected)


def test_black_mask_counts_as_none_and_keeps_the_gradient_finite():
    predicted = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(4)).requires_grad_()
    mask = torch.zeros(2, 1, 6, 6)
    mask[1, :, :2] = 1
    loss = masked_mean(predicted.square(), mask)
    assert loss[0].item() == pytest.approx(predicted[0].square().mean().item(), rel=1e-5)
    loss.sum().backward()
    torch.testing.assert_close(predicted.grad[0], 2 * predicted[0].detach() / predicted[0].numel())
    assert (predicted.grad[1, :, 2:] == 0).all() and (predicted.grad[1, :, :2] != 0).all()
