"""Whole jobs of method condition: judged as others are, drawn from condition pictures, gone on with, read alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from preprocessing.errors import UserError
from trainer import artifact, delivery, export, job, methods, start
from trainer.cache import build
from trainer.config import JobSettings
from trainer.drawing import DrawSettings
from trainer.evaluation import history
from trainer.evaluation.points import Points
from trainer.evaluation.summary import Summary
from trainer.generate import Generator
from trainer.preview import FROM_CONDITIONS
from trainer.step import TrainStep

FLUX = pytest.mark.parametrize("tiny_model", ["flux"], indirect=True)
UNRELATED = ("a lake", "a street at night")


@pytest.fixture
def conditioned(job_settings, tiny_flux) -> Callable[..., JobSettings]:
    """Settings of a short job that learns from edges."""
    given = job_settings.model_dump(exclude={"optimizer", "weight_decay", "max_grad_norm", "lora_targets"})
    own = {"base_model": str(tiny_flux), "method": "condition", "optimizer": "adamw", "learning_rate": 0.02}
    return lambda **changes: JobSettings.model_validate(given | own | changes)


@pytest.fixture
def asked(lab, dataset, conditioned) -> Callable[..., tuple[Any, TrainStep, Points]]:
    """A method attached to a fresh model with random weights, the module that answers, and points on two pictures."""

    def made(**changes: Any) -> tuple[Any, TrainStep, Points]:
        settings = conditioned(**changes)
        method = methods.create(settings)
        captions = [item.caption for item in dataset.items]
        text = [*captions, *UNRELATED, *(caption.replace("TOK ", "") for caption in captions)]
        cached = build(lab.family, dataset, text, lambda *_: None, method)
        for seed, parameter in enumerate(p for group in method.attach(lab.family) for p in group.parameters):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        step = TrainStep(lab.family, method, cached, settings)
        return method, step, Points.of(cached, settings, (1, 3), (16, UNRELATED)).prepared(step)

    return made


@FLUX
@pytest.mark.parametrize("tasks", [("canny",), ("deblurring",), ("fill",)])
def test_points_are_asked_under_conditions_and_the_base_model_without(tasks, asked, lab):
    integrated = tasks == ("fill",)
    method, step, points = asked(condition_tasks=tasks, image_dropout=1.0, token_integration=integrated)
    losses, base = points.losses(step), points.base_losses(step)
    assert torch.equal(points.losses(step), losses)  # also where conditions are drawn by chance
    assert (losses - base).abs().max() > 1e-3
    assert points.drift(step).max() < 1e-12  # a prompt alone: the base model
    method.detach(lab.family)
    torch.testing.assert_close(points.base_losses(step), base)  # now it is the base model
    _, step, points = asked(condition_tasks=tasks, image_dropout=0.0, token_integration=integrated)
    torch.testing.assert_close(points.losses(step), losses)


def test_a_whole_job_is_judged_and_drawn_from_conditions(conditioned, dataset, monkeypatch, tmp_path):
    monkeypatch.setattr(job, "prepared", lambda *_: dataset)
    settings = conditioned(max_train_steps=4, holdout=1, preview_seeds=(1,), evaluate_every=2)
    result = job.train(settings)
    summary = result.summary
    assert summary.held_out and len(summary.curve) == 3
    assert summary.scores()["drift"] == 0 and summary.near_copies is None and summary.diversity is None
    assert FROM_CONDITIONS in result.report.read_text(encoding="utf-8")
    pictures = {
        path.stem.partition("_")[2]: np.asarray(Image.open(path)) for path in result.samples[0].parent.glob("*")
    }
    assert {"base", "adapted", "at_0.5", "at_1.5"} <= pictures.keys()
    assert len({pictures[name].tobytes() for name in ("base", "adapted", "at_0.5", "at_1.5")}) == 4
    with artifact.opened(result.archive) as folder:
        assert Summary.model_validate_json((folder / artifact.EVALUATION).read_text(encoding="utf-8")) == summary
        assert not (folder / "comfyui").exists()  # no other program routes an adapter
        card = (folder / artifact.CARD).read_text(encoding="utf-8")
    assert "load_lora_weights" not in card and "--condition picture_1.png" in card and "canny" in card
    _draws(result.archive, settings, dataset, result.samples[0])


def _draws(archive: Path, settings: JobSettings, dataset: Any, sample: Path) -> None:
    """The archive draws the sample again from the held-out picture's edges."""
    generator = Generator(settings.base_model, "cpu")
    generator.use(archive)
    shown = [dataset.folder / item.image for item in dataset.items]
    captions = [item.caption for item in dataset.items]
    with Image.open(sample) as expected:
        found = [
            generator.draw(DrawSettings(prompt=caption, seed=1, condition=(path,), width=32, height=32))[0].tobytes()
            == expected.tobytes()
            for path, caption in zip(shown, captions, strict=True)
        ]
    assert sum(found) == 1


