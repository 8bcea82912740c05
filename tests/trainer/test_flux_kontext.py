"""FLUX Kontext: predictions, pictures and training with a reference are those of the stock pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from preprocessing.errors import UserError
from preprocessing.prepared import PreparedDataset
from trainer import artifact, job
from trainer.config import JobSettings
from trainer.drawing import DrawSettings
from trainer.generate import Generator
from trainer.preview import FROM_REFERENCE

T5_TOKENS = 48  # of the tiny tokenizer
PROMPT = "make it a dog"


@pytest.fixture(scope="module")
def stock(tiny_kontext: Path) -> Any:
    pipe = diffusers.FluxKontextPipeline.from_pretrained(tiny_kontext, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def photo(tmp_path) -> Path:
    pixels = np.random.default_rng(3).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def call(pipe: Any, image: Image.Image | None, **changes: Any) -> Image.Image:
    """What the stock pipeline draws, 32 x 32 if nothing else is said."""
    given = {"prompt": PROMPT, "width": 32, "height": 32, "guidance_scale": 2.5, "num_inference_steps": 3}
    given |= {"max_sequence_length": T5_TOKENS, "_auto_resize": False} | changes
    given["max_area"] = given["width"] * given["height"]
    return pipe(image=image, generator=torch.Generator().manual_seed(1), **given).images[0]


def draw(generator: Generator, **changes: Any) -> np.ndarray:
    given = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 1, "token_scale": 1.0} | changes
    return np.asarray(generator.draw(DrawSettings(**given))[0], dtype=np.int16)


@pytest.mark.parametrize("size", [(32, 32), (48, 24)])
def test_predict_is_the_call_that_the_stock_pipeline_makes(size, tiny_kontext, stock, load_family, monkeypatch):
    family, seen = load_family(tiny_kontext), []
    assert type(family).__name__ == "FluxKontext"
    real = stock.transformer.forward
    monkeypatch.setattr(stock.transformer, "forward", lambda **given: seen.append(given) or real(**given))
    image = Image.linear_gradient("L").convert("RGB").resize(size)
    call(stock, image, width=32, height=24, guidance_scale=1.0)
    text = family.encode_text([PROMPT])
    pixels = torch.from_numpy(np.array(image, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    reference = family.encode_pixels(pixels)
    assert len(seen) == 3
    for given in seen:
        tokens, count = given["hidden_states"], 6 * 8
        noisy = diffusers.FluxPipeline._unpack_latents(tokens[:, :count], 12, 16, 1)
        packed = diffusers.FluxPipeline._pack_latents(reference, *reference.shape)
        torch.testing.assert_close(tokens[:, count:], packed, rtol=1e-4, atol=1e-5)
        found = family.predict(noisy, given["timestep"], text | {"reference": reference})
        expected = diffusers.FluxPipeline._unpack_latents(real(**given)[0][:, :count], 12, 16, 1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    without = family.predict(noisy, given["timestep"], text)
    assert (without - expected).abs().max() > 1e-3


def test_pictures_are_the_stock_pipelines(tiny_kontext, stock, photo):
    generator = Generator(str(tiny_kontext), "cpu")
    image = Image.open(photo)
    assert (draw(generator, condition=(photo,)) == np.asarray(call(stock, image))).all()
    assert (draw(generator) == np.asarray(call(stock, None))).all()
    wide = {"width": 48, "height": 24}
    fitted = np.asarray(call(stock, image.crop((0, 8, 32, 24)).resize((48, 24), Image.Resampling.LANCZOS), **wide))
    assert np.abs(draw(generator, condition=(photo,), **wide) - fitted).max() <= 1
    negative = {"negative_prompt": "blurry", "true_cfg_scale": 3.0}
    assert (draw(generator, condition=(photo,), **negative) == np.asarray(call(stock, image, **negative))).all()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"image": "photo"}, "give the one to draw from as condition"),
        ({"condition": ("photo", "photo")}, "draws from one picture, not 2"),
        ({"condition": ("photo",), "mask": "photo"}, "draws all of a picture anew"),
        ({"condition": ("photo",), "condition_strength": 0.5}, "are for weights of method condition"),
    ],
)
def test_what_it_cannot_is_told(given, words, tiny_kontext, photo):
    paths = {k: tuple(photo for _ in v) if k == "condition" else v for k, v in given.items()}
    paths |= {k: photo for k, v in paths.items() if v == "photo"}
    with pytest.raises(UserError, match=words):
        draw(Generator(str(tiny_kontext), "cpu"), **paths)


@pytest.fixture
def pairs(dataset: PreparedDataset) -> PreparedDataset:
    """Each picture with the next one as its reference."""
    others = (*dataset.items[1:], dataset.items[0])
    items = [item.model_copy(update={"conditions": (o.image,)}) for item, o in zip(dataset.items, others, strict=True)]
    return dataset.model_copy(update={"items": tuple(items)})


@pytest.fixture
def of_kontext(job_settings, tiny_kontext) -> Callable[..., JobSettings]:
    own = {"base_model": str(tiny_kontext), "learning_rate": 0.02, "lr_warmup_steps": 0}
    given = job_settings.model_dump() | own
    return lambda **changes: JobSettings.model_validate(given | changes)


def test_a_sample_holds_its_reference(pairs, tiny_kontext, load_family):
    from trainer import cache

    family = load_family(tiny_kontext)
    samples = cache.encode_dataset(family, pairs, False, lambda *_: None)
    for index, sample in enumerate(samples):
        torch.testing.assert_close(sample.conditioning["reference"], samples[(index + 1) % 4].mean)


@pytest.mark.parametrize("method", ["lora", "pivotal"])
def test_a_job_learns_from_pairs_and_draws_from_references(method, of_kontext, pairs, tiny_kontext, photo, monkeypatch):
    monkeypatch.setattr(job, "prepared", lambda *_: pairs)
    result = job.train(of_kontext(method=method, max_train_steps=3, preview_seeds=(1,), holdout=1))
    assert FROM_REFERENCE in result.report.read_text(encoding="utf-8")
    generator = Generator(str(tiny_kontext), "cpu")
    base = draw(generator, condition=(photo,), prompt="TOK")
    generator.use(result.archive)
    assert (draw(generator, condition=(photo,), prompt="TOK") != base).any()
    with artifact.opened(result.archive) as folder:
        manifest = artifact.read_manifest(folder)
        assert (manifest.family, manifest.method) == ("flux_kontext", method)
        card = (folder / artifact.CARD).read_text(encoding="utf-8")
    assert 'image=load_image("reference.png")' in card and "from diffusers.utils import load_image" in card
    generator.release()
    assert (draw(generator, condition=(photo,), prompt="TOK") == base).all()


def test_pictures_without_a_reference_and_conditions_are_refused(of_kontext, dataset, pairs, train_on):
    with pytest.raises(UserError, match=r"upload it beside x\.png as x\.condition\.png"):
        train_on(of_kontext(method="lora"), dataset)
    with pytest.raises(UserError, match="method condition is not for FLUX Kontext"):
        train_on(of_kontext(method="condition", lora_targets=None), pairs)


def test_what_flux_dev_learned_is_drawn_too_but_not_the_other_way(
    tiny_flux, tiny_kontext, job_settings, of_kontext, dataset, pairs, train_on, photo, tmp_path
):
    own = {"base_model": str(tiny_flux), "method": "lora", "learning_rate": 0.02, "lr_warmup_steps": 0}
    train_on(job_settings.model_copy(update=own | {"output_dir": tmp_path / "dev"}), dataset)
    style = tmp_path / "dev" / "delivered"
    generator = Generator(str(tiny_kontext), "cpu")
    base = draw(generator, condition=(photo,))
    generator.use(style)
    assert (draw(generator, condition=(photo,)) != base).any()
    train_on(of_kontext(method="lora", max_train_steps=1, output_dir=tmp_path / "kontext"), pairs)
    with pytest.raises(UserError, match="was trained on a flux_kontext"):
        Generator(str(tiny_flux), "cpu").use(tmp_path / "kontext" / "delivered")
