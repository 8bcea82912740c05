"""What a finished job delivers: the members of its archive of weights, and the report."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from preprocessing.prepared import CAPTIONS, PreparedDataset
from trainer import artifact, families, foreign, hub, methods, model_card, ui_files
from trainer.artifact import Manifest
from trainer.config import JobSettings
from trainer.evaluation.summary import Summary
from trainer.families.base import DENOISER, TEXT, VAE, Family
from trainer.generate import settings_of
from trainer.methods.base import Method
from trainer.methods.tokens import words_of
from trainer.metrics import METRICS_FILE, read_metrics
from trainer.model_card import Place
from trainer.preview import Gallery
from trainer.report import Preview, ReportData, Verdict, write_report


@dataclass(frozen=True)
class Run:
    """A training at one of its steps: its settings, that step, and what it began with (see trainer.start)."""

    settings: JobSettings
    step: int
    started_from: dict[str, str] = field(default_factory=dict)


def manifest_of(family: Family, method: Method, dataset: PreparedDataset, run: Run) -> Manifest:
    """What the weights say of themselves."""
    settings = run.settings
    return Manifest(
        base_model=families.asked_for(settings.base_model),
        base_hash=families.fingerprint(settings.base_model),
        base_license=hub.license_of(families.resolve(settings.base_model)),
        family=family.name,
        method=settings.method,
        **words_of(settings, method.tokens()),
        settings=_as_asked(settings),
        dataset_hash=dataset.dataset_hash,
        step=run.step,
        created=datetime.now(UTC),
        libraries=artifact.library_versions(),
        nets=method.nets(),
        started_from=run.started_from,
    )


def _as_asked(settings: JobSettings) -> dict[str, Any]:
    """The settings that run the job again: with the base model that was named, not the one built for the job."""
    asked = settings.model_copy(update={"base_model": families.asked_for(settings.base_model)})
    return asked.model_dump(mode="json")


def save_weights(folder: Path, family: Family, method: Method, dataset: PreparedDataset, run: Run) -> None:
    """Write manifest and weights: what `predict` needs."""
    manifest = manifest_of(family, method, dataset, run)
    artifact.write_manifest(folder, manifest)
    method.save(folder, manifest)
    family.save_base(folder / artifact.BASE)


def add_exports(folder: Path, family: Family) -> None:
    """Put the weights beside themselves in the formats of other programs."""
    manifest = artifact.read_manifest(folder)
    tensors = artifact.load_tensors(folder / artifact.ADAPTER)[0] if manifest.nets else {}
    rows = artifact.load_tensors(folder / artifact.EMBEDDINGS)[0] if manifest.tokens else {}
    if tensors or rows:
        ui_files.write(folder / ui_files.FOLDER, family, manifest, tensors, rows)


def add_papers(folder: Path, dataset: PreparedDataset, settings: JobSettings) -> None:
    """Put settings, captions and metrics beside the weights."""
    text = yaml.safe_dump(_as_asked(settings), sort_keys=False, allow_unicode=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    dataset.write_captions(folder / CAPTIONS)
    shutil.copyfile(settings.output_dir / METRICS_FILE, folder / METRICS_FILE)


def save_diffusers(folder: Path, target: Path) -> None:
    """Put the weights of `folder` into `target` as diffusers loads them: an adapter and its token embeddings, or the
    whole stock pipeline with the trained nets.
    """
    settings = settings_of(artifact.read_manifest(folder))
    if not methods.METHODS[settings.method].trains_base_weights:
        for file, name in ((artifact.ADAPTER, artifact.LORA_FILE), (artifact.EMBEDDINGS, artifact.EMBEDDINGS)):
            if (folder / file).is_file():
                shutil.copyfile(folder / file, target / name)
        return
    family = families.load(
        foreign.base_of(folder), frozenset({DENOISER, TEXT, VAE}), torch.float32, settings.companion_model
    )
    methods.create(settings).load(folder, family)
    family.save_pipeline(target)


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


def add_card(folder: Path, settings: JobSettings, previews: list[Preview]) -> None:
    """Put the model card beside the weights, and into output_dir; before it the samples must lie there."""
    manifest, output = artifact.read_manifest(folder), settings.output_dir
    files = frozenset(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    model_card.write(folder / artifact.CARD, manifest, previews, Place(None, files))
    if settings.save_diffusers:  # what is loaded from output_dir itself
        files |= {path.name for path in output.iterdir() if path.is_file()}
        model_card.write(output / artifact.CARD, manifest, previews, Place(None, files, output))
    else:
        shutil.copyfile(folder / artifact.CARD, output / artifact.CARD)
