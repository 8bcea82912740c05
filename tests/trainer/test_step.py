"""One step's forward pass: what is sampled, masked, dropped and preserved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.trainer.bench import Bench, set_up
from trainer import methods
from trainer.draws import draw
from trainer.families.base import TEXT, Family
from trainer.fitting import preserved_prompts
from trainer.step import PRESERVED_EVERY


@pytest.fixture
def bench(lab, tiny_model, settings) -> Callable[..., Bench]:
    """Sets a step up as the job does."""
    return lambda dataset, **changes: set_up(lab.family, settings(base_model=str(tiny_model), **changes), dataset)


def test_latents_are_sampled_anew_from_the_cached_posterior(bench, dataset):
    setup = bench(dataset, caption_dropout=0.0, noise_offset=0.3)
    for step in (0, 1):
        batch = setup.batch(step, (2, 0))
        for i, index in enumerate((2, 0)):
            sample = setup.cached.samples[index]
            drawn = draw(setup.settings.seed, step, (i, 2), sample.mean.shape, 0.3)
            torch.testing.assert_close(batch.data[i], sample.mean + sample.std * drawn.posterior)
            assert torch.equal(batch.noise[i], drawn.noise)
            assert batch.uniform[i].item() == pytest.approx(drawn.uniform)
            assert batch.captions[i] == dataset.items[index].caption
    assert not torch.equal(setup.batch(0).data, setup.batch(1).data)


def test_a_batch_is_the_same_however_the_step_is_split(bench, dataset):
    maker = bench(dataset, caption_dropout=0.5).batches
    whole = maker.make(3, [0, 1, 2, 3], range(4), 4)
    halves = [maker.make(3, [0, 1], range(2), 4), maker.make(3, [2, 3], range(2, 4), 4)]
    for name in ("data", "noise", "uniform"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name))
    assert halves[0].captions + halves[1].captions == whole.captions


def test_mirrored_pictures_are_about_half(bench, dataset):
    setup = bench(dataset.model_copy(update={"horizontal_flip": True}))
    mirrored = 0
    for step in range(100):
        batch = setup.batch(step, (1,))
        drawn = draw(setup.settings.seed, step, (0, 1), batch.data.shape[1:], 0.0)
        candidates = [s[1].mean + s[1].std * drawn.posterior for s in (setup.cached.samples, setup.cached.mirrored)]
        matches = [torch.allclose(batch.data[0], candidate) for candidate in candidates]
        assert sum(matches) == 1
        mirrored += matches[1]
    assert 30 < mirrored < 70


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_captions_are_dropped_at_the_share_asked_for(share, bench, dataset):
    maker = bench(dataset, caption_dropout=share).batches
    captions = [c for step in range(100) for c in maker.make(step, [0, 1, 2, 3], range(4), 4).captions]
    dropped = captions.count("") / 400
    assert dropped == share if share in (0.0, 1.0) else abs(dropped - share) < 0.1


def spy(setup: Bench, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The conditionings that the denoiser is given from now on."""
    seen, real = [], setup.family.predict
    monkeypatch.setattr(setup.family, "predict", lambda x, t, c: seen.append(c) or real(x, t, c))
    return seen


def expected_null(family: Family) -> dict[str, Tensor]:
    encoded = family.encode_text([""])
    return {k: torch.zeros_like(v) for k, v in encoded.items()} if "pooled" in encoded else encoded


@pytest.mark.parametrize("method", ["pivotal", "lora", "textual_inversion"])
def test_a_dropped_caption_is_the_null_conditioning(method, lab, bench, dataset, monkeypatch):
    null = expected_null(lab.family)
    setup = bench(dataset, method=method, caption_dropout=1.0, token_std_penalty=0.0)
    seen = spy(setup, monkeypatch)
    loss = setup.module(setup.batch())
    for name, value in null.items():
        torch.testing.assert_close(seen[0][name], value.expand_as(seen[0][name]))
    if method == "lora":
        return
    rows = [p for name, p in lab.family.module("text_encoder").named_parameters() if "trainable_tokens" in name]
    if loss.requires_grad:
        loss.backward()
    assert rows and all(p.grad is None or not p.grad.any() for p in rows)


def test_only_the_dropped_captions_of_a_batch_are_null(lab, bench, dataset, monkeypatch):
    null = expected_null(lab.family)
    setup = bench(dataset, caption_dropout=0.5)
    batch = next(b for b in (setup.batch(step) for step in range(50)) if 0 < b.captions.count("") < 4)
    seen = spy(setup, monkeypatch)
    setup.module(batch).backward()
    words = setup.method.words(batch.captions)
    for i, caption in enumerate(batch.captions):
        alone = lab.family.encode_text([words[i]])
        for name, value in seen[0].items():
            if name != "time_ids":
                torch.testing.assert_close(
                    value[i : i + 1], alone[name] if caption else null[name], rtol=1e-4, atol=1e-5
                )
    rows = [p for name, p in lab.family.module("text_encoder").named_parameters() if "trainable_tokens" in name]
    assert all(p.grad.any() for p in rows)


