"""The whole job, from a zip of pictures to the archive, the report and the pictures drawn with it."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from preprocessing.errors import UserError
from trainer import artifact, families, job
from trainer.config import JobSettings
from trainer.drawing import DrawSettings
from trainer.generate import Generator

METHODS = ["pivotal", *(pytest.param(m, marks=pytest.mark.slow) for m in ("lora", "textual_inversion", "full"))]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A zip of three pictures of two shapes, two with captions of their own."""
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i, size in enumerate(((40, 40), (48, 44), (90, 40))):
            packed = io.BytesIO()
            Image.new("RGB", size, (200, 60 * i, 30)).save(packed, "PNG")
            archive.writestr(f"{i}.png", packed.getvalue())
        archive.writestr("0.txt", "a photo of TOK")
        archive.writestr("1.txt", "stoking the fire")
    return path


@pytest.fixture
def small(settings, pictures):
    """Settings of a job from the zip, with changes."""
    few = {"preview_prompts": ("a photo of {trigger}", "a dog"), "preview_seeds": (3,), "max_train_steps": 3}
    return lambda **changes: settings(**({"input_images": pictures} | few | changes))


def members(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


@pytest.mark.parametrize("method", METHODS)
def test_a_zip_becomes_an_archive_a_report_and_pictures(method, small, tiny_model):
    chosen = small(method=method, base_model=str(tiny_model))
    seen: list[tuple[str, int, int]] = []
    result = job.train(chosen, lambda *step: seen.append(step))
    assert result.archive == chosen.output_dir / "trained_model.tar"
    files = members(result.archive)
    expected = {"README.md", "manifest.json", "config.yaml", "captions.jsonl", "metrics.jsonl", "report.html"}
    expected |= {"evaluation.json"}
    expected |= {f"samples/{i:02d}_{kind}.png" for i in (0, 1) for kind in ("base", "adapted")}
    expected |= {"adapter.safetensors"} if method != "textual_inversion" else set()
    expected |= {"embeddings.safetensors"} if method in ("pivotal", "textual_inversion") else set()
    expected |= {"comfyui/adapter.safetensors"} if method in ("pivotal", "lora") else set()
    expected |= {"comfyui/embeddings/TOK.safetensors"} if method in ("pivotal", "textual_inversion") else set()
    expected |= {"comfyui/adapter_with_embeddings.safetensors"} if method == "pivotal" else set()
    assert set(files) == expected
    check_manifest(files, chosen, result)
    check_captions(files, chosen)
    check_progress(seen, result)
    check_pictures(result, chosen, files)


def check_manifest(files: dict[str, bytes], chosen: JobSettings, result: job.JobResult) -> None:
    manifest = artifact.Manifest.model_validate_json(files["manifest.json"])
    assert manifest.base_hash == families.fingerprint(chosen.base_model)
    assert (manifest.step, manifest.trigger_word, manifest.method) == (3, "TOK", chosen.method)
    assert manifest.tokens == (("<s0>", "<s1>") if chosen.method in ("pivotal", "textual_inversion") else ())
    filled = JobSettings.model_validate(yaml.safe_load(files["config.yaml"]))
    assert filled == JobSettings.model_validate(manifest.settings)
    assert filled == job.fill(chosen) and all(v is not None for k, v in filled if k in ("resolution", "lora_rank"))
    rows = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(np.isfinite(row["loss"]) and row["images_per_second"] > 0 for row in rows)
    assert result.report.read_bytes() == files["report.html"]


def check_captions(files: dict[str, bytes], chosen: JobSettings) -> None:
    rows = {row["file_name"]: row for row in map(json.loads, files["captions.jsonl"].splitlines())}
    assert rows["0.png"]["text"] == rows["0.png"]["original"] == "a photo of TOK"
    assert rows["1.png"]["text"] == "TOK, stoking the fire" and rows["1.png"]["original"] == "stoking the fire"
    assert rows["2.png"]["text"] == "TOK" and rows["2.png"]["by"] == chosen.captioner


def check_progress(seen: list[tuple[str, int, int]], result: job.JobResult) -> None:
    stages = ["prepare", "load", "cache", "train", "save", "preview"]
    assert [stage for stage in dict.fromkeys(step[0] for step in seen) if stage in stages] == stages
    assert [done for stage, done, total in seen if stage == "train" and total == 3] == [1, 2, 3]
    assert set(result.stage_seconds) == set(stages) and all(value >= 0 for value in result.stage_seconds.values())


def check_pictures(result: job.JobResult, chosen: JobSettings, files: dict[str, bytes]) -> None:
    """The samples are what anybody draws with the archive."""
    generator = Generator(chosen.base_model, "cpu")
    prompts = ["a photo of TOK", "a dog"]
    for kind in ("base", "adapted"):
        if kind == "adapted":
            generator.use(result.archive)
        drawn = generator.draw_prompts(prompts, [3, 3], DrawSettings(prompt=prompts[0]))
        for i, picture in enumerate(drawn):
            with Image.open(io.BytesIO(files[f"samples/{i:02d}_{kind}.png"])) as sample:
                # a level or two: what is drawn beside it in one batch rounds its sums otherwise
                np.testing.assert_allclose(np.asarray(sample, int), np.asarray(picture, int), atol=2)
    assert [path.name for path in result.samples] == ["00_adapted.png", "01_adapted.png"]
    for path in result.samples:
        assert path.read_bytes() == files[f"samples/{path.name}"]


def weights(archive: Path) -> dict[str, bytes]:
    """The weights; the export for other tools names the day it was made."""
    return {name: data for name, data in members(archive).items() if name in (artifact.ADAPTER, artifact.EMBEDDINGS)}


def test_config_yaml_trains_the_same_again(small, tmp_path):
    first = job.train(small(seed=5, output_dir=tmp_path / "first"))
    again = yaml.safe_load(members(first.archive)["config.yaml"]) | {"output_dir": str(tmp_path / "again")}
    second = job.train(JobSettings.model_validate(again))
    assert weights(first.archive) == weights(second.archive)


def test_a_finished_job_that_is_resumed_delivers_the_same_again(small):
    first = weights(job.train(small()).archive)
    assert weights(job.train(small(resume=True)).archive) == first


def test_gradient_checkpointing_trains_the_same(settings, train_on, dataset, tmp_path):
    plain = train_on(settings(output_dir=tmp_path / "plain"), dataset)
    saving = train_on(settings(output_dir=tmp_path / "saving", gradient_checkpointing=True), dataset)
    torch.testing.assert_close(saving.losses, plain.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(saving.tensors, plain.tensors, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["pivotal", pytest.param("full", marks=pytest.mark.slow)])
def test_bf16_trains_fp32_weights(method, settings, train_on, dataset, tmp_path):
    half = train_on(settings(method=method, mixed_precision="bf16", output_dir=tmp_path / "half"), dataset)
    whole = train_on(settings(method=method, output_dir=tmp_path / "whole"), dataset)
    assert {tensor.dtype for tensor in half.tensors.values()} == {torch.float32}
    assert {p.dtype for p in half.state["parameters"]} == {torch.float32}
    torch.testing.assert_close(half.tensors, whole.tensors, rtol=0.5, atol=5e-3)
    assert half.losses == pytest.approx(whole.losses, rel=0.03) and half.losses != whole.losses


@pytest.mark.parametrize("method", [pytest.param("pivotal", marks=pytest.mark.slow), "lora"])
def test_preservation_keeps_the_base_models_predictions(method, settings, train_on, dataset, load_family, tmp_path):
    drifts = []
    for weight in (0.0, 20.0):
        chosen = settings(
            method=method,
            class_word="thing",
            preservation_weight=weight,
            output_dir=tmp_path / str(weight),
            max_train_steps=15,
            train_batch_size=3,
            learning_rate=3e-3,
            lr_warmup_steps=0,
            lora_targets="all",
        )
        drifts.append(drift(load_family, chosen, train_on(chosen, dataset).weights))
    assert drifts[1] < 0.6 * drifts[0]


def drift(load_family: Any, chosen: JobSettings, folder: Path) -> float:
    """How far the predictions on prompts without the trigger have moved from the base model's: mean square."""
    generator, base = Generator(chosen.base_model, "cpu"), load_family(Path(chosen.base_model))
    generator.use(folder)
    prompts = [f"a photo of thing number {i}" for i in range(4)]
    noisy = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.3, 0.6, 0.8, 1.0])
    with torch.no_grad():
        moved, still = (f.predict(noisy, t, f.encode_text(prompts)) for f in (generator.family, base))
    return (moved - still).square().mean().item()


