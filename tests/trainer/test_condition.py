"""The method condition: what each task shows, what is trained on, and that it comes and goes whole."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from preprocessing.errors import UserError
from preprocessing.prepare import prepare
from preprocessing.prepared import PreparedDataset
from trainer import artifact, cache, commandline, condition_tasks, delivery, methods
from trainer.branches import HOLE
from trainer.condition_tasks import TASKS, Task, task
from trainer.config import JobSettings
from trainer.drawing import DrawSettings
from trainer.generate import Generator
from trainer.metrics import METRICS_FILE
from trainer.step import BatchMaker, TrainStep

FLUX = pytest.mark.parametrize("tiny_model", ["flux"], indirect=True)
BOTH = pytest.mark.parametrize("tiny_model", ["flux", "schnell"], indirect=True)


def photo(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def same(found: Image.Image, expected: Image.Image) -> None:
    assert found.mode == expected.mode == "RGB" and np.array_equal(np.asarray(found), np.asarray(expected))


def test_the_conditions_of_the_tasks_pixel_by_pixel():
    picture = photo()
    edges = cv2.Canny(np.asarray(picture), 100, 200)
    assert edges.any()
    same(task("canny").condition(picture, None), Image.fromarray(edges).convert("RGB"))
    same(task("coloring").condition(picture, None), picture.convert("L").convert("RGB"))
    same(task("deblurring").condition(picture, None), picture.filter(ImageFilter.GaussianBlur(5)))
    radius = random.Random(3).randint(1, 10)
    same(task("deblurring").condition(picture, random.Random(3)), picture.filter(ImageFilter.GaussianBlur(radius)))
    for name in ("sr", "subject", "pair", "fill"):
        same(task(name).condition(picture, None), picture)
    assert {name for name, kind in TASKS.items() if kind.apart} == {"sr", "subject"}
    assert {name for name, kind in TASKS.items() if kind.random} == {"deblurring", "fill"}


def test_depth_is_the_condition_or_the_target(monkeypatch):
    grey = Image.linear_gradient("L")
    asked = []
    monkeypatch.setattr(
        condition_tasks, "_depth_estimator", lambda name: asked.append(name) or (lambda _: {"depth": grey})
    )
    expected = grey.convert("RGB").resize((32, 32))
    same(task("depth").condition(photo(), None), expected)
    same(task("depth_pred").condition(photo(), None), photo())
    same(task("depth_pred").target(photo()), expected)
    assert set(asked) == {"depth-anything/Depth-Anything-V2-Small-hf"}


def test_holes_are_rectangles_and_half_of_them_are_turned_round():
    turned, shares = 0, []
    for seed in range(200):
        hole = task("fill").hole((24, 16), random.Random(seed))
        assert hole.shape == (16, 24) and hole.dtype == bool
        shares.append(hole.mean())
        corners = hole[[0, 0, -1, -1], [0, -1, 0, -1]]
        inside = ~hole if corners.sum() >= 3 or (corners.sum() == 2 and hole.mean() > 0.5) else hole
        rows, columns = inside.any(axis=1), inside.any(axis=0)
        turned += inside is not hole
        if inside.any():
            assert inside[np.ix_(rows, columns)].all()
    assert 0.3 < np.mean(shares) < 0.7 and 60 < turned < 140


def test_a_class_of_ones_own_is_a_task(tmp_path, monkeypatch):
    (tmp_path / "own_task.py").write_text(
        "from trainer.condition_tasks import Task\n"
        "class Flipped(Task):\n"
        "    def condition(self, picture, rng):\n"
        "        return picture.transpose(0)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    same(task("own_task:Flipped").condition(photo(), None), photo().transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    for name in ("edges", "own_task:Missing", "no_such_module:X"):
        with pytest.raises(UserError, match=r"none of canny"):
            task(name)


def settings_of(job_settings: JobSettings, source: Path, **changes: Any) -> JobSettings:
    given = job_settings.model_dump(exclude={"optimizer", "weight_decay", "max_grad_norm"})
    return JobSettings.model_validate(given | {"base_model": str(source), "method": "condition"} | changes)


def test_defaults_are_ominicontrols_and_its_ways_to_write_them_are_read(job_settings, tmp_path):
    chosen = settings_of(job_settings, tmp_path)
    assert (chosen.optimizer, chosen.weight_decay, chosen.max_grad_norm) == ("prodigy", 0.01, 0.5)
    shapes = [
        {"optimizer": {"type": "AdamW", "lr": "1e-4", "weight_decay": "0.001"}},
        {"optimizer": {"type": "AdamW", "params": {"lr": "1e-4", "weight_decay": "0.001"}}},
    ]
    for shape in shapes:
        given = shape | {"lora_config": {"r": 128, "lora_alpha": 64}, "method": "condition", "input_images": "x"}
        read = commandline.check(JobSettings, commandline.parse_recipe(json.dumps(given), "recipe", JobSettings))
        assert (read.optimizer, read.learning_rate, read.weight_decay) == ("adamw", 1e-4, 0.001)
        assert (read.lora_rank, read.lora_alpha) == (128, 64)
    for given in ('{"optimizer": {"type": "AdamW", "momentum": 1}}', '{"lora_config": {"momentum": 1}}'):
        with pytest.raises(UserError, match="momentum"):
            commandline.parse_recipe(given, "recipe", JobSettings)


@pytest.fixture
def train_step(lab, tiny_model, job_settings, dataset) -> Any:
    """Encodes a data set for a method and attaches it: (method, batch maker, step)."""

    def made(data: PreparedDataset = dataset, **changes: Any) -> tuple[Any, BatchMaker, TrainStep]:
        chosen = settings_of(job_settings, tiny_model, **changes)
        method = methods.create(chosen)
        captions = [item.caption for item in data.items]
        cached = cache.build(lab.family, data, captions, lambda *_: None, method)
        method.attach(lab.family)
        return (
            method,
            BatchMaker(cached, chosen, torch.device("cpu"), ()),
            TrainStep(lab.family, method, cached, chosen),
        )

    return made


def encoded(lab: Any, pictures: list[Image.Image]) -> Tensor:
    pixels = torch.stack([torch.from_numpy(np.array(p, np.float32)).permute(2, 0, 1) / 127.5 - 1 for p in pictures])
    return lab.family.encode_pixels(pixels)


@FLUX
def test_fixed_conditions_are_cached_and_dropped_to_black(train_step, lab, dataset):
    method, batches, _ = train_step(condition_tasks=("canny", "coloring"), image_dropout=0.0)
    batch = method.prepared(lab.family, batches.make(0, [2, 0], range(2), 2))
    sources = [Image.open(dataset.folder / dataset.items[i].image) for i in (2, 0)]
    for index, name in enumerate(("canny", "coloring")):
        expected = encoded(lab, [task(name).condition(source, None) for source in sources])
        torch.testing.assert_close(batch.conditioning[f"condition_{index}"], expected, rtol=1e-4, atol=1e-4)
    assert not method.needs_vae
    method.detach(lab.family)
    method, batches, _ = train_step(image_dropout=1.0)
    black = encoded(lab, [Image.new("RGB", (32, 32))])
    found = method.prepared(lab.family, batches.make(0, [2, 0], range(2), 2)).conditioning["condition_0"]
    torch.testing.assert_close(found, black.expand_as(found))


@FLUX
def test_random_conditions_are_drawn_anew_and_the_same_for_the_same_step(train_step, lab):
    method, batches, _ = train_step(condition_tasks=("deblurring",), image_dropout=0.0)
    assert method.needs_vae

    def at(step: int) -> Tensor:
        return method.prepared(lab.family, batches.make(step, [0, 0], range(2), 2)).conditioning["condition_0"]

    assert torch.equal(at(1), at(1)) and not torch.equal(at(1), at(2)) and not torch.equal(at(1)[0], at(1)[1])


@FLUX
def test_what_a_fill_conditions_on_never_saw_the_hole(train_step, lab, dataset):
    method, batches, _ = train_step(condition_tasks=("fill",), image_dropout=0.0)
    batch = method.prepared(lab.family, batches.make(3, [1], range(1), 1))
    source = np.asarray(Image.open(dataset.folder / dataset.items[1].image))
    hole = task("fill").hole((32, 32), random.Random(batch.keys[0]))
    expected = encoded(lab, [Image.fromarray(source * ~hole[..., None])])
    torch.testing.assert_close(batch.conditioning["condition_0"], expected, rtol=1e-4, atol=1e-4)


@FLUX
def test_integrated_tokens_are_the_picture_or_the_condition(train_step, lab):
    method, batches, step = train_step(condition_tasks=("fill",), token_integration=True)
    batch = method.prepared(lab.family, batches.make(0, [0, 1], range(2), 2))
    hole = batch.conditioning[HOLE]
    assert hole.shape == (2, 1, 8, 8) and not torch.equal(hole[0], hole[1])
    counts = []
    hook = lab.family.module("transformer").x_embedder.register_forward_hook(
        lambda _, a, __: counts.append(a[0].shape[1])
    )
    step(batches.make(0, [0, 1], range(2), 2)).backward()
    hook.remove()
    wanted = [int(count) for row in hole for count in (row.sum(), (~row).sum())]
    assert counts == wanted and all(counts)


@FLUX
@pytest.mark.parametrize("changes", [{}, {"independent_condition": True}, {"condition_resolution": 16}], ids=str)
def test_a_few_steps_learn_and_come_and_go(changes, train_step, lab):
    before, prediction = lab.snapshot(), lab.predict("a dog")
    method, batches, step = train_step(**changes)
    assert torch.equal(lab.predict("a dog"), prediction)  # nothing conditions it
    parameters = [p for p in lab.family.module("transformer").parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=0.02)
    losses = []
    for _ in range(6):
        loss = step(batches.make(0, [0, 1], range(2), 2))
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in parameters)
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(lab.predict("a dog"), prediction)
    method.detach(lab.family)
    lab.assert_unchanged(before)


@FLUX
def test_layers_may_be_chosen_and_none_is_told_with_its_neighbours(train_step, lab):
    method, _, _ = train_step(target_modules=r".*single_transformer_blocks\.[0-9]+\.attn\.to_[kv]")
    found = {name for name, p in lab.family.module("transformer").named_parameters() if p.requires_grad}
    assert len(found) == 2 * 2 * 2 and all("attn.to_" in name for name in found)
    method.detach(lab.family)
    with pytest.raises(UserError, match=r"nearest are transformer_blocks\.0\.attn\.add_q_proj"):
        train_step(target_modules=r"transformer_blocks\.\d+\.attn\.q_proj")
    with pytest.raises(UserError, match="no regular expression"):
        train_step(target_modules="(")


def test_other_families_say_so(tiny_sd, job_settings, dataset, load_family):
    method = methods.create(settings_of(job_settings, tiny_sd))
    with pytest.raises(UserError, match="choose a FLUX"):
        cache.build(load_family(tiny_sd), dataset, [], lambda *_: None, method)


@pytest.fixture
def trained(train_step, lab, dataset, tmp_path) -> Any:
    """A method with random weights, saved: its folder."""

    def made(**changes: Any) -> Path:
        method, _, _ = train_step(**changes)
        for seed, parameter in enumerate(p for p in lab.family.module("transformer").parameters() if p.requires_grad):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        folder = tmp_path / "weights"
        folder.mkdir()
        method.settings.output_dir.mkdir(exist_ok=True)
        (method.settings.output_dir / METRICS_FILE).touch()
        delivery.save_weights(folder, lab.family, method, dataset, delivery.Run(method.settings, 1))
        return folder

    return made


def draw(generator: Generator, **changes: Any) -> np.ndarray:
    given = {"prompt": "a dog", "guidance_scale": 2.0, "num_inference_steps": 3, "seed": 1} | changes
    return np.asarray(generator.draw(DrawSettings(**given))[0], dtype=np.int16)


@BOTH
@pytest.mark.parametrize("independent", [False, True])
def test_weights_draw_from_a_condition_and_leave_nothing_behind(independent, trained, tiny_model, tmp_path):
    folder = trained(independent_condition=independent)
    _, header = artifact.load_tensors(folder / artifact.ADAPTER)
    assert (header["condition_tasks"], header["independent_condition"]) == ("canny", str(independent).lower())
    photo().save(tmp_path / "photo.png")
    task("canny").condition(photo(), None).save(tmp_path / "edges.png")
    generator = Generator(str(tiny_model), "cpu")
    base = draw(generator)
    with pytest.raises(UserError, match="condition"):
        draw(generator, condition=(tmp_path / "photo.png",))
    generator.use(folder)
    with pytest.raises(UserError, match="condition is missing"):
        draw(generator)
    found = draw(generator, condition=(tmp_path / "photo.png",))
    ready = draw(generator, condition=(tmp_path / "edges.png",), condition_ready=True)
    assert (found == ready).all() and (found != base).any()
    assert (draw(generator, condition=(tmp_path / "photo.png",), condition_strength=0.0) == base).all()
    generator.release()
    assert (draw(generator) == base).all()


@FLUX
def test_integration_keeps_the_known_part_of_the_canvas(trained, tiny_model, tmp_path, monkeypatch):
    folder = trained(condition_tasks=("fill",), token_integration=True)
    photo().save(tmp_path / "photo.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 0, 32, 32))
    mask.save(tmp_path / "mask.png")
    generator = Generator(str(tiny_model), "cpu")
    generator.use(folder)
    decoded = []
    vae = generator.family.module("vae")
    real = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, **given: decoded.append(z) or real(z, **given))
    with pytest.raises(UserError, match="mask is missing"):
        draw(generator, condition=(tmp_path / "photo.png",))
    draw(generator, condition=(tmp_path / "photo.png",), mask=tmp_path / "mask.png")
    shown = condition_tasks.blackened(photo(), np.asarray(mask) > 0)
    with torch.no_grad():
        known = vae.encode(
            torch.from_numpy(np.array(shown, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        ).latent_dist.mean
    torch.testing.assert_close(decoded[0][..., :4], known[..., :4], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(decoded[0][..., 4:], known[..., 4:], atol=0.1)


def test_pairs_come_from_the_upload(tmp_path, job_settings):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name, picture in {
            "a.png": photo(0),
            "a.condition.png": photo(1),
            "a.condition.1.png": photo(2, (48, 24)),
            "b.jpg": photo(3, (64, 64)),
            "b.condition.png": photo(4, (32, 32)),
            "c.condition.png": photo(5),
        }.items():
            with archive.open(name, "w") as file:
                picture.save(file, "PNG")
    chosen = job_settings.model_copy(update={"input_images": tmp_path / "data.zip"})
    dataset = prepare(chosen, 4, tmp_path / "prepared")
    items = {item.source: item for item in dataset.items}
    assert items.keys() == {"a.png", "b.jpg"}
    assert [len(items[name].conditions) for name in ("a.png", "b.jpg")] == [2, 1]
    with Image.open(dataset.folder / items["a.png"].conditions[0]) as found:
        same(found, photo(1))
    with Image.open(dataset.folder / items["a.png"].conditions[1]) as found:
        assert found.size == (32, 32)
    assert [reject.source for reject in dataset.rejects] == ["c.condition.png"]
    assert {aside.source: aside.use for aside in dataset.asides}["a.condition.1.png"] == "condition 1 of a.png"
    Image.new("RGB", (32, 32)).save(dataset.folder / items["a.png"].conditions[0])
    again = prepare(chosen, 4, tmp_path / "prepared")  # a changed condition is noticed
    with Image.open(again.folder / items["a.png"].conditions[0]) as found:
        same(found, photo(1))


def test_a_task_of_pairs_without_pairs_is_told(tiny_flux, job_settings, dataset, load_family):
    method = methods.create(settings_of(job_settings, tiny_flux, condition_tasks=("subject",)))
    with pytest.raises(UserError, match=r"x\.condition\.png"):
        cache.build(load_family(tiny_flux), dataset, [], lambda *_: None, method)


def test_tasks_say_nothing_of_what_they_leave_alone():
    assert all(isinstance(kind(), Task) and kind.__doc__ for kind in TASKS.values())
