"""What a finished job delivers: the members of its archive of weights, and the report."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import torch
import yaml

from preprocessing.prepared import CAPTIONS, PreparedDataset
from trainer import artifact, families, methods
from trainer.artifact import Manifest
from trainer.config import JobSettings
from trainer.evaluation.summary import Summary
from trainer.families.base import DENOISER, TEXT, VAE, Family
from trainer.methods.base import Method
from trainer.metrics import METRICS_FILE, read_metrics
from trainer.preview import Gallery
from trainer.report import ReportData, Verdict, write_report

CARD = "README.md"


def manifest_of(family: Family, method: Method, dataset: PreparedDataset, run: tuple[JobSettings, int]) -> Manifest:
    """What the weights say of themselves; `run` is the settings and the step that they are from."""
    settings, step = run
    return Manifest(
        base_model=settings.base_model,
        base_hash=families.fingerprint(settings.base_model),
        family=family.name,
        method=settings.method,
        trigger_word=settings.trigger_word,
        tokens=method.tokens(),
        class_word=settings.class_word,
        settings=settings.model_dump(mode="json"),
        dataset_hash=dataset.dataset_hash,
        step=step,
        created=datetime.now(UTC),
        libraries=artifact.library_versions(),
        nets=method.nets(),
    )


def save_weights(
    folder: Path, family: Family, method: Method, dataset: PreparedDataset, run: tuple[JobSettings, int]
) -> None:
    """Write manifest, weights and exports: what `predict` needs. `run` is the settings and the step."""
    manifest = manifest_of(family, method, dataset, run)
    artifact.write_manifest(folder, manifest)
    method.save(folder, manifest)
    if manifest.nets:
        tensors, _ = artifact.load_tensors(folder / artifact.ADAPTER)
        (folder / "comfyui").mkdir()
        family.export_comfyui(folder / "comfyui" / "adapter.safetensors", tensors, manifest)


def add_papers(folder: Path, dataset: PreparedDataset, settings: JobSettings) -> None:
    """Put settings, captions and metrics beside the weights."""
    text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    dataset.write_captions(folder / CAPTIONS)
    shutil.copyfile(settings.output_dir / METRICS_FILE, folder / METRICS_FILE)


def save_diffusers(folder: Path, settings: JobSettings) -> None:
    """Put the weights of `folder` into output_dir as diffusers loads them: an adapter, or the whole stock pipeline with
    the trained nets, and the card in which diffusers reads where the other half of a model is.
    """
    if not methods.METHODS[settings.method].trains_base_weights:
        for file, name in ((artifact.ADAPTER, artifact.LORA_FILE), (artifact.EMBEDDINGS, artifact.EMBEDDINGS)):
            if (folder / file).is_file():
                shutil.copyfile(folder / file, settings.output_dir / name)
        return
    family = families.load(
        settings.base_model, frozenset({DENOISER, TEXT, VAE}), torch.float32, settings.companion_model
    )
    methods.create(settings).load(folder, family)
    family.save_pipeline(settings.output_dir)
    manifest = artifact.read_manifest(folder)
    header = family.card_header(manifest)
    if header:
        tags = {"base_model": manifest.base_model, "library_name": "diffusers", "tags": list(family.card_tags)}
        text = yaml.safe_dump(tags | header, sort_keys=False)
        (settings.output_dir / CARD).write_text(f"---\n{text}---\n", encoding="utf-8")


def add_report(
    folder: Path,
    dataset: PreparedDataset,
    settings: JobSettings,
    shown: tuple[Summary, Gallery],
    seconds: dict[str, float],
) -> Path:
    """Put scores, previews and the report beside the weights; the report also lands in output_dir. Returns its path."""
    summary, gallery = shown
    manifest = artifact.read_manifest(folder).model_copy(
        update={"scores": summary.scores(), "chosen": summary.sentences()[0]}
    )
    artifact.write_manifest(folder, manifest)
    (folder / artifact.EVALUATION).write_text(summary.model_dump_json(indent=2), encoding="utf-8")
    (folder / "samples").mkdir()
    for preview in gallery.previews:
        for path in (preview.base, preview.adapted):
            if path is not None:
                shutil.copyfile(path, folder / "samples" / path.name)
    report = settings.output_dir / "report.html"
    data = ReportData(
        manifest=manifest,
        dataset=dataset,
        metrics=read_metrics(folder / METRICS_FILE),
        previews=gallery.previews,
        stage_seconds=seconds,
        remarks=gallery.remarks,
        verdict=Verdict(summary, gallery.strengths, gallery.grid, gallery.nearest),
    )
    write_report(report, data)
    shutil.copyfile(report, folder / report.name)
    return report