def test_folds_judge_conditions_too(conditioned, dataset, train_on):
    """Each run attaches anew, and knows the black picture that stands for a dropped condition."""
    settings = conditioned(holdout=None, validation_folds=2, image_dropout=1.0, max_train_steps=2)
    train_on(settings, dataset)
    folds = [history.read(path, 2) for path in settings.output_dir.glob("evaluation/fold_*/history.jsonl")]
    assert len(folds) == 2 and all(fold.unseen and fold.steps == [0, 2] for fold in folds)


@pytest.fixture
def weights(asked, lab, dataset, tmp_path) -> Path:
    """The folder of an archive with random weights; the model is the base model again."""
    method, _, _ = asked(independent_condition=True)
    folder = tmp_path / "weights"
    folder.mkdir()
    delivery.save_weights(folder, lab.family, method, dataset, delivery.Run(method.settings, 1))
    delivery.add_exports(folder, lab.family)
    method.detach(lab.family)
    return folder


@FLUX
@pytest.mark.parametrize("bare", [False, True], ids=["archive", "a file that says nothing of itself"])
def test_a_job_goes_on_from_conditioned_weights(bare, weights, conditioned, dataset, train_on, tmp_path):
    source, before = weights, load_file(weights / artifact.ADAPTER)
    if bare:
        source = tmp_path / "bare.safetensors"
        save_file(before, source)
    given = {"init_adapter": str(source), "output_dir": tmp_path / "on", "lora_rank": None, "learning_rate": 0.0}
    settings = job.fill(conditioned(**given, independent_condition=True, max_train_steps=1))
    trained = train_on(settings, dataset)
    assert before.keys() == trained.tensors.keys()
    assert all(torch.equal(trained.tensors[key], value) for key, value in before.items())
    with pytest.raises(UserError, match="target_modules does not agree"):
        train_on(settings.model_copy(update={"target_modules": r".*\.attn\.to_q"}), dataset)


@FLUX
def test_weights_of_other_methods_are_no_start(weights, conditioned, train_variant, lab):
    lora, method = train_variant("lora")
    method.detach(lab.family)
    for source, changes in ((weights, {"method": "lora"}), (lora, {})):
        settings = conditioned(init_adapter=str(source), lora_rank=None, **changes)
        with pytest.raises(UserError, match="acts on other tokens"), start.opened(settings, lab.family) as begun:
            start.agreed(settings, begun, lab.family)


@FLUX
def test_the_adapter_alone_knows_that_it_is_conditioned(weights, conditioned, dataset, tmp_path):
    lone = shutil.copy(weights / artifact.ADAPTER, tmp_path / "lone.safetensors")
    picture = dataset.folder / dataset.items[0].image
    found = []
    for source in (weights, Path(lone)):
        generator = Generator(conditioned().base_model, "cpu")
        generator.use(source)
        found.append(generator.draw(DrawSettings(prompt="a dog", seed=1, condition=(picture,)))[0].tobytes())
    assert found[0] == found[1]


@FLUX
def test_what_no_format_holds_is_said(weights, tmp_path):
    with pytest.raises(UserError, match="kohya has no place"):
        export.export(export.ExportSettings(weights=str(weights), out=tmp_path / "kohya", format="kohya"))
    with pytest.raises(UserError, match="cannot be merged"):
        export.export(export.ExportSettings(weights=str(weights), out=tmp_path / "merged", merge=True))
    told = export.export(export.ExportSettings(weights=str(weights), out=tmp_path / "small", rank=2, format="archive"))
    manifest = artifact.read_manifest(weights)
    assert manifest.method == "condition" and any("trained_model.tar" in line for line in told)
    with artifact.opened(tmp_path / "small" / "trained_model.tar") as folder:
        assert artifact.read_manifest(folder).nets["transformer"]["r"] == 2


@pytest.mark.slow
def test_folds_change_nothing_of_a_run_on_a_base_in_8_bits(conditioned, dataset, train_on, tmp_path):
    """The adapter that a later run attaches keeps its precision beside weights that are stored in 8 bits."""
    given = {"method": "lora", "lora_targets": "attention", "base_precision": "fp8", "gradient_checkpointing": True}
    alone = train_on(conditioned(**given, output_dir=tmp_path / "alone"), dataset)
    behind = train_on(conditioned(**given, holdout=None, validation_folds=2), dataset)
    assert behind.losses == alone.losses[: len(behind.losses)] and len(behind.losses) > 1
