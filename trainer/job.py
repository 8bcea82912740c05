"""The whole job: prepare, load, cache, fit, save, preview, report. Everything lands in `output_dir`:

prepared/            the PreparedDataset            metrics.jsonl   a row per step
checkpoints/         what a stopped run goes on from samples/*.png   drawn from the saved archive
trained_model.tar    the archive of weights         report.html     the job in one page
README.md            the model card
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, set_seed

from preprocessing.errors import UserError
from preprocessing.findings import Findings
from preprocessing.preflight import write_preflight
from preprocessing.prepare import merge, prepare
from preprocessing.prepared import PreparedDataset
from preprocessing.sources import is_dataset
from trainer import artifact, delivery, families, methods, preflight, publish, start
from trainer.config import JobSettings
from trainer.devices import DTYPES, pick_device, training_attention, training_precision
from trainer.evaluation.summary import Summary
from trainer.families import quantised
from trainer.families.base import DENOISER, TEXT, VAE
from trainer.fitting import Fitted, Loaded, fit, planned, summarised
from trainer.loop import Loop
from trainer.preview import draw_gallery
from trainer.stages import OnStep, Progress, Stages

ARCHIVE = "trained_model.tar"
BASE = "base_model"  # in output_dir: what a family built for the job


@dataclass(frozen=True)
class JobResult:
    """Where a finished job's files are, and the seconds that each stage took."""

    archive: Path
    report: Path
    output_dir: Path
    samples: tuple[Path, ...]
    stage_seconds: dict[str, float]
    summary: Summary
    pushed: publish.Pushed | None = None  # how a push to the Hub ended; the archive is whole either way


@dataclass(frozen=True)
class DryRun:
    """Where the pre-flight report lies, and what is in it."""

    report: Path
    findings: Findings


def train(settings: JobSettings, progress: Progress | None = None, on_step: OnStep | None = None) -> JobResult | None:
    """Run a job; on all processes but the first the result is None.

    `progress` is called with (stage, done, total), `on_step` with each step's row of metrics.jsonl and the number of
    steps that there will be. Raises UserError for what the user can mend; what was finished
    before stays in `output_dir`.
    """
    if settings.dry_run:
        raise UserError("dry_run trains nothing and has no weights to give: it is for `python train.py`.")
    settings = fill(settings)
    stages = Stages(progress or (lambda stage, done, total: None), on_step or (lambda row, total: None))
    with loaded(settings, stages) as parts:
        settings, dataset = parts.settings, parts.dataset
        fitted = fit(parts, settings)
    del parts  # the model leaves memory before it is loaded anew to draw
    return None if fitted is None else finish(fitted, dataset, stages, settings)


def dry_run(settings: JobSettings) -> DryRun | None:
    """Stop before the training: prepare, measure a few steps at the largest size, and report what was found.

    On all processes but the first the result is None. Raises UserError as `train` does.
    """
    settings = fill(settings)
    stages = Stages(lambda stage, done, total: None, lambda row, total: None)
    with loaded(settings.model_copy(update={"report_to": "none"}), stages) as parts:
        settings = parts.settings
        largest = preflight.of_largest_size(parts.dataset, settings)
        with tempfile.TemporaryDirectory(prefix="dry-run-") as scratch:
            few = preflight.few_steps(settings, Path(scratch))
            watch = preflight.Watch(parts.accelerator.device)
            stages.on_step = watch.on_step
            plan, _, findings = planned(replace(parts, dataset=largest), few, parts.dataset)
            with training_attention(parts.accelerator.device):
                Loop(parts.accelerator, plan).run(few.output_dir)
        if not parts.accelerator.is_main_process:
            return None
        estimate = watch.estimate((parts.dataset, largest), stages.seconds, settings)
        findings = findings.model_copy(update={"estimate": estimate})
        return DryRun(write_preflight(parts.dataset, findings), findings)


@contextmanager
def loaded(settings: JobSettings, stages: Stages) -> Iterator[Loaded]:
    """The data set prepared and the base model loaded; at the end the model is as it was."""
    accelerator = make_accelerator(settings)
    set_seed(settings.seed % 2**32)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        with stages.stage("prepare"):
            dataset = prepared(settings, accelerator, stages.progress)
        settings = counted(_settled(settings, dataset), dataset, accelerator.num_processes)
        with stages.stage("load"):
            settings = begun_with(settings, dataset, accelerator)
            whole = methods.METHODS[settings.method].trains_base_weights
            dtype = torch.float32 if whole else DTYPES[accelerator.mixed_precision]
            parts = frozenset({DENOISER, TEXT, VAE})
            family = families.load(settings.base_model, parts, dtype, settings.companion_model)
            if settings.base_precision in quantised.MARKS:
                family.quantise(settings.base_precision)
            family.to(accelerator.device)
        with start.opened(settings, family) as begun:
            settings = settings if begun is None else start.agreed(settings, begun, family)
            method = methods.create(settings)
            if begun is not None:
                method.begin_from(begun.folder)
            try:
                yield Loaded(accelerator, dataset, family, method, stages, settings, begun.told if begun else {})
            finally:
                method.detach(family)
    finally:
        accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=False)  # the next job may choose another precision


