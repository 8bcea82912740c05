"""OmniGen2 is trained by each of its methods, with and without input images, and drawn from what is saved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.pictures import drawn, pixels
from trainer import artifact, job
from trainer.config import JobSettings
from trainer.drawing import DrawSettings
from trainer.evaluation.summary import Summary
from trainer.generate import Generator
from trainer.metrics import METRICS_FILE, read_metrics

CHANGES = {
    "lora": {"method": "lora", "lora_rank": 2, "learning_rate": 1e-2},
    "full": {"method": "full", "learning_rate": 1e-3},
    "prefix": {"method": "prefix", "num_prefix_tokens": 3, "learning_rate": 1e-1, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with instructions: two pictures by words alone, one from one picture, one from two."""
    folder = tmp_path_factory.mktemp("data")
    for name, size, colour in (
        *((f"out{i}", (32, 32), (200, 60 * i, 20)) for i in range(4)),
        ("one", (32, 32), (10, 10, 200)),
        ("two", (60, 20), (90, 200, 10)),
    ):
        Image.new("RGB", size, colour).save(folder / f"{name}.png")
    inputs = [None, None, ["one.png"], ["one.png", "two.png"]]
    rows = [
        {"task_type": "edit", "instruction": f"TOK number {i}" * (i + 1), "output_image": f"out{i}.png"}
        | ({"input_images": names} if names else {})
        for i, names in enumerate(inputs)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def trained(instructions, tiny_omnigen2, settings, tmp_path):
    """Runs a whole job; gives its output_dir."""

    def run(method: str, **changes: object) -> Path:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        fixed = {"input_images": instructions, "base_model": str(tiny_omnigen2), "output_dir": out, "workers": 0}
        fixed |= {"caption_dropout": 0.3, "snr_gamma": None, "preview_prompts": ("TOK",), "preview_seeds": (0,)}
        job.train(JobSettings.model_validate(settings().model_dump() | fixed | CHANGES[method] | changes))
        return out

    return run


@pytest.mark.parametrize("method", ["lora", "prefix", pytest.param("full", marks=pytest.mark.slow)])
def test_a_job_ends_in_weights_that_draw_otherwise_and_leave_nothing_behind(method, trained, tiny_omnigen2, tmp_path):
    out = trained(method)
    rows = read_metrics(out / METRICS_FILE)
    assert len(rows) == 4 and all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert (out / "report.html").is_file()
    judged = json.loads((out / "weights" / "last" / "manifest.json").read_text(encoding="utf-8"))
    assert judged["family"] == "omnigen2" and judged["method"] == method
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "## In Python, with Atelier" in card and "DiffusionPipeline" not in card and "library_name" not in card
    generator = Generator(str(tiny_omnigen2), "cpu")
    base = drawn(generator)
    generator.use(out / "trained_model.tar")
    adapted = drawn(generator)
    assert (adapted != base).any()
    Image.new("RGB", (32, 32), (10, 10, 200)).save(tmp_path / "shown.png")
    shown = {"references": (tmp_path / "shown.png",), "num_inference_steps": 2}
    edited = generator.draw(DrawSettings(prompt="TOK number 2", seed=1, **shown))[0]
    assert (pixels(edited) != drawn(generator, "TOK number 2", seed=1)).any()
    again = Generator(str(tiny_omnigen2), "cpu")
    again.use(out / "trained_model.tar")
    assert (drawn(again) == adapted).all()
    generator.release()
    assert (drawn(generator) == base).all()


def test_the_same_seed_gives_the_same_prefix_which_predicts_better_than_none(trained, capsys):
    first, second = (trained("prefix", max_train_steps=8, caption_dropout=0.0) for _ in range(2))
    tensors = [artifact.load_tensors(out / "weights" / "last" / artifact.PREFIX)[0] for out in (first, second)]
    assert tensors[0].keys() == {"mllm.prompt_embeddings"}
    assert torch.equal(tensors[0]["mllm.prompt_embeddings"], tensors[1]["mllm.prompt_embeddings"])
    with artifact.opened(first / "trained_model.tar") as folder:
        summary = Summary.model_validate_json((folder / artifact.EVALUATION).read_text(encoding="utf-8"))
    assert summary.curve[-1].gain.mean > summary.curve[0].gain.mean
    moved = [row["prefix/moved"] for row in read_metrics(first / METRICS_FILE)]
    assert 0 < moved[0] < moved[-1] and "trained parameters: 96 (prefix 96)" in capsys.readouterr().err


def test_a_full_fine_tune_is_left_in_the_published_layout(trained, tiny_omnigen2):
    out = trained("full", save_diffusers=True)
    names = {path.name for path in out.iterdir()}
    assert {"model_index.json", "transformer", "vae", "mllm", "processor"} <= names
    generator, tuned = Generator(str(tiny_omnigen2), "cpu"), Generator(str(out), "cpu")
    generator.use(out / "trained_model.tar")
    settings = DrawSettings(prompt="TOK", seed=3, num_inference_steps=2, image_guidance_scale=1.0, guidance_scale=2.0)
    assert (pixels(tuned.draw(settings)[0]) == pixels(generator.draw(settings)[0])).all()
