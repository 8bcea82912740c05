"""pixel_ar through the whole job: built for the data set, trained, packed, drawn from; and given text afterwards."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import predict
from preprocessing.errors import UserError
from preprocessing.prepared import PreparedDataset
from tests.trainer.test_loop import train_on_two
from trainer import artifact, families, job
from trainer.cache import encode_dataset, lookup
from trainer.config import JobSettings
from trainer.families.base import DENOISER, Family
from trainer.families.pixel_ar.begin import begin
from trainer.metrics import read_metrics
from trainer.samples import Batch

SMALL = {
    **{"hidden_dim": 16, "num_layers": 2, "text_embed_dim": 16, "num_text_layers": 1, "text_nhead": 2},
    **{"max_text_length": 12, "base_model": "pixel_ar", "method": "full", "mode": "captions", "captioner": "none"},
    **{"resolution": 16, "bucket_ratio": 1.0, "train_batch_size": 2, "max_train_steps": 4, "learning_rate": 1e-2},
    **{"lr_warmup_steps": 0, "report_to": "none", "mixed_precision": "no", "holdout": 1, "preview_seeds": (0,)},
    **{"preview_prompts": ("a red picture",), "lr_schedule": "constant", "evaluate_every": 4},
}
NAMES = ("red", "green", "blue", "grey")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of pictures of one colour with a spot each."""
    root = tmp_path_factory.mktemp("classes")
    for i, name in enumerate(NAMES):
        (root / f"a_{name}_picture").mkdir()
        for k in range(2):
            picture = Image.new("RGB", (16, 16), (60 * i, 250 - 60 * i, 80 * k))
            picture.putpixel((3 + 5 * k, 4 + i), (255, 255, 255))
            picture.save(root / f"a_{name}_picture" / f"{k}.png")
    return root


def settings(folders: Path, out: Path, **changes: Any) -> JobSettings:
    return JobSettings(**({"input_images": folders, "source": "imagenet", "output_dir": out} | SMALL | changes))