def test_one_job_after_another_and_after_a_failed_one_is_as_if_alone(settings, train_on, dataset, tmp_path):
    alone = train_on(settings(output_dir=tmp_path / "alone", seed=2), dataset)
    train_on(settings(output_dir=tmp_path / "full", method="full", learning_rate=0.1, mixed_precision="bf16"), dataset)
    with pytest.raises(UserError, match="adamw8bit"):
        train_on(settings(output_dir=tmp_path / "failed", optimizer="adamw8bit"), dataset)
    after = train_on(settings(output_dir=tmp_path / "after", seed=2), dataset)
    assert alone.losses == after.losses
    assert all(torch.equal(alone.tensors[name], value) for name, value in after.tensors.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_images": Path("no/such.zip")}, r"input_images no/such\.zip does not exist"),
        ({"base_model": "no/such/model"}, "base_model 'no/such/model'"),
        ({"mixed_precision": "fp16"}, "mixed_precision fp16"),
        ({"optimizer": "adamw8bit"}, "adamw8bit"),
        ({"report_to": "wandb"}, "report_to wandb"),
    ],
)
def test_what_the_user_can_mend_is_said_in_one_sentence(changes, message, small, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message) as caught:
        job.train(small(**changes))
    assert "\n" not in str(caught.value)