def test_sdxl_is_told_each_pictures_own_geometry(bench, dataset, monkeypatch):
    first = dataset.items[0].model_copy(update={"original_size": (110, 80), "resized_size": (44, 32), "crop": (4, 0)})
    setup = bench(dataset.model_copy(update={"items": (first, *dataset.items[1:])}))
    if setup.family.name == "stable_diffusion":
        assert setup.batch().conditioning == {}
        return
    seen = spy(setup, monkeypatch)
    setup.module(setup.batch(0, (1, 0)))
    assert seen[0]["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32], [80, 110, 0, 4, 32, 32]]


def test_the_loss_does_not_see_what_lies_outside_the_mask(bench, masked_dataset, monkeypatch):
    setup = bench(masked_dataset, token_std_penalty=0.0)
    predicted = torch.zeros(4, 4, 16, 16, requires_grad=True)
    monkeypatch.setattr(setup.family, "predict", lambda *_: predicted)
    setup.module(setup.batch()).backward()
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[4:12, 4:12] = True  # the pixels 8 to 24 of 32
    assert not predicted.grad[..., ~inside].any()
    assert predicted.grad[..., inside].all()


def test_a_batch_of_masked_and_whole_pictures_masks_only_the_masked(bench, masked_dataset, monkeypatch):
    whole = masked_dataset.items[0].model_copy(update={"mask": None})
    setup = bench(masked_dataset.model_copy(update={"items": (whole, *masked_dataset.items[1:])}))
    mask = setup.batch().mask
    assert mask[0].eq(1).all() and mask[1].sum() == 8 * 8
    assert setup.batch(0, (0,)).mask is None


def test_the_penalty_is_part_of_the_loss(bench, dataset):
    setup = bench(dataset, lora_l1_penalty=10.0, caption_dropout=0.0)
    batch = setup.batch()
    conditioning = batch.conditioning | setup.family.encode_text(setup.method.words(batch.captions))
    plain = setup.family.training_loss(batch, conditioning, setup.settings.snr_gamma)
    torch.testing.assert_close(setup.module(batch), plain + setup.method.penalty())
    assert setup.method.penalty() > 0.01


PRESERVE = {"preservation_weight": 2.0, "class_word": "thing"}


def test_preserved_prompts_are_the_captions_with_the_class_word(settings, dataset):
    def prompts(**changes):
        chosen = settings(**changes)
        return preserved_prompts(chosen, methods.create(chosen), dataset)

    assert prompts(**PRESERVE) == tuple(f"a photo of thing number {i}" for i in range(4))
    assert prompts(preservation_weight=1.0)[0] == "a photo of number 0"
    assert prompts(preservation_weight=1.0, preservation_prompts=("a dog", "a cat")) == ("a dog", "a cat")
    assert prompts(preservation_weight=0.0, preservation_prompts=("a dog",)) == ()
    assert prompts() == ()
    assert prompts(**PRESERVE, method="textual_inversion") == ()  # it changes nothing that is without the trigger


def test_every_third_sample_preserves(bench, dataset):
    maker = bench(dataset, **PRESERVE).batches
    assert PRESERVED_EVERY == 3
    assert [i for i, _ in maker.make(0, [0, 1, 2, 3], range(4), 8).preserved] == [0, 3]
    assert [i for i, _ in maker.make(0, [0, 1, 2, 3], range(4, 8), 8).preserved] == [2]
    prompts = {p for step in range(60) for _, p in maker.make(step, [0, 1], range(2), 2).preserved}
    assert prompts == set(maker.preserved)


@pytest.mark.parametrize("method", ["pivotal", "lora"])
def test_a_fresh_adapter_has_nothing_to_preserve_and_a_trained_one_has(method, bench, dataset):
    setup = bench(dataset, method=method, token_std_penalty=0.0, caption_dropout=0.0, **PRESERVE)
    weight, batch = setup.settings.preservation_weight, setup.batch()

    def preservation() -> float:
        conditioning = batch.conditioning | setup.module.conditioning(batch.captions)
        plain = setup.family.training_loss(batch, conditioning, setup.settings.snr_gamma)
        return (setup.module(batch) - plain).item() / weight

    assert preservation() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for name, parameter in setup.family.module("unet").named_parameters():
            if ".lora_B." in name:
                parameter += 0.05
    assert preservation() > 1e-4
    setup.module(batch).backward()
    assert all(p.grad is not None for n, p in setup.family.module("unet").named_parameters() if ".lora_B." in n)


@pytest.mark.parametrize("method", ["pivotal", "lora"])
def test_what_is_trained_as_no_caption_is_what_is_drawn_with_as_none(method, bench, dataset):
    """The pictures' negative side is the family's null conditioning as the trained text encoders give it."""
    setup = bench(dataset, method=method, train_text_encoder=method == "lora")
    with torch.no_grad():
        for net in (net for net in setup.family.nets if net.part == TEXT):
            for name, parameter in setup.family.module(net.name).named_parameters():
                if ".lora_B." in name or "trainable_tokens" in name:
                    parameter += 0.1
        trained = setup.module.conditioning([""])
        for name, value in setup.family.null_conditioning().items():
            torch.testing.assert_close(trained[name], value)
