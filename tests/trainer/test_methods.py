"""Every way to adapt, on both models: what it trains, what it leaves alone, what comes back when it is taken out."""

from __future__ import annotations

import math

import pytest
import torch

from trainer import families
from trainer.families.base import DENOISER, TEXT, VAE
from trainer.methods import adapters
from trainer.methods.base import weights_factor

VARIANTS = ["pivotal", "lora text", "full", "prefix", "perfusion"]
VARIANTS += [pytest.param(name, marks=pytest.mark.slow) for name in ("pivotal dora", "inversion", "lora", "full text")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_fp32_parameters_of_the_groups_are_trainable(variant, tiny_model, create):
    method = create(variant)
    dtype = torch.float32 if method.trains_base_weights else torch.bfloat16
    source = str(tiny_model)
    family = families.family_class(source).load(source, frozenset({DENOISER, TEXT, VAE}), dtype)
    groups = method.attach(family)
    grouped = [id(p) for group in groups for p in group.parameters]
    nets = [family.module(net.name) for net in family.nets]
    trainable = {id(p): p for net in nets for p in net.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped)) > 0 and set(grouped) == set(trainable)
    assert all(p.dtype == torch.float32 for p in trainable.values())
    assert all(group.parameters and group.learning_rate > 0 for group in groups)
    assert set(method.schedule(0.5)) >= {group.name for group in groups}


@pytest.mark.parametrize("variant", VARIANTS)
def test_detach_gives_the_base_back_bit_for_bit(variant, lab, create):
    before, prediction = lab.snapshot(), lab.predict("a dog")
    method = create(variant)
    parameters = lab.train(method)
    assert all(torch.isfinite(p).all() for p in parameters)
    if variant != "inversion":
        assert not torch.equal(lab.predict("a dog"), prediction)
    method.detach(lab.family)
    lab.assert_unchanged(before)
    assert torch.equal(lab.predict("a dog"), prediction)


@pytest.mark.parametrize(
    "variant", ["pivotal", *(pytest.param(v, marks=pytest.mark.slow) for v in ("lora text", "full"))]
)
def test_a_family_serves_one_job_after_another(variant, lab, create):
    first, again = create(variant), create(variant)
    trained = [p.detach().clone() for p in lab.train(first)]
    first.detach(lab.family)
    other = create("pivotal dora", n_tokens=5)
    lab.train(other)
    other.detach(lab.family)
    for a, b in zip(trained, lab.train(again), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_detaching_what_was_never_attached_changes_nothing(variant, lab, create):
    before = lab.snapshot()
    create(variant).detach(lab.family)
    lab.assert_unchanged(before)


@pytest.mark.parametrize("variant", ["pivotal", "lora", "lora text"])
def test_a_fresh_adapter_changes_no_prediction(variant, lab, create):
    prediction, state = lab.predict("a dog"), torch.get_rng_state()
    create(variant).attach(lab.family)
    torch.testing.assert_close(lab.predict("a dog"), prediction, rtol=1e-5, atol=1e-6)
    assert variant == "pivotal" or torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trainable_parameter_gets_a_gradient(variant, lab, create):
    method = create(variant)
    still = [p.detach().clone() for group in method.attach(lab.family) for p in group.parameters]
    method.detach(lab.family)
    method = create(variant)
    moved = [not torch.equal(a, b) for a, b in zip(still, lab.train(method), strict=True)]
    # of the text encoders' last layer and projection only the second's pooled text is read
    assert sum(moved) > 0.8 * len(moved) if variant.endswith("text") else all(moved)


@pytest.mark.parametrize("variant", ["lora text", "pivotal", "pivotal dora", "prefix", "perfusion"])
def test_disabled_is_the_base_model_exactly(variant, lab, create):
    prediction = lab.predict("a dog")
    method = create(variant)
    parameters = lab.train(method)
    adapted = lab.predict(method.words([lab.caption])[0])
    with method.disabled(lab.family):
        assert torch.equal(lab.predict("a dog"), prediction)
    assert torch.equal(lab.predict(method.words([lab.caption])[0]), adapted)
    assert all(p.requires_grad for p in parameters)


def test_disabled_keeps_the_gradients_of_what_was_computed_before(lab, create):
    method = create("pivotal")
    parameters = [p for group in method.attach(lab.family) for p in group.parameters]
    words = method.words([lab.caption])[0]
    expected = torch.autograd.grad(lab.predict(words).square().mean(), parameters)
    loss = lab.predict(words).square().mean()
    with torch.no_grad(), method.disabled(lab.family):
        lab.predict("a dog")
    loss.backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, expected, strict=True))