def test_a_zip_without_pictures_is_refused(small, tmp_path):
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("a.txt", "a photo of TOK")
    with pytest.raises(UserError, match=r"none\.zip"):
        job.train(small(input_images=tmp_path / "none.zip"))


def test_an_open_choice_takes_the_models_own_value(small, tiny_model):
    filled = job.fill(small(base_model=str(tiny_model), resolution=None, max_train_steps=None, captioner="auto"))
    assert (filled.resolution, filled.max_train_steps, filled.captioner) == (32, 800, "blip")
    assert job.fill(small(max_train_steps=7)).max_train_steps == 7


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, ("muon", 8)),
        ({"optimizer": "prodigy"}, ("prodigy", 8)),
        ({"n_tokens": 2}, ("muon", 2)),
        ({"method": "textual_inversion"}, ("adamw", 3)),
    ],
)
def test_what_a_base_model_recommends_is_taken_where_no_choice_was_made(changes, taken, small, tiny_sd, tmp_path):
    base = shutil.copytree(tiny_sd, tmp_path / "base")
    recommended = {"pivotal": {"optimizer": "muon", "n_tokens": 8}}
    (base / "training_defaults.json").write_text(json.dumps(recommended), encoding="utf-8")
    chosen = small(base_model=str(base), **{"method": "pivotal", "optimizer": None, "n_tokens": None} | changes)
    filled = job.fill(chosen)
    assert (filled.optimizer, filled.n_tokens) == taken


def test_tensorboard_is_written_where_it_is_asked_for(small):
    chosen = small(report_to="tensorboard")
    job.train(chosen)
    assert list((chosen.output_dir / "logs").rglob("events.out.tfevents.*"))
