"""A subject's and a style's LoRA as one: each alone is what it was, and shares bring the two together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from preprocessing.errors import UserError
from tests.trainer.pictures import drawn
from trainer import artifact, zip_lora
from trainer.generate import Generator
from trainer.weights import Weights
from trainer.zip_lora import ZipSettings
from trainer.zipping import STYLE, SUBJECT, Zipped, check, train

MODELS = pytest.mark.parametrize("tiny_model", ["sd", "flux"], indirect=True)
SD_ONLY = pytest.mark.parametrize("tiny_model", ["sd"], indirect=True)


@pytest.fixture
def pair(random_weights) -> tuple[Path, Path]:
    """Archives of a subject with tokens and of a style of another rank and alpha and on more layers."""
    return (
        random_weights("subject", 1, method="pivotal", class_word="dog"),
        random_weights("style", 2, method="lora", trigger_word="STY", lora_rank=2, lora_alpha=3.0, lora_targets="all"),
    )


def settings_for(pair: tuple[Path, Path], out: Path, **changes) -> ZipSettings:
    given = {"weights": pair[0], "style_weights": pair[1], "out": out, "pictures": 2, "steps": 6, "device": "cpu"}
    return ZipSettings(**given | changes)


def prediction(family) -> torch.Tensor:
    """What the denoiser predicts of fixed noise for one prompt."""
    random = torch.Generator().manual_seed(7)
    noisy = torch.randn(1, family.module(family.nets[0].name).config.in_channels, 16, 16, generator=random)
    if family.name.startswith("flux"):
        noisy = noisy[:, : noisy.shape[1] // 4]
    with torch.no_grad():
        return family.predict(noisy, torch.tensor([0.5]), family.encode_text(["a dog"]))


@MODELS
def test_each_of_the_two_alone_predicts_as_it_did(pair, tiny_model):
    generator, found = Generator(str(tiny_model), "cpu"), []
    for folder in pair:
        generator.use(folder)
        found.append(prediction(generator.family))
    generator.release()
    base = prediction(generator.family)
    zipped = Zipped(generator.family, tuple(Weights.read(folder) for folder in pair))
    for which in (SUBJECT, STYLE):
        with zipped.alone(which):
            torch.testing.assert_close(prediction(generator.family), found[which], rtol=1e-4, atol=1e-4)
    assert (found[SUBJECT] - found[STYLE]).abs().max() > 1e-2
    zipped.detach()
    assert torch.equal(prediction(generator.family), base)


@MODELS
def test_training_brings_both_nearer_and_what_is_written_is_what_was_trained(pair, tiny_model, tmp_path):
    settings = settings_for(pair, tmp_path / "both.tar", steps=25, learning_rate=0.03)
    generator = Generator(str(tiny_model), "cpu")
    weights = tuple(Weights.read(folder) for folder in pair)
    shown = [zip_lora.show(generator, folder, "{trigger}", settings) for folder in pair]
    zipped = Zipped(generator.family, weights)
    before = zipped.overlap().item()
    losses = train(zipped, shown, settings)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]) and zipped.overlap().item() < before
    trained = prediction(generator.family)
    made = tmp_path / "made"
    made.mkdir()
    zipped.weights().write(made)
    zipped.detach()
    generator.use(made)
    torch.testing.assert_close(prediction(generator.family), trained, rtol=1e-4, atol=1e-4)


@SD_ONLY
def test_the_command_writes_an_archive_that_draws_and_twice_the_same(pair, tiny_model, tmp_path):
    outs = [tmp_path / "a.tar", tmp_path / "b.tar"]
    for out in outs:
        zip_lora.zip_weights(settings_for(pair, out))
    assert outs[0].read_bytes() == outs[1].read_bytes()
    with artifact.opened(outs[0]) as folder:
        manifest = artifact.read_manifest(folder)
    assert manifest.tokens == ("<s0>", "<s1>") and "STY" in manifest.chosen and manifest.scores == {}
    generator = Generator(str(tiny_model), "cpu")
    generator.use(pair[0])
    alone = drawn(generator, "TOK in STY")
    generator.use(outs[0])
    assert (drawn(generator, "TOK in STY") != alone).any()


@SD_ONLY
def test_a_style_that_does_nothing_leaves_the_subject_as_it_is(pair, tiny_model, tmp_path):
    tensors, header = artifact.load_tensors(pair[1] / artifact.ADAPTER)
    silent = {key: value * ("lora_A" in key) for key, value in tensors.items()}
    artifact.save_tensors(pair[1] / artifact.ADAPTER, silent, header)
    zip_lora.zip_weights(settings_for(pair, tmp_path / "both.tar", steps=0))
    generator = Generator(str(tiny_model), "cpu")
    generator.use(pair[0])
    alone = drawn(generator)
    generator.use(tmp_path / "both.tar")
    assert abs(drawn(generator) - alone).max() <= 1


@SD_ONLY
@pytest.mark.parametrize(
    ("which", "changes", "told"),
    [
        (1, {"method": "pivotal"}, "new tokens of their own"),
        (0, {"method": "full"}, "method full"),
        (1, {"method": "lora", "use_dora": True}, "DoRA"),
        (1, {"method": "lora", "adapter_type": "lokr"}, "adapter_type lokr"),
        (0, {"method": "lora", "train_text_encoder": True}, "text encoder"),
    ],
)
def test_what_cannot_be_zipped_is_refused_in_a_sentence(which, changes, told, pair, random_weights):
    given = list(pair)
    given[which] = random_weights("odd", 3, **changes)
    with pytest.raises(UserError, match=told):
        check(*(Weights.read(folder) for folder in given))
