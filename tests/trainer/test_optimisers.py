"""What moves the parameters: rates by their schedules, Prodigy by its own, tokens until the pivot, the average."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from preprocessing.errors import UserError
from trainer import muon, optimisers
from trainer.methods.base import ParameterGroup, weights_factor


def states(output_dir: Path) -> list[dict[str, Any]]:
    paths = sorted((output_dir / "checkpoints").glob("step_*/state.pt"))
    return [torch.load(path, weights_only=True) for path in paths]


EVERY_STEP = {"checkpoint_every": 1, "checkpoints_total_limit": 99}


def group(optimizer: str, **changes: Any) -> ParameterGroup:
    values = {"name": "weights", "parameters": [nn.Parameter(torch.ones(3))], "learning_rate": 0.1}
    return ParameterGroup(**(values | {"optimizer": optimizer, "weight_decay": 0.01} | changes))


def test_adamw_follows_the_schedule():
    scheduled = optimisers.build(group("adamw"))
    (settings,) = scheduled.optimiser.param_groups
    assert settings["betas"] == (0.9, 0.99) and settings["weight_decay"] == 0.01
    scheduled.set_factor(0.25)
    assert scheduled.learning_rate == settings["lr"] == 0.1 * 0.25
    scheduled.set_factor(0.0)
    assert scheduled.learning_rate == 0.0


def test_a_schedule_never_touches_prodigys_rate():
    scheduled = optimisers.build(group("prodigy", learning_rate=123.0))
    (settings,) = scheduled.optimiser.param_groups
    for factor in (1.0, 0.3, 1e-9, 0.0):
        scheduled.set_factor(factor)
        assert settings["lr"] == 1.0
    assert scheduled.learning_rate == 0.0  # a frozen group moves at none
    scheduled.set_factor(0.3)
    assert scheduled.learning_rate == settings["d"]


def test_eight_bit_adamw_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="CUDA"):
        optimisers.build(group("adamw8bit"))


def test_muon_moves_matrices_by_orthogonal_steps_and_vectors_as_adamw_does():
    torch.manual_seed(0)
    matrix, kernel, vector = (nn.Parameter(torch.randn(shape)) for shape in ((8, 20), (6, 2, 3, 3), (5,)))
    before = [parameter.detach().clone() for parameter in (matrix, kernel, vector)]
    scheduled = optimisers.build(group("muon", parameters=[matrix, kernel, vector], weight_decay=0.0))
    scheduled.set_factor(0.5)
    for parameter in (matrix, kernel, vector):
        parameter.grad = torch.randn_like(parameter)
    scheduled.optimiser.step()
    moved = [a - b.detach() for a, b in zip(before, (matrix, kernel, vector), strict=True)]
    for step, longer in ((moved[0], 20), (moved[1].flatten(1), 18)):
        # the five steps of Newton and Schulz leave singular values between 0.68 and 1.13
        values = torch.linalg.svdvals(step) / (0.05 * 0.2 * longer**0.5)
        assert values.min() > 0.6 and values.max() < 1.2
    torch.testing.assert_close(moved[2], 0.05 * vector.grad.sign(), rtol=1e-4, atol=1e-6)


def test_muon_moves_as_torchs_own_does_but_for_its_rounding():
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in ((8, 20), (30, 8), (6, 6), (40, 2, 3, 3))]
    ours = [nn.Parameter(start.clone()) for start in starts]
    scheduled = optimisers.build(group("muon", parameters=ours, weight_decay=0.1))
    flat = [nn.Parameter(start.flatten(1).clone()) for start in starts]
    reference = torch.optim.Muon(flat, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for own, other in zip(ours, flat, strict=True):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.flatten(1)
        scheduled.optimiser.step()
        reference.step()
    for own, other, start in zip(ours, flat, starts, strict=True):
        moved, expected = own.detach().flatten(1) - start.flatten(1), other.detach() - start.flatten(1)
        assert (moved - expected).norm() < 0.02 * expected.norm()  # of bf16


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_orthogonal_steps_found_together_are_those_of_each_alone(scale):
    def alone(matrix: torch.Tensor) -> torch.Tensor:
        a, b, c = 3.4445, -4.7750, 2.0315
        x = matrix.double() / matrix.double().norm()
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x

    torch.manual_seed(0)
    matrices = [scale * torch.randn(shape) for shape in ((8, 20), (20, 8), (8, 8), (3, 50), (1, 4))]
    for matrix, step in zip(matrices, muon.orthogonalised(matrices), strict=True):
        torch.testing.assert_close(step, alone(matrix).float(), rtol=1e-3, atol=1e-4)


def test_a_gradient_of_nothing_moves_nothing():
    assert torch.equal(muon.orthogonalised([torch.zeros(3, 5)])[0], torch.zeros(3, 5))


@pytest.mark.parametrize("shape", [(4, 4), (5,)])
def test_muon_leaves_frozen_parameters_and_reads_its_state_back(shape):
    def two_steps(kept: dict[str, Any] | None) -> tuple[torch.Tensor, dict[str, Any]]:
        parameter = nn.Parameter(start.clone())
        scheduled = optimisers.build(group("muon", parameters=[parameter]))
        if kept is not None:
            scheduled.optimiser.load_state_dict(copy.deepcopy(kept))
        parameter.grad = gradient.clone()
        scheduled.optimiser.step()
        found = parameter.detach().clone()
        parameter.grad = None
        scheduled.optimiser.step()
        assert torch.equal(parameter, found)
        return found, scheduled.optimiser.state_dict()

    torch.manual_seed(0)
    start, gradient = torch.randn(shape), torch.randn(shape)
    start, kept = two_steps(None)
    gradient = torch.randn(shape)
    assert not torch.equal(two_steps(kept)[0], two_steps(None)[0])
    assert torch.equal(two_steps(kept)[0], two_steps(kept)[0])


def test_tokens_are_not_trained_by_muon(settings):
    with pytest.raises(ValueError, match="text_embedding_optimizer"):
        settings(text_embedding_optimizer="muon")


def test_prodigy_trains_both_groups_at_rates_of_its_own(settings, train_on, dataset):
    chosen = {"optimizer": "prodigy", "text_embedding_optimizer": "prodigy", "pivot_fraction": 1.0}
    job = settings(**chosen, **EVERY_STEP, max_train_steps=12, lr_warmup_steps=6, learning_rate=77.0)
    trained = train_on(job, dataset)
    kept = states(job.output_dir)
    for state in kept:
        assert [o["param_groups"][0]["lr"] for o in state["optimisers"]] == [1.0, 1.0]
    first, last = ([o["param_groups"][0]["d"] for o in state["optimisers"]] for state in (kept[0], kept[-1]))
    assert all(0 < a < b < 1 for a, b in zip(first, last, strict=True))
    assert trained.rows[-1]["lr/weights"] == last[0] and trained.rows[-1]["lr/tokens"] == last[1]
    moved = [not torch.equal(a, b) for a, b in zip(kept[-2]["parameters"], kept[-1]["parameters"], strict=True)]
    assert all(moved) and all(torch.isfinite(tensor).all() for tensor in trained.tensors.values())


def test_rates_are_those_of_the_schedules(settings, train_on, dataset):
    job = settings(max_train_steps=8, lr_warmup_steps=2, lr_schedule="linear", pivot_fraction=0.5)
    rows = train_on(job, dataset).rows
    for i, row in enumerate(rows):
        assert row["lr/weights"] == pytest.approx(1e-3 * weights_factor("linear", i / 8, 2 / 8), abs=1e-9)
        assert row["lr/tokens"] == pytest.approx(1e-3 * (1 - i / 8) ** 1.7 if i < 4 else 0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("optimizer", "fraction", "moves"),
    [("adamw", 0.5, 4), ("prodigy", 0.45, 4), ("adamw", 0.0, 0), pytest.param("adamw", 1.0, 8, marks=pytest.mark.slow)],
)
def test_tokens_stop_moving_at_the_pivot_and_the_weights_go_on(fraction, moves, optimizer, settings, train_on, dataset):
    job = settings(
        text_embedding_optimizer=optimizer,
        pivot_fraction=fraction,
        max_train_steps=8,
        caption_dropout=0.0,
        **EVERY_STEP,
    )
    trained = train_on(job, dataset)
    kept = [state["parameters"] for state in states(job.output_dir)]
    rows = [parameters[-1] for parameters in kept]
    assert torch.equal(rows[-1], trained.tensors["clip_l"])
    # steps 2 to 8: step n moves them if it began before the pivot
    assert [not torch.equal(a, b) for a, b in pairwise(rows)] == [n <= moves for n in range(2, 9)]
    assert all(not torch.equal(a[1], b[1]) for a, b in pairwise(kept))


def test_the_average_is_kept_as_said_and_delivered(settings, train_on, dataset):
    common = {"method": "textual_inversion", "max_train_steps": 6, "text_embedding_lr": 0.05}
    job = settings(ema_decay=0.6, **common, **EVERY_STEP)
    trained = train_on(job, dataset)
    kept = [state["parameters"][0] for state in states(job.output_dir)]
    average = kept[0]
    for i, parameter in enumerate(kept):
        # it warms up: the first step is taken whole
        decay = 0.0 if i == 0 else min(0.6, 1 - (1 + i) ** -0.75)
        average = decay * average + (1 - decay) * parameter
    torch.testing.assert_close(trained.tensors["clip_l"], average, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(trained.state["average"]["shadow_params"][0], average, rtol=1e-5, atol=1e-7)
    assert (trained.tensors["clip_l"] - kept[-1]).abs().max() > 1e-3


def test_the_average_does_not_disturb_the_training(settings, train_on, dataset, tmp_path):
    plain = train_on(settings(output_dir=tmp_path / "plain"), dataset)
    averaged = train_on(settings(output_dir=tmp_path / "averaged", ema_decay=0.9), dataset)
    assert averaged.losses == plain.losses
    for a, b in zip(averaged.state["parameters"], plain.state["parameters"], strict=True):
        assert torch.equal(a, b)


def test_gradients_are_clipped_to_the_norm(settings, train_on, dataset, monkeypatch):
    seen: list[float] = []

    class Sgd(torch.optim.SGD):
        def __init__(self, parameters: list[nn.Parameter], **_: Any):
            super().__init__(parameters, lr=1.0)

        def step(self, closure: Any = None) -> None:
            grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
            seen.append(torch.cat([grad.flatten() for grad in grads]).norm().item())
            super().step(closure)

    monkeypatch.setattr(torch.optim, "AdamW", Sgd)
    rows = train_on(settings(method="full", max_grad_norm=0.01, lr_warmup_steps=0), dataset).rows
    assert all(row["grad_norm"] > 0.02 for row in rows)
    assert seen == pytest.approx([0.01] * 4, rel=1e-3)


@pytest.mark.parametrize("ratio", [8.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_lora_plus_moves_the_matrices_b_at_a_rate_of_their_own(ratio, settings, train_on, dataset, tmp_path):
    """Adam's first step is as long as its rate for every number that has a gradient; A has none while B is zero."""
    common = {"method": "lora", "lr_warmup_steps": 0, "lr_schedule": "constant", "weight_decay": 0.0}
    job = settings(lora_plus_ratio=ratio, max_train_steps=2, **common, **EVERY_STEP)
    trained = train_on(job, dataset)
    names = ["lr/weights"] if ratio == 1 else ["lr/weights", "lr/weights_up"]
    assert [name for name in trained.rows[0] if name.startswith("lr/")] == names
    ups = [value for name, value in trained.tensors.items() if ".lora_B." in name]
    first = states(job.output_dir)[0]["parameters"]
    # without a ratio the parameters lie as they always did: A and B of one layer after the other
    found = first[1::2] if ratio == 1 else first[len(first) // 2 :]
    assert sorted(p.shape for p in found) == sorted(p.shape for p in ups) and len(ups) > 4
    for matrix in found:
        assert matrix.abs().max().item() == pytest.approx(1e-3 * ratio, rel=1e-3)


def test_lora_plus_takes_dora_and_the_text_encoders_apart(lab, create):
    for variant, names in (
        ("pivotal dora", ["weights", "weights_up", "tokens"]),
        ("lora text", ["weights", "weights_up", "text_weights", "text_weights_up"]),
    ):
        method = create(variant, lora_plus_ratio=16.0, text_encoder_lr=1e-5)
        groups = method.attach(lab.family)
        assert [group.name for group in groups] == names and set(method.schedule(0.5)) >= set(names)
        assert groups[1].learning_rate == 16 * groups[0].learning_rate
        assert all(not p.any() for p in groups[1].parameters) and all(p.any() for p in groups[0].parameters)
        method.detach(lab.family)
