"""Training Kandinsky 2.2: one step is the formulas, written out; what the reference scripts got wrong is right."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, PriorTransformer, UnCLIPScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from preprocessing.errors import UserError
from tests.trainer.test_loop import SPLIT, same, train_on_two
from trainer import cache, families, job, methods
from trainer.config import JobSettings
from trainer.families.base import Family
from trainer.methods.base import Method
from trainer.samples import Batch
from trainer.step import BatchMaker, TrainStep

HALVES = {"prior": "kandinsky22_prior", "decoder": "kandinsky22_decoder"}


@pytest.fixture(params=HALVES)
def half(request: pytest.FixtureRequest) -> str:
    """Each of the two families."""
    return request.param


@pytest.fixture
def half_settings(settings, tiny_prior, tiny_decoder, tmp_path) -> Callable[..., JobSettings]:
    """Settings of a short job on one half, by method full unless they say otherwise."""
    sources = {"prior": tiny_prior, "decoder": tiny_decoder}

    def made(half: str, **changes: Any) -> JobSettings:
        (other,) = sources.keys() - {half}
        usual = {"method": "full", "snr_gamma": None, "lr_warmup_steps": 0, "output_dir": tmp_path / half}
        models = {"base_model": str(sources[half]), "companion_model": str(sources[other])}
        return settings(**(usual | models | changes))

    return made


@dataclass
class Step:
    """One half with a method attached, and a batch for it."""

    family: Family
    method: Method
    module: TrainStep
    batch: Batch

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """The loss, and its gradient by the denoiser's parameters."""
        net = self.family.module(self.family.nets[0].name)
        loss = self.module(self.batch)
        net.zero_grad()
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.fixture
def one_step(load_family, dataset) -> Callable[..., Step]:
    """Everything up to the first batch of four pictures, in the way of the job."""

    def made(settings: JobSettings) -> Step:
        family, method = load_family(Path(settings.base_model)), methods.create(settings)
        captions = [item.caption for item in dataset.items]
        cached = cache.build(family, dataset, captions, lambda *_: None)
        for group in method.attach(family):
            for parameter in group.parameters:
                assert parameter.requires_grad and parameter.dtype == torch.float32
        batch = BatchMaker(cached, settings, torch.device("cpu"), ()).make(0, [0, 1, 2, 3], range(4), 4)
        return Step(family, method, TrainStep(family, method, cached, settings), batch)

    return made


def loss_by_hand(error: Tensor, scheduler: DDPMScheduler, steps: Tensor, gamma: float | None) -> Tensor:
    """Mean squared error, by Min-SNR where gamma is given."""
    each = error.square().flatten(1).mean(dim=1)
    if gamma is None:
        return each.mean()
    snr = scheduler.alphas_cumprod[steps] / (1 - scheduler.alphas_cumprod[steps])
    weight = snr.clamp(max=gamma)
    return (each * (weight / snr if scheduler.config.prediction_type == "epsilon" else weight)).mean()


def vision(family: Family, dataset: Any) -> Tensor:
    """CLIP's embeddings of the pictures as they lie on disk."""
    parts = family._parts
    images = [Image.open(dataset.folder / item.image).convert("RGB") for item in dataset.items]
    with torch.no_grad():
        return parts["image_encoder"](parts["image_processor"](images, return_tensors="pt").pixel_values).image_embeds


