"""What holds the trained text near the base model's: each switch by its equation, and nothing where it is off."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError

from preprocessing.concepts import without_triggers
from preprocessing.errors import UserError
from tests.trainer.bench import Bench, set_up
from trainer.cache import lookup
from trainer.draws import normal
from trainer.families.base import Family
from trainer.methods import regularisers
from trainer.methods.regularisers import Spectrum
from trainer.step import TrainStep


@pytest.fixture
def bench(lab, tiny_model, settings) -> Callable[..., Bench]:
    """Sets a step up as the job does."""
    return lambda dataset, **changes: set_up(lab.family, settings(base_model=str(tiny_model), **changes), dataset)


def vocabulary(rows: int = 400, width: int = 24) -> torch.Tensor:
    """Words whose variance differs from direction to direction, around a mean that is not zero."""
    source = torch.Generator().manual_seed(3)
    mixed = torch.randn(width, width, generator=source) * torch.logspace(0, -1, width)
    return torch.randn(rows, width, generator=source) @ mixed + torch.randn(width, generator=source)


def rows_like(words: torch.Tensor, count: int, scale: float = 1.0) -> torch.Tensor:
    """New rows with the vocabulary's variance along each of its principal axes, times scale squared."""
    centred = words - words.mean(dim=0)
    values, axes = torch.linalg.eigh(centred.T @ centred / len(words))
    signs = torch.randn(count, len(values), generator=torch.Generator().manual_seed(7)).sign()
    return words.mean(dim=0) + scale * (signs * values.clamp(min=0).sqrt()) @ axes.T


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_rows_with_the_vocabularys_variance_have_no_distance_and_others_by_the_equation(count):
    words = vocabulary()
    spectrum = Spectrum(words)
    torch.testing.assert_close(spectrum.shares(rows_like(words, count)), torch.ones(len(spectrum.shares(words))))
    for scale in (0.5, 2.0):
        found = spectrum.distance(rows_like(words, count, scale))
        assert found.item() == pytest.approx((scale**2 - 1) ** 2, rel=1e-4)


def test_the_whole_vocabulary_has_no_distance_and_one_axis_alone_has_much():
    words = vocabulary(1000, 192)
    spectrum = Spectrum(words)
    assert spectrum.distance(words).item() == pytest.approx(0, abs=1e-6)
    centred = words - words.mean(dim=0)
    values, axes = torch.linalg.eigh(centred.T @ centred / len(words))
    # all the variance along the widest axis: as long as a word, and spread as none is
    lone = words.mean(dim=0) + values.sum().sqrt() * axes[:, -1]
    assert (lone - words.mean(dim=0)).norm() == pytest.approx(values.sum().sqrt().item(), rel=1e-4)
    single = torch.stack([spectrum.distance(word[None]) for word in words[:50]])
    assert spectrum.distance(lone[None]) > 4 * single.mean()


def test_descent_on_the_covariance_brings_any_rows_to_the_vocabularys():
    spectrum = Spectrum(vocabulary())
    for count in (1, 3):
        rows = (5 * torch.randn(count, 24, generator=torch.Generator().manual_seed(1))).requires_grad_()
        optimiser = torch.optim.Adam([rows], lr=0.1)
        before = spectrum.distance(rows).item()
        for _ in range(300):
            optimiser.zero_grad()
            spectrum.distance(rows).backward()
            optimiser.step()
        assert before > 1 and spectrum.distance(rows).item() < 1e-3 * before


@pytest.mark.parametrize("count", [1, 3])
def test_the_covariance_is_part_of_the_penalty(count, lab, create):
    method = create("inversion", n_tokens=count, token_std_penalty=0.0, token_covariance_penalty=0.5)
    words = [tower.encoder.get_input_embeddings().weight.detach().clone() for tower in lab.family.text]
    (group,) = method.attach(lab.family)
    wanted = [Spectrum(one).distance(rows) for one, rows in zip(words, group.parameters, strict=True)]
    torch.testing.assert_close(method.penalty(), 0.5 * torch.stack(wanted).mean())
    method.penalty().backward()
    assert all(torch.isfinite(rows.grad).all() and rows.grad.any() for rows in group.parameters)


