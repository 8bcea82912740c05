"""Drawing without weights is the stock pipeline's drawing, pixel for pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from preprocessing.errors import UserError
from trainer.drawing import DrawSettings, Scheduler
from trainer.families.base import DDPM_SCHEDULERS
from trainer.generate import Generator, seed_of

PROMPT = "a photo of a dog"
STOCK = {"sd": "StableDiffusion", "xl": "StableDiffusionXL"}
CALL = {"num_inference_steps": 4, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def generator(tiny_model: Path) -> Generator:
    return Generator(str(tiny_model), "cpu")


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> Any:
    pipe = getattr(diffusers, f"{STOCK[tiny_model.name]}Pipeline").from_pretrained(tiny_model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings(**changes: Any) -> DrawSettings:
    return DrawSettings(**({"prompt": PROMPT} | CALL | changes))


def equal(first: Image.Image, second: Image.Image, levels: int = 0) -> None:
    """The same picture, up to `levels` of 255, and not a blank one."""
    a, b = np.asarray(first, dtype=np.int16), np.asarray(second, dtype=np.int16)
    assert a.shape == b.shape and np.ptp(a) > 20
    assert np.abs(a - b).max() <= levels


def differ(first: Image.Image, second: Image.Image) -> bool:
    return bool((np.asarray(first) != np.asarray(second)).any())


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_prompt_is_drawn_as_the_stock_pipeline_does(generator, stock):
    for seed in (0, 7):
        (found,) = generator.draw_prompts([PROMPT], [seed], settings())
        equal(found, stock(PROMPT, generator=seeded(seed), **CALL).images[0])


def test_a_negative_prompt_too(generator, stock):
    (found,) = generator.draw_prompts([PROMPT], [3], settings(negative_prompt="blurry"))
    equal(found, stock(PROMPT, negative_prompt="blurry", generator=seeded(3), **CALL).images[0])
    assert differ(found, generator.draw_prompts([PROMPT], [3], settings())[0])


def test_without_guidance_and_at_another_size_too(generator, stock):
    size = {"width": 48, "height": 24}
    (found,) = generator.draw_prompts([PROMPT], [3], settings(guidance_scale=1.0, **size))
    equal(found, stock(PROMPT, generator=seeded(3), num_inference_steps=4, guidance_scale=1.0, **size).images[0])
    assert found.size == (48, 24)


@pytest.mark.parametrize("name", DDPM_SCHEDULERS)
def test_every_scheduler_is_diffusers_own(generator, stock, name, monkeypatch):
    class_name = {
        "ddim": "DDIMScheduler",
        "ddpm": "DDPMScheduler",
        "euler": "EulerDiscreteScheduler",
        "euler_ancestral": "EulerAncestralDiscreteScheduler",
        "dpmsolver++": "DPMSolverMultistepScheduler",
        "unipc": "UniPCMultistepScheduler",
    }[name]
    monkeypatch.setattr(stock, "scheduler", getattr(diffusers, class_name).from_config(stock.scheduler.config))
    (found,) = generator.draw_prompts([PROMPT], [5], settings(scheduler=name))
    equal(found, stock(PROMPT, generator=seeded(5), **CALL).images[0])


def test_a_scheduler_is_for_one_call_only(generator):
    before = generator.draw_prompts([PROMPT], [5], settings())[0]
    generator.draw_prompts([PROMPT], [5], settings(scheduler="euler_ancestral"))
    equal(generator.draw_prompts([PROMPT], [5], settings())[0], before)


def test_all_schedulers_that_settings_allow_exist():
    assert set(DDPM_SCHEDULERS) == set(Scheduler.__args__)


def test_image_to_image_is_the_stock_pipelines(generator, stock, photo, tiny_model):
    pipe = getattr(diffusers, f"{STOCK[tiny_model.name]}Img2ImgPipeline")(**stock.components)
    pipe.set_progress_bar_config(disable=True)
    with Image.open(photo) as picture:
        start = picture.resize((32, 32), Image.Resampling.LANCZOS)
    for strength in (0.5, 1.0):
        (found,) = generator.draw_prompts([PROMPT], [2], settings(image=photo, prompt_strength=strength))
        expected = pipe(PROMPT, image=start, strength=strength, generator=seeded(2), **CALL).images[0]
        equal(found, expected)


def test_strength_zero_keeps_the_picture(generator, photo):
    with Image.open(photo) as picture:
        start = picture.resize((32, 32), Image.Resampling.LANCZOS)
    (kept,) = generator.draw_prompts([PROMPT], [2], settings(image=photo, prompt_strength=0.0))
    equal(kept, start)


def test_a_strength_of_less_than_one_step_takes_one(generator, photo):
    (found,) = generator.draw_prompts([PROMPT], [2], settings(image=photo, prompt_strength=0.1))
    (expected,) = generator.draw_prompts([PROMPT], [2], settings(image=photo, prompt_strength=0.25))
    equal(found, expected)


def test_a_starting_picture_is_turned_upright_and_cropped(generator, photo, tmp_path):
    with Image.open(photo) as picture:
        upright = picture.convert("RGB")
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    lying.save(tmp_path / "lying.png", exif=exif)
    wide = Image.new("RGB", (128, 64))
    wide.paste(upright, (32, 0))
    wide.save(tmp_path / "wide.png")
    expected = generator.draw_prompts([PROMPT], [2], settings(image=photo))[0]
    for name in ("lying.png", "wide.png"):
        equal(generator.draw_prompts([PROMPT], [2], settings(image=tmp_path / name))[0], expected, levels=3)


def test_a_picture_is_its_own_prompts_and_seeds_whatever_is_drawn_beside_it(generator):
    prompts, seeds = [PROMPT, "a red star", "it", PROMPT] * 5, [0, 1, 2, 3] * 5  # more than one batch
    together = generator.draw_prompts(prompts, seeds, settings())
    assert len(together) == 20
    for i in (0, 1, 15, 16, 19):
        alone = generator.draw_prompts([prompts[i]], [seeds[i]], settings())[0]
        equal(together[i], alone, levels=1)  # a matrix product may round otherwise in a larger batch


def test_draw_counts_seeds_up_from_the_first_zero_included(generator):
    drawn = generator.draw(settings(seed=0, num_outputs=3))
    for seed, picture in enumerate(drawn):
        equal(picture, generator.draw_prompts([PROMPT], [seed], settings())[0], levels=1)
    assert differ(drawn[0], drawn[1])


def test_without_a_seed_each_call_has_another():
    assert seed_of(settings(seed=0)) == 0
    assert seed_of(settings(seed=2**63 - 1)) == 2**63 - 1
    assert len({seed_of(settings()) for _ in range(8)}) > 1


def test_the_largest_seeds_can_be_counted_up(generator):
    assert len(generator.draw(settings(seed=2**63 - 1, num_outputs=2, num_inference_steps=1))) == 2


def test_sizes_that_the_model_cannot_draw_are_refused(generator):
    with pytest.raises(UserError, match=r"width 50 .* multiple of 4.* 48"):
        generator.draw(settings(width=50))
    with pytest.raises(UserError, match=r"height 18 .* multiple of 4.* 16"):
        generator.draw(settings(height=18))


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_a_starting_picture_that_is_none_is_refused(generator, tmp_path, content):
    path = tmp_path / "start.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"start\.png"):
        generator.draw(settings(image=path))