def prior_by_hand(prior: PriorTransformer, family: Family, dataset: Any, batch: Batch, gamma: float | None) -> Tensor:
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    parts = family._parts
    x0 = (vision(family, dataset) - prior.clip_mean) / prior.clip_std
    steps = (batch.uniform * 1000).long()
    tokens = parts["tokenizer"](batch.captions, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        text = parts["text_encoder"](tokens.input_ids)
    predicted = prior(
        scheduler.add_noise(x0.detach(), batch.noise, steps),
        timestep=steps,
        proj_embedding=text.text_embeds,
        encoder_hidden_states=text.last_hidden_state,
        attention_mask=tokens.attention_mask.bool(),
    ).predicted_image_embedding
    return loss_by_hand(predicted - x0.detach(), scheduler, steps, gamma)


def decoder_by_hand(unet: UNet2DConditionModel, family: Family, dataset: Any, batch: Batch, gamma: float | None):
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, prediction_type="epsilon")
    parts = family._parts
    images = [Image.open(dataset.folder / item.image).convert("RGB") for item in dataset.items]
    pixels = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in images])
    black = parts["image_encoder"](torch.zeros(1, 3, 16, 16)).image_embeds
    embeds = vision(family, dataset)
    embeds = torch.stack([black[0] if caption == "" else embeds[i] for i, caption in enumerate(batch.captions)])
    steps = (batch.uniform * 1000).long()
    with torch.no_grad():
        latents = parts["movq"].encode(pixels / 127.5 - 1).latents
    predicted = unet(
        scheduler.add_noise(latents, batch.noise, steps),
        steps,
        encoder_hidden_states=None,
        added_cond_kwargs={"image_embeds": embeds.detach()},
    ).sample[:, :4]
    return loss_by_hand(predicted - batch.noise, scheduler, steps, gamma)


BY_HAND = {"prior": prior_by_hand, "decoder": decoder_by_hand}


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_a_steps_loss_and_gradients_are_the_formulas(half, gamma, half_settings, one_step, dataset):
    step = one_step(half_settings(half, snr_gamma=gamma, caption_dropout=0.5))
    assert 0 < step.batch.captions.count("") < 4
    loss, gradients = step.gradients()
    net = step.family.module(step.family.nets[0].name)
    net.zero_grad()
    expected = BY_HAND[half](net, step.family, dataset, step.batch, gamma)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    fixed = step.family.nets[0].fixed
    assert gradients.keys() == {name for name, p in net.named_parameters() if p.grad is not None}
    assert not fixed & gradients.keys() and len(gradients) > 20
    for name, parameter in net.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_priors_schedule_is_that_of_unclip_and_gamma_doubles_its_loss(tiny_prior, tiny_decoder, load_family):
    objective = load_family(tiny_prior).objective
    assert torch.equal(objective.scheduler.alphas_cumprod, UnCLIPScheduler(prediction_type="sample").alphas_cumprod)
    t = (torch.arange(1000) + 1) / 1000
    assert objective.weights(t, 5.0).mean().item() == pytest.approx(2.0, abs=0.05)  # as the docstring says
    assert load_family(tiny_decoder).objective.weights(t, 5.0).mean().item() == pytest.approx(0.9, abs=0.05)


@pytest.mark.parametrize("method", [{"method": "full"}, {"method": "lora", "use_dora": True}])
def test_checkpointed_gradients_are_the_same(half, method, half_settings, one_step):
    step = one_step(half_settings(half, **method))
    step.module.train()
    loss, gradients = step.gradients()
    before, calls = torch.get_rng_state(), []
    net = step.family.module(step.family.nets[0].name)
    for layer in (layer for layer in net.modules() if isinstance(layer, nn.LayerNorm | nn.GroupNorm)):
        layer.register_forward_hook(lambda *_: calls.append(1))
    step.gradients()
    plain = len(calls)
    calls.clear()
    step.family.enable_gradient_checkpointing()
    again, found = step.gradients()
    assert len(calls) > plain  # some once more, in the backward pass
    assert again == loss and same(found, gradients)
    assert torch.equal(torch.get_rng_state(), before)


METHODS = {
    "full": {"method": "full", "learning_rate": 3e-3},
    "lora": {"method": "lora", "lora_targets": "all", "learning_rate": 3e-2},
    "dora": {"method": "lora", "use_dora": True, "learning_rate": 3e-2},
    "pivotal": {"method": "pivotal", "learning_rate": 3e-2, "text_embedding_lr": 1e-2},
}


