"""Several weights at once: conditions of several archives, each on its own pictures, and a style beside them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from preprocessing.errors import UserError
from trainer import artifact
from trainer.drawing import DrawSettings
from trainer.generate import Generator

FLUX = pytest.mark.parametrize("tiny_model", ["flux"], indirect=True)
pytestmark = FLUX


@pytest.fixture
def weights(random_weights) -> Callable[..., Path]:
    """Makes the folder of an archive of method condition, or of another, with random weights."""
    return partial(random_weights, method="condition")


@pytest.fixture
def photos(tmp_path) -> tuple[Path, Path]:
    """Two pictures."""
    paths = (tmp_path / "first.png", tmp_path / "second.png")
    for seed, path in enumerate(paths):
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(path)
    return paths


def draw(generator: Generator, **changes: Any) -> np.ndarray:
    given = {"prompt": "a dog", "guidance_scale": 2.0, "num_inference_steps": 3, "seed": 1} | changes
    return np.asarray(generator.draw(DrawSettings(**given))[0], dtype=np.int16)


@pytest.mark.parametrize("independent", [False, True])
def test_one_archive_twice_is_one_that_was_trained_on_two_tasks(independent, weights, photos, tiny_model):
    alone = weights("alone", 1, condition_tasks=("canny",), independent_condition=independent)
    both = weights("both", 1, condition_tasks=("canny", "canny"), independent_condition=independent)
    generator = Generator(str(tiny_model), "cpu")
    generator.use(both)
    expected = draw(generator, condition=photos)
    generator.use(alone, alone)
    found = draw(generator, condition=photos)
    assert (found == expected).all()
    assert (draw(generator, condition=(photos[0], photos[0])) != found).any()
    with pytest.raises(UserError, match="want 2 pictures, not 1"):
        draw(generator, condition=photos[:1])


def test_each_condition_goes_through_the_adapter_of_its_archive(weights, photos, tiny_model):
    edges = weights("edges", 1, condition_tasks=("canny",), independent_condition=True)
    subject = weights("subject", 2, condition_tasks=("subject",), position_delta=(0, 3), lora_rank=2)
    generator = Generator(str(tiny_model), "cpu")
    base = draw(generator)
    generator.use(edges, subject)
    found = draw(generator, condition=photos)
    generator.use(subject, edges)  # with its pictures in its own order it is the same
    assert np.abs(draw(generator, condition=photos[::-1]) - found).max() <= 1
    with pytest.raises(UserError, match="more_scales has 2 numbers"):
        draw(generator, condition=photos, more_scales=(1.0, 1.0))
    generator.use(edges, subject)
    weaker = [draw(generator, condition=photos, lora_scale=a, more_scales=(b,)) for a, b in ((1, 0.2), (0.2, 1))]
    assert (weaker[0] != found).any() and (weaker[0] != weaker[1]).any()
    assert (draw(generator, condition=photos, more_scales=(1.0,)) == found).all()
    assert (draw(generator, condition=photos, condition_strength=0.0) == base).all()
    generator.release()
    assert (draw(generator) == base).all()
    assert not hasattr(generator.family.module("transformer"), "peft_config")


@pytest.mark.parametrize("style_changes", [{"lora_alpha": 2.0}, {"use_dora": True}, {"method": "pivotal"}], ids=str)
def test_a_style_acts_on_text_and_picture_beside_a_condition(style_changes, weights, photos, tiny_model):
    edges = weights("edges", 1, condition_tasks=("canny",))
    style = weights("style", 2, **({"method": "lora", "lora_targets": "all", "learning_rate": 1e-3} | style_changes))
    generator = Generator(str(tiny_model), "cpu")
    generator.use(edges)
    plain = draw(generator, condition=photos[:1])
    generator.use(style)
    styled, prompt = draw(generator, prompt="a TOK"), {"prompt": "a TOK"}
    for archives, scale in (((edges, style), "more_scales"), ((style, edges), "lora_scale")):
        generator.use(*archives)
        assert (draw(generator, condition=photos[:1], condition_strength=0.0, **prompt) == styled).all()
        both = draw(generator, condition=photos[:1], **prompt)
        assert (both != styled).any() and (both != draw(generator, condition=photos[:1], lora_scale=0.5)).any()
        off = {scale: (0.0,) if scale == "more_scales" else 0.0}
        off |= {"more_scales": (1.0,)} if scale == "lora_scale" else {}
        assert (draw(generator, condition=photos[:1], **off) == plain).all()


def test_whole_weights_beside_a_condition_are_taken_back_too(weights, photos, tiny_model):
    edges = weights("edges", 1, condition_tasks=("canny",))
    full = weights("full", 2, method="full", learning_rate=1e-3)
    generator = Generator(str(tiny_model), "cpu")
    base = draw(generator)
    before = {name: value.clone() for name, value in generator.family.module("transformer").state_dict().items()}
    generator.use(edges, full)
    assert (draw(generator, condition=photos[:1], condition_strength=0.0) != base).any()
    generator.release()
    after = generator.family.module("transformer").state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def test_two_styles_do_not_share_a_net(weights, tiny_model):
    given = {"method": "lora", "lora_targets": "attention", "learning_rate": 1e-3}
    first, second = weights("first", 1, **given), weights("second", 2, **given)
    generator = Generator(str(tiny_model), "cpu")
    generator.use(first)
    with pytest.raises(UserError, match="both hold weights of the transformer"):
        generator.use(first, second)
    assert generator.archives == (first,)


@pytest.mark.parametrize("integrated", [False, True])
def test_fill_keeps_the_known_pixels(integrated, weights, photos, tiny_model, tmp_path):
    mask = Image.new("L", (32, 32))
    mask.paste(255, (10, 3, 32, 32))
    mask.save(tmp_path / "mask.png")
    fill = weights("fill", 1, condition_tasks=("fill",), token_integration=integrated)
    edges = weights("edges", 2, condition_tasks=("canny",))
    generator = Generator(str(tiny_model), "cpu")
    generator.use(edges, fill)
    known = np.asarray(mask) == 0
    given = {"condition": photos, "mask": tmp_path / "mask.png"}
    found, drawn = draw(generator, **given), draw(generator, keep_known=False, **given)
    with Image.open(photos[1]) as source:
        assert (found[known] == np.asarray(source)[known]).all()
    assert (found[~known] == drawn[~known]).all() and (found[known] != drawn[known]).any()
    assert artifact.read_manifest(fill).method == "condition"
