"""Rank-one edits: their closed forms, locked keys, and what makes a job with them a job like others."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from preprocessing.errors import UserError
from trainer import methods
from trainer.config import JobSettings
from trainer.export import ExportSettings, export
from trainer.methods.perfusion import DIRECTION
from trainer.methods.rank_one import BIAS, REMEMBERED, TEMPERATURE, Concept, RankOne, inverse_covariance

SD_ONLY = pytest.mark.parametrize("tiny_model", ["sd"], indirect=True)


def gate(alike: float) -> float:
    return torch.sigmoid(torch.tensor((alike - BIAS) / TEMPERATURE)).item()


@pytest.fixture
def edited() -> tuple[nn.Linear, Concept, torch.Tensor]:
    """A layer of 6 numbers to 5 with an edit, its concept and its output o*."""
    torch.manual_seed(0)
    layer, output = nn.Linear(6, 5, bias=False), torch.randn(5)
    concept = Concept(torch.randn(6), inverse_covariance(torch.randn(400, 6) @ torch.randn(6, 6)))
    RankOne(layer, concept, output, trained=False)
    return layer, concept, output


def test_the_inverse_covariance_is_that_of_what_was_sampled():
    torch.manual_seed(0)
    mix = torch.randn(5, 5)
    found = inverse_covariance(torch.randn(200_000, 5) @ mix)
    exact = torch.linalg.inv(mix.T @ mix + 1e-3 * (mix.T @ mix).diagonal().mean() * torch.eye(5))
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05 * exact.abs().max().item())


def test_the_concept_gives_its_output_and_what_is_unlike_it_stays(edited):
    layer, concept, output = edited
    key = concept.key()
    assert key @ concept.direction == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(layer(concept.direction[None])[0], gate(1.0) * output, rtol=1e-4, atol=1e-4)
    unlike = torch.randn(6)
    unlike -= (unlike @ key) / (key @ key) * key
    plain = unlike @ layer.weight.T
    torch.testing.assert_close(layer(unlike[None])[0], plain + gate(0.0) * output, rtol=1e-4, atol=1e-4)


def test_with_an_open_gate_it_is_the_update_of_rank_one(edited):
    """W + Lambda (C^-1 i*)^T with Lambda = (o* - W i*) / (i*^T C^-1 i*), on what lies along i*."""
    layer, concept, output = edited
    weight, along = layer.weight.detach(), concept.inverse @ concept.direction
    change = (output - weight @ concept.direction) / (concept.direction @ along)
    whole = weight + torch.outer(change, along)
    e = 3.0 * concept.direction  # far beyond the bias: the gate is open
    expected = whole @ e - 2.0 * output  # the update grows with e, the gate ends at 1
    torch.testing.assert_close(layer(e[None])[0], expected, rtol=1e-3, atol=1e-3)


def test_its_strength_goes_from_the_plain_layer_to_the_edit(edited):
    layer, concept, _ = edited
    given = torch.randn(2, 3, 6)
    whole = layer(given)
    concept.strength = 0.0
    plain = layer(given)
    assert torch.equal(plain, given @ layer.weight.T)
    concept.strength = 0.25
    torch.testing.assert_close(layer(given), plain + 0.25 * (whole - plain))


def test_the_direction_follows_the_captions_and_stays_where_there_are_none(edited):
    _, concept, _ = edited
    before, seen = concept.direction.clone(), torch.randn(3, 6)
    concept.follow(seen)
    torch.testing.assert_close(concept.direction, REMEMBERED * before + (1 - REMEMBERED) * seen.mean(dim=0))
    now = concept.direction.clone()
    concept.follow(seen[:0])
    assert torch.equal(concept.direction, now)


def test_keys_stay_the_class_words_and_values_are_learned(lab, create):
    method = create("perfusion")
    method.attach(lab.family)
    net = lab.family.module("unet")
    outputs = {name: edit.output.detach().clone() for name, edit in method._edits.items()}
    assert len(outputs) == 2 * sum(name.endswith("attn2") for name, _ in net.named_modules()) > 0
    method.detach(lab.family)
    method = create("perfusion")
    lab.train(method)
    for name, edit in method._edits.items():
        assert torch.equal(edit.output, outputs[name]) == name.endswith("to_k")


@SD_ONLY
def test_only_prompts_with_the_trigger_are_drawn_otherwise(lab, create):
    prediction = lab.predict("a dog")
    method = create("perfusion")
    lab.train(method)
    with torch.no_grad():
        for edit in method._edits.values():
            edit.output += 3.0
    moved = [(lab.predict(text) - prediction).abs().max().item() for text in ("a dog", method.words([lab.caption])[0])]
    assert moved[1] > 3 * moved[0]


def test_what_a_checkpoint_keeps_of_it_is_put_back(lab, create):
    method = create("perfusion")
    lab.train(method)
    state = {name: value.clone() for name, value in method.state().items()}
    method._concept.direction.zero_()
    method.restore(state)
    assert torch.equal(method._concept.direction.cpu(), state[DIRECTION]) and state[DIRECTION].abs().max() > 0


def test_it_needs_a_class_word(tmp_path):
    with pytest.raises(ValidationError, match="class_word"):
        JobSettings(input_images=tmp_path, method="perfusion")


@pytest.mark.parametrize("tiny_model", ["flux"], indirect=True)
def test_a_model_without_cross_attention_refuses_it(lab, job_settings, tiny_model):
    own = {"base_model": str(tiny_model), "method": "perfusion", "class_word": "dog"}
    method = methods.create(JobSettings.model_validate(job_settings.model_dump() | own))
    with pytest.raises(UserError, match="cross-attention of a UNet"):
        method.attach(lab.family)


@SD_ONLY
def test_other_programs_get_nothing_of_it_not_even_its_tokens(random_weights, tmp_path):
    folder = random_weights("edits", 1, method="perfusion", class_word="dog")
    assert not (folder / "comfyui").exists() and (folder / "embeddings.safetensors").is_file()
    with pytest.raises(UserError, match="no form in other programs"):
        export(ExportSettings(weights=str(folder), out=tmp_path / "exported"))
