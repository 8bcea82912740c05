"""A base in 8 or 4 bits: nearly the same predictions, gradients reach the LoRA, and its archive is as any other."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from preprocessing.errors import UserError
from trainer import artifact, job
from trainer.config import JobSettings
from trainer.drawing import DrawSettings
from trainer.families import quantised
from trainer.generate import Generator

HAS_IT = importlib.util.find_spec("bitsandbytes") is not None
installed = pytest.mark.skipif(not HAS_IT, reason="bitsandbytes is not installed")
FLUX = pytest.mark.parametrize("tiny_model", ["flux"], indirect=True)
PRECISIONS = pytest.mark.parametrize("precision", ["int8", "nf4"])
PROMPT = "a photo of a dog"


def quantise(lab: Any, precision: str) -> None:
    lab.family.quantise(precision)
    lab.family.to(torch.device("cpu"))


@installed
@FLUX
@PRECISIONS
@pytest.mark.parametrize("method", ["lora", "condition"])
def test_a_quantised_base_trains_nearly_the_same_adapter(method, precision, lab, create):
    """The gradients are compared at the same adapter, whose fresh values are the same, too."""
    changes = {"lora_targets": None, "method": method} if method == "condition" else {}
    expected, found, fresh = [], [], []
    for bits in (None, precision):
        if bits:
            quantise(lab, bits)
        attached = create("lora", **changes)
        parameters = [p for group in attached.attach(lab.family) for p in group.parameters]
        fresh.append([p.detach().clone() for p in parameters])
        for seed, parameter in enumerate(parameters):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        assert {p.dtype for p in parameters} == {torch.float32}
        given = {"condition_0": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))}
        noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9))
        text = lab.family.encode_text([PROMPT]) | (given if method == "condition" else {})
        predicted = lab.family.predict(noisy, torch.tensor([0.6]), text)
        grads = torch.autograd.grad(predicted.square().mean(), parameters)
        (found if bits else expected).extend([predicted.detach().flatten(), torch.cat([g.flatten() for g in grads])])
        attached.detach(lab.family)
    assert all(torch.equal(one, other) for one, other in zip(*fresh, strict=True))
    for one, other in zip(expected, found, strict=True):
        assert torch.cosine_similarity(one, other, dim=0) > (0.99 if precision == "int8" else 0.9)
        assert not torch.equal(one, other)


@installed
@FLUX
@PRECISIONS
def test_the_blocks_are_quantised_and_what_all_passes_is_not(precision, lab, create):
    net = lab.family.module("transformer")
    before, bias = lab.predict(PROMPT), net.transformer_blocks[0].attn.to_q.bias.clone()
    quantise(lab, precision)
    kinds = {name: p.dtype for name, p in net.named_parameters()}
    wanted = torch.int8 if precision == "int8" else torch.uint8
    assert kinds["transformer_blocks.0.attn.to_q.weight"] == kinds["transformer_blocks.0.norm1.linear.weight"] == wanted
    assert kinds["x_embedder.weight"] == kinds["proj_out.weight"] == torch.float32
    assert torch.equal(net.transformer_blocks[0].attn.to_q.bias, bias)
    plain = lab.predict(PROMPT)
    assert 0 < (plain - before).norm() < 0.2 * before.norm()
    snapshot = {name: value.clone() for name, value in net.state_dict().items()}
    method = create("lora", lora_targets="attention")
    lab.train(method)
    assert not torch.equal(lab.predict(PROMPT), plain)
    method.detach(lab.family)
    assert torch.equal(lab.predict(PROMPT), plain)
    assert all(torch.equal(value, snapshot[name]) for name, value in net.state_dict().items())


@installed
@PRECISIONS
@pytest.mark.parametrize("method", ["lora", "condition"])
def test_a_job_on_a_quantised_base_leaves_an_archive_like_others(
    method, precision, job_settings, tiny_flux, dataset, train_on, tmp_path
):
    given = job_settings.model_dump(exclude={"optimizer", "weight_decay", "max_grad_norm", "lora_targets"})
    own = {"base_model": str(tiny_flux), "method": method, "optimizer": "adamw", "learning_rate": 0.01}
    results = []
    for bits in ("same", precision):
        changes = {"base_precision": bits, "output_dir": tmp_path / bits, "max_train_steps": 2}
        results.append(train_on(JobSettings.model_validate(given | own | changes), dataset))
    plain, bits = results
    stored = [load_file(one.weights / artifact.ADAPTER) for one in results]
    shapes = [{name: (value.shape, value.dtype) for name, value in one.items()} for one in stored]
    assert shapes[0] == shapes[1]
    assert artifact.read_manifest(plain.weights).nets == artifact.read_manifest(bits.weights).nets
    assert any(value.any() for name, value in stored[1].items() if ".lora_B." in name)
    assert bits.losses != plain.losses
    np.testing.assert_allclose(bits.losses, plain.losses, rtol=0.2)


@installed
@pytest.mark.parametrize(("base", "precision"), [("tiny_flux", "int8"), ("tiny_sd", "nf4")])
def test_pictures_are_drawn_on_a_quantised_base(base, precision, request):
    how, source = DrawSettings(prompt=PROMPT, seed=1, num_inference_steps=2), str(request.getfixturevalue(base))
    plain, found = (
        np.asarray(Generator(source, "cpu", precision=one).draw(how)[0], np.int16) for one in ("same", precision)
    )
    assert 0 < np.abs(plain - found).mean() < 20


@PRECISIONS
def test_a_missing_package_is_told_before_anything_is_done(precision, settings, tiny_flux, monkeypatch):
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    wanted = settings(base_model=str(tiny_flux), method="lora", base_precision=precision)
    with pytest.raises(UserError, match=f"base_precision {precision} needs the package bitsandbytes: pip install"):
        job.fill(wanted)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        Generator(str(tiny_flux), "cpu", precision=precision)
    assert job.fill(settings(base_model=str(tiny_flux), method="lora")).base_precision == "same"


@PRECISIONS
def test_what_is_trained_whole_is_not_quantised(precision, settings):
    with pytest.raises(ValueError, match=f"base_precision {precision} is for frozen weights"):
        settings(method="full", base_precision=precision)