@pytest.fixture(scope="module")
def finished(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> job.JobResult:
    """A job with text and classes."""
    return job.train(settings(folders, tmp_path_factory.mktemp("job"), use_class_labels=True))


def dataset_of(folders: Path, out: Path, **changes: Any) -> tuple[JobSettings, PreparedDataset]:
    filled = job.fill(settings(folders, out, **changes))
    return filled, job.prepared(filled, job.make_accelerator(filled), lambda *_: None)


def test_a_job_learns_and_says_bits_per_dim(finished) -> None:
    rows = read_metrics(finished.output_dir / "metrics.jsonl")
    assert all(row["bits_per_dim"] == pytest.approx(row["loss"] / math.log(2)) for row in rows)
    assert finished.summary.curve[-1].loss < finished.summary.base_loss
    bits = finished.summary.delivered.loss / math.log(2)
    assert families.family_class(str(finished.output_dir)).name == "pixel_ar"  # a base model to go on from
    manifest = json.loads((finished.output_dir / "weights" / "last" / "manifest.json").read_text())
    assert manifest["base_model"] == "pixel_ar" and manifest["family"] == "pixel_ar"
    assert any(f"{bits:.3f}" in sentence for sentence in finished.summary.sentences())
    with artifact.opened(finished.archive) as folder:
        scores = artifact.read_manifest(folder).scores
    assert scores["held_out_bits_per_dim"] == pytest.approx(bits, abs=1e-5)
    assert f"{bits:.3f}" in finished.report.read_text(encoding="utf-8")
    card = (finished.output_dir / "README.md").read_text(encoding="utf-8")
    assert "TOK" not in card and "In diffusers" not in card and "library_name" not in card


def test_the_archive_draws_without_the_folder_of_the_job(finished, tmp_path) -> None:
    archive = shutil.copyfile(finished.archive, tmp_path / "w.tar")
    hidden = (finished.output_dir / "base_model").rename(finished.output_dir / "elsewhere")
    (tmp_path / "prompts.txt").write_text("a red picture\n\na blue picture, really!\n", encoding="utf-8")
    argv = ["--weights", str(archive), "--seed", "3", "--output_dir", str(tmp_path / "out")]
    try:
        predict.main([*argv, "--prompt_file", str(tmp_path / "prompts.txt"), "--num_outputs", "2"])
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == [
            "prompt_000_img_0000_a_red_picture.png",
            "prompt_000_img_0001_a_red_picture.png",
            "prompt_001_img_0000_a_blue_picture_really.png",
            "prompt_001_img_0001_a_blue_picture_really.png",
        ]
        predict.main([*argv, "--prompt", "a blue picture, really!", "--num_outputs", "2"])
        predict.main([*argv, "--prompt", "a red picture", "--class_label", "0", "--temperature", "0.5"])
    finally:
        hidden.rename(finished.output_dir / "base_model")
    found = {path.name: Image.open(path).tobytes() for path in (tmp_path / "out").iterdir()}
    assert found["0001_seed3.png"] == found[names[2]]  # alone as among others
    assert found["0002_seed4.png"] == found[names[3]]
    assert found["0003_seed3.png"] != found[names[0]]
    with pytest.raises(UserError, match="give --prompt"):
        predict.main(argv)


def test_drawing_refuses_what_the_model_has_not(finished, tmp_path) -> None:
    argv = ["--weights", str(finished.archive), "--prompt", "a", "--output_dir", str(tmp_path)]
    for more, told in ((["--class_label", "4"], "give 0 to 3"), (["--scheduler", "ddim"], "no steps in time")):
        with pytest.raises(UserError, match=told):
            predict.main([*argv, *more])


def test_config_runs_the_job_again(finished, tmp_path) -> None:
    with artifact.opened(finished.archive) as folder:
        stored = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        weights = artifact.load_tensors(folder / artifact.ADAPTER)[0]
    assert stored["base_model"] == "pixel_ar"
    again = job.train(JobSettings(**(stored | {"output_dir": tmp_path})))
    with artifact.opened(again.archive) as folder:
        repeated = artifact.load_tensors(folder / artifact.ADAPTER)[0]
    assert all(torch.equal(value, repeated[name]) for name, value in weights.items())


def test_a_stopped_run_goes_on_as_if_it_had_not(folders, tmp_path, finished) -> None:
    whole = settings(folders, tmp_path / "x", use_class_labels=True, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        job.train(whole, on_step=lambda row, _: (_ for _ in ()).throw(KeyboardInterrupt) if row["step"] == 3 else None)
    resumed = job.train(whole.model_copy(update={"resume": True}))
    states = []
    for result in (finished, resumed):
        with artifact.opened(result.archive) as folder:
            states.append(artifact.load_tensors(folder / artifact.ADAPTER)[0])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def load(source: str) -> Family:
    return families.load(source, frozenset({DENOISER}), torch.float32)


def batch_of(family: Family, dataset: PreparedDataset) -> Batch:
    samples = encode_dataset(family, dataset, False, lambda *_: None)
    return Batch(
        data=torch.stack([one.mean for one in samples]),
        noise=torch.zeros(()),
        uniform=torch.zeros(len(samples)),
        captions=[one.caption for one in samples],
        mask=None,
        conditioning={
            name: torch.stack([one.conditioning[name] for one in samples]) for name in samples[0].conditioning
        },
        preserved=[],
    )


@pytest.mark.parametrize("classes", [False, True], ids=["plain base", "base with classes"])
def test_a_text_model_begins_as_the_base_model_it_is_made_of(folders, tmp_path, classes) -> None:
    given, dataset = dataset_of(folders, tmp_path / "base", use_text=False, use_class_labels=classes)
    source, job_base = load(begin(given, dataset, tmp_path / "plain").base_model), tmp_path / "whole"
    assert source.encode_text(["a"])["ids"].shape == (1, 0)
    with torch.no_grad():
        for parameter in source.module("model").parameters():  # as after training
            parameter.add_(0.1 * torch.randn_like(parameter))
    source.save_pipeline(job_base)

    wanted, dataset = dataset_of(folders, tmp_path / "text", base_model=str(job_base), hidden_dim=None, num_layers=None)
    same = begin(wanted, dataset, tmp_path / "same")
    assert same.base_model == str(job_base)  # nothing was asked for
    assert families.asked_for(str(job_base)) == str(job_base)
    text = load(begin(wanted.model_copy(update={"use_text": True}), dataset, tmp_path / "new").base_model)
    batch = batch_of(source, dataset)
    with torch.no_grad():
        before = source.sample_losses(batch, batch.conditioning | source.encode_text(batch.captions), None)
        after = text.sample_losses(batch, batch.conditioning | text.encode_text(batch.captions), None)
    torch.testing.assert_close(after, before)
    assert text.encode_text(["a"])["ids"].shape == (1, 12)
    with pytest.raises(UserError, match="hidden_dim 64"):
        begin(wanted.model_copy(update={"hidden_dim": 64}), dataset, tmp_path / "never")


def test_the_vocabulary_is_the_tokenizers(folders, tmp_path) -> None:
    from tests.trainer.conftest import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    given, dataset = dataset_of(folders, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))
    made = load(begin(given, dataset, tmp_path / "theirs").base_model)
    assert made.module("model").config.vocab_size == len(tiny_tokenizer())
    own = load(begin(given.model_copy(update={"tokenizer": None}), dataset, tmp_path / "own").base_model)
    words = own._pipe.tokenizer.get_vocab()
    assert {"a", "picture", *NAMES} < words.keys() and own.module("model").config.vocab_size == len(words)


def test_losses_are_nats_of_the_values_and_masks_count(folders, tmp_path) -> None:
    given, dataset = dataset_of(folders, tmp_path / "out", use_class_labels=True)
    family = load(begin(given, dataset, tmp_path / "base").base_model)
    batch = batch_of(family, dataset)
    assert batch.data.dtype == torch.uint8 and batch.conditioning["class_label"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    with Image.open(dataset.folder / dataset.items[0].image) as picture:
        assert batch.data[0].permute(1, 2, 0).numpy().tobytes() == picture.tobytes()
    text = {caption: family.encode_text([caption]) for caption in batch.captions}
    conditioning = batch.conditioning | lookup(text, batch.captions)
    with torch.no_grad():
        losses = family.sample_losses(batch, conditioning, None)
        logits = family.module("model")(batch.data, conditioning["ids"], conditioning["class_label"])
        chosen = logits.log_softmax(-1).gather(-1, batch.data.long()[..., None]).squeeze(-1)
        torch.testing.assert_close(losses, -chosen.flatten(1).mean(dim=1))
        assert family.training_loss(batch, conditioning, None).item() == pytest.approx(losses.mean().item())
        mask = torch.zeros(8, 1, 16, 16)
        mask[:, :, :4] = 1
        part = family.sample_losses(replace(batch, mask=mask), conditioning, None)
        torch.testing.assert_close(part, -chosen[:, :, :4].flatten(1).mean(dim=1))
    assert family.null_picture()["class_label"].item() == 4


def test_settings_of_one_family_are_refused_by_another(folders, tmp_path) -> None:
    common = {"input_images": folders, "output_dir": tmp_path, "base_model": "toybox"}
    with pytest.raises(UserError, match="hidden_dim is nothing that toybox has"):
        job.fill(JobSettings(**common, hidden_dim=64))
    for changes, told in (({"method": "lora"}, "method full"), ({"noise_offset": 0.1}, "noise_offset")):
        with pytest.raises(UserError, match=told):
            job.fill(settings(folders, tmp_path, **changes))
    with pytest.raises(UserError, match="text_nhead 3"):
        begin(*dataset_of(folders, tmp_path / "out", text_nhead=3), tmp_path / "x")


@pytest.mark.slow
@pytest.mark.parametrize("text", [False, True])
def test_two_processes_are_one(folders, tmp_path, train_on, read_job, text) -> None:
    """The text encoder's dropout falls otherwise on two; all else is the same."""
    changes = {"use_text": text, "max_train_steps": 3, "ema_decay": None, "caption_dropout": 0.0}
    given, dataset = dataset_of(folders, tmp_path / "data", **changes)
    train_on_two(given.model_copy(update={"output_dir": tmp_path / "two"}), dataset, tmp_path)
    (tmp_path / "one").mkdir()
    one = train_on(given.model_copy(update={"output_dir": tmp_path / "one", "train_batch_size": 4}), dataset)
    two = read_job(tmp_path / "two")
    assert two.losses == pytest.approx(one.losses, rel=1e-2 if text else 1e-5)


def test_gradient_checkpointing_changes_no_gradient(folders, tmp_path) -> None:
    given, dataset = dataset_of(folders, tmp_path / "out")
    gradients = []
    for checkpointed in (False, True):
        family = load(begin(given, dataset, tmp_path / "base").base_model)
        family.module("model").requires_grad_(True)
        if checkpointed:
            family.enable_gradient_checkpointing()
        batch = batch_of(family, dataset)
        family.training_loss(batch, batch.conditioning | family.encode_text(batch.captions), None).backward()
        gradients.append({name: p.grad for name, p in family.module("model").named_parameters()})
    for name, value in gradients[0].items():
        assert value is not None, name  # every parameter takes part
        torch.testing.assert_close(gradients[1][name], value, msg=name)