@pytest.mark.parametrize(
    ("half", "name"),
    [
        ("prior", "full"),
        ("decoder", "lora"),
        *(pytest.param("prior", name, marks=pytest.mark.slow) for name in ("lora", "dora", "pivotal")),
        *(pytest.param("decoder", name, marks=pytest.mark.slow) for name in ("full", "dora")),
    ],
)
def test_loss_falls(half, name, half_settings, train_on, one_picture, monkeypatch):
    """On one picture at one time and noise, where only learning can lower it."""
    make = BatchMaker.make
    monkeypatch.setattr(BatchMaker, "make", lambda self, step, *rest: make(self, 0, *rest))
    run = half_settings(half, **METHODS[name], max_train_steps=15, lr_schedule="constant", caption_dropout=0.0)
    losses = train_on(run, one_picture).losses
    assert losses[-1] < 0.9 * losses[0]


def test_statistics_of_the_prior_are_not_trained(half_settings, train_on, dataset, tiny_prior, load_family):
    trained = train_on(half_settings("prior", learning_rate=0.1, ema_decay=0.9), dataset)
    names = {name.removeprefix("prior.") for name in trained.tensors}
    net = load_family(tiny_prior).module("prior")
    assert {name for name, _ in net.named_parameters()} - names == {"clip_mean", "clip_std"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", [{"method": "full"}, {"method": "lora", "use_dora": True}])
def test_two_processes_are_one(half, variant, half_settings, train_on, read_job, dataset, tmp_path):
    variant = SPLIT | variant | {"preservation_weight": 0.0}
    shared = half_settings(half, **variant, train_batch_size=2, output_dir=tmp_path / "two")
    train_on_two(shared, dataset, tmp_path)
    two = read_job(tmp_path / "two")
    one = train_on(half_settings(half, **variant, train_batch_size=4), dataset)
    assert two.losses == pytest.approx(one.losses, rel=1e-5)
    assert [row["lr/weights"] for row in two.rows] == [row["lr/weights"] for row in one.rows]
    assert two.tensors.keys() == one.tensors.keys()
    for name, value in one.tensors.items():
        # of three steps of 1e-3: where a gradient is all but zero, Adam makes much of how a sum was rounded
        torch.testing.assert_close(two.tensors[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(half, half_settings, train_on, dataset, tmp_path):
    changes = {"method": "lora", "max_train_steps": 4, "checkpoint_every": 2, "checkpoints_total_limit": 9}
    whole = train_on(half_settings(half, **changes), dataset)
    out = tmp_path / "stopped"

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("train", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_on(half_settings(half, **changes, output_dir=out), dataset, stop)
    again = train_on(half_settings(half, **changes, output_dir=out, resume=True), dataset)
    assert same(again.tensors, whole.tensors) and again.losses == whole.losses


def test_epochs_are_counted_out_and_warmup_knows_no_accumulation(half_settings, train_on, dataset, settings):
    """Four pictures, by one: ten steps of one or five of two; the rate rises by steps of the optimiser alone."""
    changes = {"method": "lora", "lr_schedule": "constant", "lr_warmup_steps": 4, "train_batch_size": 1}
    job_settings = half_settings("prior", **changes).model_copy(update={"max_train_steps": None})
    for accumulation, steps in ((1, 10), (2, 5)):
        epochs = {"num_train_epochs": 2.5, "gradient_accumulation_steps": accumulation}
        rows = train_on(job_settings.model_copy(update=epochs), dataset).rows
        assert len(rows) == steps
        assert [row["lr/weights"] for row in rows[:5]] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3], abs=1e-9)
    with pytest.raises(ValueError, match="leave one out"):
        settings(num_train_epochs=1, max_train_steps=1)


@pytest.mark.parametrize(("half", "method"), [("prior", {"method": "lora"}), ("decoder", {"method": "full"})])
def test_bf16_trains_and_keeps_what_it_trains_in_fp32(half, method, half_settings, train_on, dataset):
    trained = train_on(half_settings(half, **method, mixed_precision="bf16", max_train_steps=2), dataset)
    assert all(np.isfinite(trained.losses)) and {value.dtype for value in trained.tensors.values()} == {torch.float32}


def test_a_dropped_condition_is_the_black_picture(half_settings, one_step):
    kept, dropped = (one_step(half_settings("decoder", caption_dropout=share)) for share in (0.0, 1.0))
    black = kept.family._parts["image_encoder"](torch.zeros(1, 3, 16, 16)).image_embeds[0]
    assert all(torch.allclose(row, black) for row in dropped.batch.conditioning["image_embeds"])
    assert not any(torch.allclose(row, black) for row in kept.batch.conditioning["image_embeds"])


def test_the_decoder_is_loaded_with_the_priors_image_encoder_alone(tiny_decoder, tiny_prior, tmp_path, load_family):
    import shutil

    prior = shutil.copytree(tiny_prior, tmp_path / "prior")
    for name in ("prior", "text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(prior / name)
    decoder = shutil.copytree(tiny_decoder, tmp_path / "decoder")
    (decoder / "README.md").write_text(f"---\nprior:\n- {prior}\n---\n", encoding="utf-8")
    assert load_family(decoder).text == []


@pytest.mark.parametrize(
    ("half", "changes", "told"),
    [
        ("decoder", {"method": "pivotal"}, "lora or full"),
        ("decoder", {"method": "textual_inversion"}, "lora or full"),
        ("decoder", {"method": "lora", "train_text_encoder": True}, "train_text_encoder"),
        ("decoder", {"method": "lora", "preservation_weight": 1.0}, "preservation_weight"),
        ("prior", {"noise_offset": 0.1}, "noise_offset"),
        ("prior", {"enable_xformers": True}, "enable_xformers"),
    ],
)
def test_what_a_half_has_no_use_for_is_refused(half, changes, told, half_settings):
    with pytest.raises(UserError, match=told):
        job.fill(half_settings(half, **changes))


def test_a_companion_is_for_halves_only(settings, tiny_prior):
    with pytest.raises(UserError, match="companion_model"):
        job.fill(settings(companion_model=str(tiny_prior)))


def test_a_companion_must_be_the_other_half(half_settings, tiny_decoder, load_family):
    with pytest.raises(UserError, match="is a kandinsky22_decoder"):
        families.load(str(tiny_decoder), frozenset({"vae"}), torch.float32, str(tiny_decoder))


def test_xformers_is_asked_of_the_decoder(half_settings, train_on, dataset, monkeypatch):
    asked = []
    name = "enable_xformers_memory_efficient_attention"
    monkeypatch.setattr(UNet2DConditionModel, name, lambda self: asked.append(type(self).__name__))
    train_on(half_settings("decoder", method="lora", max_train_steps=1, enable_xformers=True), dataset)
    assert asked == ["UNet2DConditionModel"]
    monkeypatch.undo()


def test_xformers_that_is_missing_is_told(half_settings, train_on, dataset):
    with pytest.raises(UserError, match="enable_xformers"):
        train_on(half_settings("decoder", method="lora", enable_xformers=True), dataset)


def test_the_report_says_that_captions_are_not_read(half_settings, train_on, dataset):
    train_on(half_settings("decoder", method="lora", max_train_steps=1), dataset)
    told = json.loads((dataset.folder / "dataset.json").read_text(encoding="utf-8"))
    assert any("captions are not read" in warning for warning in told["warnings"])


def test_nothing_of_a_method_is_left(half, half_settings, load_family):
    settings = half_settings(half)
    family = load_family(Path(settings.base_model))
    net = family.module(family.nets[0].name)
    before = copy.deepcopy(net.state_dict())
    for variant in ({"method": "full"}, {"method": "lora"}, {"method": "lora", "use_dora": True}):
        method = methods.create(half_settings(half, **variant))
        with torch.no_grad():
            for group in method.attach(family):
                for parameter in group.parameters:
                    parameter.add_(1.0)
        method.detach(family)
        assert same(net.state_dict(), before), variant
        assert not any(p.requires_grad for p in net.parameters())