def test_norm_distance_is_that_of_the_mean_length_and_knows_the_mask():
    states, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    wanted = {"context": states, "mask": mask, "pooled": torch.randn(2, 8), "ids": torch.ones(2, 5, dtype=torch.long)}
    longer = dict(wanted, context=3 * states, pooled=0.5 * wanted["pooled"])
    torch.testing.assert_close(regularisers.norm_distance(longer, wanted), torch.full((2,), (4 + 0.25) / 2))
    spoiled = states.clone()
    spoiled[0, 3:] = 99.0  # not read
    unread = regularisers.norm_distance(dict(wanted, context=spoiled), wanted)
    torch.testing.assert_close(unread, torch.zeros(2))
    torch.testing.assert_close(regularisers.lengths(wanted)["context"][0], states[0, :3].norm(dim=-1).mean())


def unlevel(family: Family) -> None:
    """Gains as in trained text encoders: with all of them 1, SD 1.5's last layer gives every state the same length."""
    for tower in family.text:
        for name, gains in tower.encoder.named_parameters():
            if "final_layer_norm.weight" in name:
                gains.data = torch.linspace(0.1, 3, len(gains))


NORM = {"conditioning_norm_penalty": 0.7, "token_std_penalty": 0.0}


@pytest.mark.parametrize("class_word", ["dog", ""])
def test_the_norm_penalty_compares_with_the_base_models_reading(class_word, lab, bench, dataset):
    """Only captions with the trigger count, and the others, dropped ones too, count as nothing."""
    plain = dataset.items[3].model_copy(update={"caption": "a quiet lake"})
    known = dataset.model_copy(update={"items": (*dataset.items[:3], plain)})
    unlevel(lab.family)
    setup = bench(known, class_word=class_word, caption_dropout=0.3, **NORM)
    batch = next(b for b in map(setup.batch, range(50)) if b.captions[:3].count("") == 1 and b.captions[3])
    text = setup.module.conditioning(batch.captions)
    loss = setup.family.training_loss(batch, batch.conditioning | text, setup.settings.snr_gamma)
    wanted = 0.0
    for caption in (one for one in batch.captions[:3] if one):
        found = setup.family.encode_text(setup.method.words([caption]))
        base = lookup(setup.cached.text, [without_triggers(caption, {"TOK": class_word})])
        parts = [(found[name].norm(dim=-1).mean() / base[name].norm(dim=-1).mean() - 1) ** 2 for name in found]
        wanted = wanted + 0.7 * sum(parts) / len(parts) / 4
    assert wanted > 1e-6
    torch.testing.assert_close(setup.module(batch) - loss, wanted, rtol=1e-3, atol=1e-6)


def test_the_norm_penalty_pulls_the_length_back(lab, bench, dataset):
    unlevel(lab.family)
    setup = bench(dataset, method="textual_inversion", class_word="dog", caption_dropout=0.0, **NORM)
    batch = setup.batch()
    with torch.no_grad():
        for rows in setup.groups[0].parameters:
            rows *= 30

    def distance() -> torch.Tensor:
        return setup.module._norm_distance(batch.captions, setup.module.conditioning(batch.captions))

    before, optimiser = distance().item(), torch.optim.Adam(setup.groups[0].parameters, lr=0.05)
    for _ in range(20):
        optimiser.zero_grad()
        distance().backward()
        optimiser.step()
    assert distance().item() < 0.5 * before


def test_noise_is_relative_to_each_states_own_spread_and_the_keys_alone():
    given = {"context": torch.randn(3, 77, 64), "pooled": 9 * torch.randn(3, 4096), "mask": torch.ones(3, 77)}
    keys = ["0/1/0/noise", "", "0/1/2/noise"]
    state = torch.get_rng_state()
    found = regularisers.noisy(given, keys, 0.3)
    assert torch.equal(torch.get_rng_state(), state) and found["mask"] is given["mask"]
    for name, spread in (("context", 1.0), ("pooled", 9.0)):
        moved = found[name] - given[name]
        assert not moved[1].any() and torch.equal(found[name][1], given[name][1])
        for row in (0, 2):
            assert moved[row].std().item() == pytest.approx(0.3 * spread, rel=0.06)
        wanted = given[name][0] + 0.3 * given[name][0].std(dim=-1, keepdim=True) * normal(
            given[name][0].shape, keys[0], name
        )
        torch.testing.assert_close(found[name][0], wanted)
    alone = regularisers.noisy({name: value[2:] for name, value in given.items()}, keys[2:], 0.3)
    assert all(torch.equal(alone[name][0], found[name][2]) for name in given)
    longer = {"context": torch.cat([given["context"], torch.zeros(3, 5, 64)], dim=1)}  # beside a longer caption
    padded = regularisers.noisy(longer, keys, 0.3)["context"]
    assert torch.equal(padded[:, :77], found["context"]) and not padded[:, 77:].any()