def fill(settings: JobSettings) -> JobSettings:
    """Settings with every open choice made by what suits the base model and the method."""
    if not settings.input_images.exists() and not is_dataset(settings):
        raise UserError(f"input_images {settings.input_images} does not exist: give an archive or folder of pictures.")
    publish.check(settings)
    quantised.check_installed(settings.base_precision)
    source = settings.base_model
    if settings.init_adapter is not None:
        start.check(settings.init_adapter)
    family = families.family_class(source)
    family.check_own(settings)
    family.check(settings)
    suits = families.suiting(source, settings.method)
    if settings.init_adapter is not None:
        suits = {name: value for name, value in suits.items() if name not in start.TAKEN}
    if settings.num_train_epochs is not None:
        suits.pop("max_train_steps", None)
    settings = settings.filled(suits)
    if settings.captioner == "auto":
        settings = settings.model_copy(update={"captioner": suits.get("captioner", "blip")})
    return settings


def begun_with(settings: JobSettings, dataset: PreparedDataset, accelerator: Accelerator) -> JobSettings:
    """Settings with the base model that training begins with, which some families build for the data set."""
    found = [settings.base_model]
    if accelerator.is_main_process:
        family = families.family_class(settings.base_model)
        found = [family.begin(settings, dataset, settings.output_dir / BASE).base_model]
    return settings.model_copy(update={"base_model": broadcast_object_list(found)[0]})


def counted(settings: JobSettings, dataset: PreparedDataset, processes: int) -> JobSettings:
    """Settings with the steps that num_train_epochs come to."""
    if settings.num_train_epochs is None:
        return settings
    pictures = settings.num_train_epochs * sum(item.repeats for item in dataset.items)
    step = settings.train_batch_size * settings.gradient_accumulation_steps * processes
    return settings.model_copy(update={"num_train_epochs": None, "max_train_steps": math.ceil(pictures / step)})


def _settled(settings: JobSettings, dataset: PreparedDataset) -> JobSettings:
    """Settings with the concepts by name, of which the upload's folders may have decided."""
    return settings.model_copy(update={"concepts": dataset.concepts}) if dataset.concepts else settings


def make_accelerator(settings: JobSettings) -> Accelerator:
    """accelerate's view of devices and processes, with the tracker asked for."""
    device = pick_device()
    tracker = None if settings.report_to == "none" else settings.report_to
    try:
        accelerator = Accelerator(
            mixed_precision=training_precision(settings.mixed_precision, device),
            cpu=device.type == "cpu",
            log_with=tracker,
            project_dir=settings.output_dir,
            kwargs_handlers=[_unused_parameters_happen()],
        )
    except (ImportError, ValueError) as error:
        raise UserError(f"report_to {tracker} cannot be used here ({error}): install it or choose none.") from error
    if tracker:
        if not accelerator.log_with:  # accelerate only warns
            raise UserError(f"report_to {tracker} is not installed here: pip install {tracker}, or choose none.")
        accelerator.init_trackers("logs")
    return accelerator


def _unused_parameters_happen() -> Any:
    """A batch whose captions are all dropped reads no new token."""
    from accelerate import DistributedDataParallelKwargs

    return DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)


def prepared(settings: JobSettings, accelerator: Accelerator, progress: Progress) -> PreparedDataset:
    """The data set, read by all processes: made by the first one, or, where it is streamed, by each its share."""
    folder = settings.output_dir / "prepared"
    stride = families.family_class(settings.base_model).geometry(settings.base_model).stride
    count = accelerator.num_processes
    parts = [folder / f"part_{rank:03d}" for rank in range(count)]
    if count > 1 and is_dataset(settings):
        rank = accelerator.process_index
        prepare(settings, stride, parts[rank], progress, (rank, count))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            merge([PreparedDataset.load(part) for part in parts], folder)
    elif accelerator.is_main_process:
        prepare(settings, stride, folder, progress)
    accelerator.wait_for_everyone()
    return PreparedDataset.load(folder)


def finish(fitted: Fitted, dataset: PreparedDataset, stages: Stages, settings: JobSettings) -> JobResult:
    """Pack the chosen weights, draw from the packed archive, judge and report, and pack again with all of it."""
    archive = settings.output_dir / ARCHIVE
    with tempfile.TemporaryDirectory(prefix="weights-") as scratch:
        folder = Path(scratch) / "archive"
        shutil.copytree(fitted.weights, folder)
        delivery.add_papers(folder, dataset, settings)
        artifact.write(folder, archive)
        if settings.save_diffusers:
            with stages.stage("diffusers"):
                delivery.save_diffusers(folder, settings.output_dir)
        with stages.stage("preview"):
            gallery = draw_gallery(archive, dataset, settings, stages.progress)
        summary = summarised(fitted, dataset, gallery, stages.seconds)
        report = delivery.add_report(folder, dataset, settings, (summary, gallery), stages.seconds)
        delivery.add_card(folder, settings, gallery.previews)
        artifact.write(folder, archive)
        pushed = None
        if settings.push_to_hub is not None:
            with stages.stage("push"):
                pushed = publish.push(folder, archive, gallery.previews, settings)
    samples = tuple(preview.adapted for preview in gallery.previews)
    return JobResult(archive, report, settings.output_dir, samples, dict(stages.seconds), summary, pushed)