def test_disabled_works_when_the_text_encoders_have_left_memory(lab, create):
    text = lab.family.encode_text(["a dog"]) | {"time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}
    noisy, t = torch.randn(1, 4, 16, 16), torch.tensor([0.6])
    prediction = lab.family.predict(noisy, t, text)
    method = create("lora")
    lab.train(method)
    lab.family.free(TEXT)
    with method.disabled(lab.family):
        assert torch.equal(lab.family.predict(noisy, t, text), prediction)


@pytest.mark.parametrize("method", ["full", "inversion"])
def test_switched_off_they_predict_as_the_base_model_and_on_again_as_trained(method, lab, create):
    before = lab.predict("a dog")
    trained = create(method)
    lab.train(trained)
    after = lab.predict("a dog")
    with trained.disabled(lab.family):
        assert torch.equal(lab.predict("a dog"), before)
    assert torch.equal(lab.predict("a dog"), after)
    assert method == "inversion" or not torch.equal(after, before)


@pytest.mark.parametrize("variant", ["pivotal", "pivotal dora", "lora text", "prefix", "perfusion"])
def test_strength_zero_is_the_base_models_denoiser(variant, lab, create):
    prediction = lab.predict("a dog")
    method = create(variant)
    lab.train(method)
    method.set_strength(lab.family, 0.0)
    torch.testing.assert_close(lab.predict("a dog"), prediction, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", ["pivotal", "lora text"])
def test_strength_scales_what_was_trained(variant, lab, create):
    method = create(variant)
    lab.train(method)
    whole = lab.predict("a dog")
    method.set_strength(lab.family, 0.5)
    half = lab.predict("a dog")
    method.set_strength(lab.family, 1.0)
    assert torch.equal(lab.predict("a dog"), whole)
    with torch.no_grad():
        for net in lab.modules().values():
            for name, parameter in net.named_parameters():
                if ".lora_B." in name:
                    parameter *= 0.5
    torch.testing.assert_close(lab.predict("a dog"), half, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(half, whole, atol=1e-4)


@pytest.mark.parametrize(("variant", "alpha"), [("pivotal", None), ("pivotal dora", 1.0), ("lora text", 6.0)])
def test_the_scale_is_alpha_over_rank(variant, alpha, lab, create):
    method = create(variant, lora_rank=4, lora_alpha=alpha)
    method.attach(lab.family)
    layers = [layer for m in lab.modules().values() for layer in adapters.tuner_layers(m) if hasattr(layer, "r")]
    assert {layer.scaling[adapters.ADAPTER] for layer in layers} == {1.0 if alpha is None else alpha / 4}
    assert {config["lora_alpha"] for config in method.nets().values()} == {4 if alpha is None else alpha}
    assert {config["r"] for config in method.nets().values()} == {4}


def test_presets_of_layers_grow(lab, create):
    names = []
    for preset in ("attention", "attention_conv", "all"):
        method = create("lora", lora_targets=preset)
        method.attach(lab.family)
        names.append(set(lab.family.module("unet").peft_config[adapters.ADAPTER].target_modules))
        wrapped = {n for n, m in lab.family.module("unet").named_modules() if isinstance(m, adapters.BaseTunerLayer)}
        assert any("attn2.to_k" in n for n in wrapped)
        assert any("resnets" in n for n in wrapped) == (preset != "attention")
        assert any("time_emb_proj" in n for n in wrapped) == (preset == "all")
        method.detach(lab.family)
    assert names[0] < names[1] < names[2]


def test_the_l1_penalty_is_the_mean_size_of_the_matrices(lab, create):
    method = create("lora", lora_l1_penalty=0.25)
    values = torch.cat([p.detach().flatten() for group in method.attach(lab.family) for p in group.parameters])
    assert method.penalty().item() == pytest.approx(0.25 * values.abs().mean().item(), rel=1e-5)
    assert create("lora").penalty() == 0.0


@pytest.mark.parametrize("variant", ["pivotal", "prefix"])
def test_gradient_checkpointing_changes_no_gradient(variant, lab, create):
    method = create(variant)
    parameters = [p for group in method.attach(lab.family) for p in group.parameters]
    words = method.words([lab.caption])[0]
    expected = torch.autograd.grad(lab.predict(words).square().mean(), parameters)
    lab.family.enable_gradient_checkpointing()
    for net in lab.family.nets:
        lab.family.module(net.name).train()
        assert any(getattr(part, "gradient_checkpointing", False) for part in lab.family.module(net.name).modules())
    found = torch.autograd.grad(lab.predict(words).square().mean(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_schedules_of_the_weights():
    for schedule in ("constant", "linear", "cosine", "exponential"):
        factors = [weights_factor(schedule, i / 100, 0.1) for i in range(100)]
        assert all(0 < f <= 1.0001 for f in factors)
        torch.testing.assert_close(factors[5], 0.5, rtol=1e-6, atol=0)  # half of the warm-up
    done = (0.55 - 0.1) / 0.9
    assert weights_factor("constant", 0.55, 0.1) == 1.0
    assert weights_factor("linear", 0.55, 0.1) == pytest.approx(1 - done)
    assert weights_factor("cosine", 0.55, 0.1) == pytest.approx((1 + math.cos(math.pi * done)) / 2)
    assert weights_factor("exponential", 0.55, 0.1) == pytest.approx(6 ** (done - 1))
    assert weights_factor("exponential", 0.0, 0.0) == pytest.approx(1 / 6)
    assert all(0 < weights_factor("cosine", i / 4, 2.5) < 1 for i in range(4))  # a warm-up longer than the run


def test_text_encoders_have_a_rate_of_their_own_if_asked(lab, create):
    for variant in ("lora text", "full text"):
        method = create(variant, learning_rate=1e-3, text_encoder_lr=1e-5)
        assert {g.name: g.learning_rate for g in method.attach(lab.family)} == {"weights": 1e-3, "text_weights": 1e-5}
        method.detach(lab.family)