@pytest.mark.parametrize("method", ["pivotal", "lora"])
def test_noise_is_in_training_alone_and_spares_no_caption(method, bench, dataset, monkeypatch):
    setup = bench(dataset, method=method, conditioning_noise=0.2, caption_dropout=0.5)
    batch = next(b for b in map(setup.batch, range(50)) if 0 < b.captions.count("") < 4)
    seen, real = [], setup.family.predict
    monkeypatch.setattr(setup.family, "predict", lambda x, t, c: seen.append(c) or real(x, t, c))
    first, again = setup.module(batch), setup.module(batch)
    assert torch.equal(first, again)
    with torch.no_grad():
        setup.module.losses(batch)
    exact = seen[-1]["context"]
    for i, caption in enumerate(batch.captions):
        assert torch.equal(seen[0]["context"][i], exact[i]) == (caption == "")
    other = setup.batches.make(9, [0], range(1), 1)
    assert batch.keys[0] != other.keys[0]


def test_noise_on_a_model_that_reads_no_text_is_refused():
    with pytest.raises(UserError, match="conditioning_noise"):
        regularisers.noisy({"ids": torch.ones(1, 4, dtype=torch.long)}, ["0/0/0"], 0.1)


@pytest.mark.parametrize("method", ["pivotal", "lora", "textual_inversion"])
def test_switched_off_the_loss_is_what_it_was_bit_for_bit(method, bench, dataset):
    setup = bench(dataset, method=method)
    batch = setup.batch()
    text = setup.module.conditioning(batch.captions)
    plain = setup.family.training_loss(batch, batch.conditioning | text, setup.settings.snr_gamma)
    assert torch.equal(setup.module(batch), plain + setup.method.penalty())


MISFITS = {
    "token_covariance_penalty": {"method": "lora", "token_covariance_penalty": 1.0},
    "token_text_warmup goes": {"method": "lora", "token_text_warmup": 3, "class_word": "dog"},
    "needs class_word": {"token_text_warmup": 3},
    "conditioning_norm_penalty": {"method": "lora", "conditioning_norm_penalty": 1.0},
    "two matrices": {"method": "full", "lora_plus_ratio": 4.0},
    "prodigy": {"lora_plus_ratio": 4.0, "optimizer": "prodigy"},
}


@pytest.mark.parametrize("said", MISFITS)
def test_a_switch_that_cannot_work_is_refused(said, settings):
    with pytest.raises(ValidationError, match=said):
        settings(**MISFITS[said])


def test_the_training_goes_on_exactly_with_all_of_them(settings, train_on, masked_dataset, tmp_path):
    """The noise belongs to (seed, step, position), so that a run that was stopped ends as one that was not."""
    switches = {
        "conditioning_noise": 0.1,
        "conditioning_norm_penalty": 0.1,
        "token_covariance_penalty": 0.1,
        "token_attention_penalty": 0.1,
        "token_text_warmup": 3,
        "lora_plus_ratio": 4.0,
        "class_word": "dog",
    }
    common = {"max_train_steps": 4, "checkpoint_every": 2, "lr_warmup_steps": 1} | switches
    whole = train_on(settings(output_dir=tmp_path / "whole", **common), masked_dataset)
    halves, real, calls = settings(output_dir=tmp_path / "halves", **common), TrainStep.forward, []

    def stopped(self: TrainStep, batch: object) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainStep, "forward", stopped)
        train_on(halves, masked_dataset)
    resumed = train_on(halves.model_copy(update={"resume": True}), masked_dataset)
    assert resumed.losses == whole.losses and len(whole.losses) == 4
    assert all(torch.equal(value, resumed.tensors[name]) for name, value in whole.tensors.items())
