"""The dry run: what would be trained on and what it would cost, and nothing trained or left behind."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train as door
from preprocessing.errors import UserError
from trainer import job, preflight
from trainer.methods.pivotal import Pivotal
from trainer.preview import prompts_of


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A zip of five pictures of two sizes; one caption is longer than any text encoder reads."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, size in enumerate(((40, 40), (48, 44), (90, 40), (64, 64), (44, 44))):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "0.txt").write_text("dog " * 200 + "TOK at the end", encoding="utf-8")
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return path


def test_it_measures_real_steps_and_trains_nothing(settings, pictures, tmp_path):
    chosen = settings(input_images=pictures, max_train_steps=200, train_batch_size=2, dry_run=True)
    found = job.dry_run(chosen)
    estimate = found.findings.estimate
    assert estimate.steps == 200 and estimate.measured_steps == preflight.STEPS - preflight.WARM_UP
    assert estimate.bucket == max(
        (bucket.size for bucket in found.findings.buckets), key=lambda size: size[0] * size[1]
    )
    assert 0 < estimate.seconds_per_step < 60 and estimate.memory_of == "process"
    assert estimate.seconds_total > 200 * estimate.seconds_per_step
    assert 50 < estimate.peak_memory_mib < 64_000
    assert sorted(path.name for path in chosen.output_dir.iterdir()) == ["prepared"]
    stored = json.loads((chosen.output_dir / "prepared/dataset.json").read_text(encoding="utf-8"))
    assert stored == found.findings.model_dump(mode="json")
    assert "about" in found.report.read_text(encoding="utf-8")


def test_a_long_caption_loses_its_end_and_there_the_trigger(settings, pictures):
    findings = job.dry_run(settings(input_images=pictures, dry_run=True)).findings
    warnings = {file.source: file.warnings for file in findings.files}
    assert "are read; cut off" in warnings["0.png"][0]
    assert "lies in the part of the caption that is cut off" in warnings["0.png"][1]
    assert warnings["1.png"] == ()


def test_captions_are_counted_as_the_method_lets_them_be_read(settings, load_family, tiny_model):
    family = load_family(tiny_model)
    method = Pivotal(settings(method="pivotal", n_tokens=5, class_word="dog"))
    before = len(family.text[0].tokenizer("a TOK").input_ids)
    method.attach(family)
    read = preflight.reader_of(family, method, ["TOK"])("a TOK")
    assert read.tokens == len(family.text[0].tokenizer("a").input_ids) + 5 != before
    assert read.trigger_kept and read.cut == ""
    limit = family.text[0].tokenizer.model_max_length
    long = preflight.reader_of(family, method, ["TOK"])("a " * (limit - 2) + "dog Dog")
    assert long.cut == "dog Dog"
    long = preflight.reader_of(family, method, ["TOK"])("dog " * (limit + 5))
    assert not long.trigger_kept


def test_the_real_job_reports_too_before_its_first_step(settings, pictures, monkeypatch):
    chosen = settings(input_images=pictures, max_train_steps=1, preview_prompts=("TOK",), preview_seeds=(0,))

    def stop(self, folder):
        assert (chosen.output_dir / "prepared/report.html").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(job.Loop, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        job.train(chosen)


def test_a_dry_run_is_no_training(settings, pictures, capsys, monkeypatch):
    with pytest.raises(UserError, match="dry_run trains nothing"):
        job.train(settings(input_images=pictures, dry_run=True))
    seen = []

    def dry_run(chosen):
        seen.append(chosen)

    monkeypatch.setattr(job, "dry_run", dry_run)
    door.main(["--input_images", str(pictures), "--dry_run", "--base_model", "toybox"])
    assert seen[0].dry_run and capsys.readouterr().out == ""


def test_parts_of_the_largest_size(settings, dataset):
    part = preflight.of_largest_size(dataset, settings(train_batch_size=1))
    assert len(part.items) == 1
    areas = [item.size[0] * item.size[1] for item in dataset.items]
    assert part.items[0].size[0] * part.items[0].size[1] == max(areas)
    assert torch.is_grad_enabled()


def test_preview_prompts_follow_the_mode(settings):
    for mode, words in {"style": "in the style of TOK", "face": "a photo of TOK", "subject": "a photo of TOK"}.items():
        prompts = prompts_of(settings(mode=mode, preview_prompts=None))
        assert sum(words in prompt for prompt in prompts) >= 1
        assert "TOK" not in prompts[-1] and not any("{" in prompt for prompt in prompts)
    own = prompts_of(settings(base_model="toybox", preview_prompts=None))
    assert own != prompts_of(settings(base_model="toybox", preview_prompts=None, mode="style"))
    assert prompts_of(settings(mode="style", preview_prompts=("{trigger} alone",))) == ["TOK alone"]


def test_each_process_prepares_its_share_of_a_streamed_data_set_and_all_read_the_whole(settings, tmp_path):
    import datasets

    rows = []
    for value in range(5):
        packed = io.BytesIO()
        Image.new("RGB", (40, 40), (value * 10, 0, 0)).save(packed, "PNG")
        rows.append({"bytes": packed.getvalue(), "path": f"{value}.png"})
    (tmp_path / "set").mkdir()
    images = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
    images.to_parquet(tmp_path / "set/a.parquet")
    chosen = job.fill(settings(input_images=tmp_path / "set", captioner="none"))
    waits = []
    for rank in (1, 0):  # the first process last, as if it had waited for the other
        process = SimpleNamespace(num_processes=2, process_index=rank, is_main_process=rank == 0)
        process.wait_for_everyone = lambda: waits.append(1)
        if rank == 1:
            with pytest.raises(FileNotFoundError):  # nobody has merged yet
                job.prepared(chosen, process, lambda *report: None)
        else:
            whole = job.prepared(chosen, process, lambda *report: None)
    assert len(waits) == 4
    assert sorted(item.source for item in whole.items) == [
        "part_000/00000000-0.png",
        "part_000/00000001-2.png",
        "part_000/00000002-4.png",
        "part_001/00000000-1.png",
        "part_001/00000001-3.png",
    ]
    assert all((whole.folder / item.image).is_file() for item in whole.items)
