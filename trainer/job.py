"""The whole job: prepare, load, cache, fit, save, preview, report. Everything lands in `output_dir`:

prepared/            the PreparedDataset            metrics.jsonl   a row per step
checkpoints/         what a stopped run goes on from samples/*.png   drawn from the saved archive
trained_model.tar    the archive of weights         report.html     the job in one page
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from preprocessing.errors import UserError
from preprocessing.findings import Findings, examine
from preprocessing.preflight import write_preflight
from preprocessing.prepare import merge, prepare
from preprocessing.prepared import PreparedDataset
from preprocessing.sources import is_dataset
from preprocessing.trigger import trigger_pattern
from trainer import artifact, cache, delivery, families, methods, preflight
from trainer.checkpoint import Checkpoints, fingerprint
from trainer.config import JobSettings
from trainer.devices import DTYPES, pick_device, training_attention, training_precision
from trainer.families.base import DENOISER, TEXT, VAE, Family
from trainer.loop import Loop, Plan
from trainer.methods.base import Method
from trainer.preview import draw_previews
from trainer.step import BatchMaker, TrainStep

ARCHIVE = "trained_model.tar"
Progress = Callable[[str, int, int], None]
OnStep = Callable[[dict[str, float], int], None]


@dataclass(frozen=True)
class JobResult:
    """Where a finished job's files are, and the seconds that each stage took."""

    archive: Path
    report: Path
    output_dir: Path
    samples: tuple[Path, ...]
    stage_seconds: dict[str, float]


@dataclass(frozen=True)
class DryRun:
    """Where the pre-flight report lies, and what is in it."""

    report: Path
    findings: Findings


@dataclass
class Stages:
    """Times the stages of a job."""

    progress: Progress
    on_step: OnStep
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.progress(name, 0, 1)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 3)

    def on_step_of(self, steps: int) -> Callable[[dict[str, float]], None]:
        """What the loop calls with each row of a run of `steps` steps."""

        def told(row: dict[str, float]) -> None:
            self.progress("train", row["step"], steps)
            self.on_step(row, steps)

        return told


@dataclass(frozen=True)
class Loaded:
    """What training needs: the data set, the family and method, neither attached to the other yet, and the settings
    with every open choice made.
    """

    accelerator: Accelerator
    dataset: PreparedDataset
    family: Family
    method: Method
    stages: Stages
    settings: JobSettings


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
        weights = fit(parts, settings)
    del parts
    if weights is None:
        return None
    with weights:
        return finish(Path(weights.name), dataset, stages, settings)


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
            plan, findings = planned(replace(parts, dataset=largest), few, parts.dataset)
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
        settings = counted(settings, dataset, accelerator.num_processes)
        method = methods.create(settings)
        with stages.stage("load"):
            dtype = torch.float32 if method.trains_base_weights else DTYPES[accelerator.mixed_precision]
            parts = frozenset({DENOISER, TEXT, VAE})
            family = families.load(settings.base_model, parts, dtype, settings.companion_model)
            family.to(accelerator.device)
        try:
            yield Loaded(accelerator, dataset, family, method, stages, settings)
        finally:
            method.detach(family)
    finally:
        accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=False)  # the next job may choose another precision


def fill(settings: JobSettings) -> JobSettings:
    """Settings with every open choice made by what suits the base model and the method."""
    if not settings.input_images.exists() and not is_dataset(settings):
        raise UserError(f"input_images {settings.input_images} does not exist: give an archive or folder of pictures.")
    source = settings.base_model
    suits = families.recommended(source, settings.method)
    family = families.family_class(source)
    family.check(settings)
    suits = {
        "resolution": family.geometry(source).resolution,
        "companion_model": family.usual_companion(source),
    } | suits
    if settings.num_train_epochs is not None:
        suits.pop("max_train_steps", None)
    settings = settings.filled(suits)
    if settings.captioner == "auto":
        settings = settings.model_copy(update={"captioner": suits.get("captioner", "blip")})
    return settings


def counted(settings: JobSettings, dataset: PreparedDataset, processes: int) -> JobSettings:
    """Settings with the steps that num_train_epochs come to."""
    if settings.num_train_epochs is None:
        return settings
    pictures = settings.num_train_epochs * sum(item.repeats for item in dataset.items)
    step = settings.train_batch_size * settings.gradient_accumulation_steps * processes
    return settings.model_copy(update={"num_train_epochs": None, "max_train_steps": math.ceil(pictures / step)})


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


def preserved_prompts(settings: JobSettings, method: Method, dataset: PreparedDataset) -> tuple[str, ...]:
    """The prompts on which the base model's predictions are to be kept; none where the method cannot change them."""
    if not settings.preservation_weight or not method.changes_weights:
        return ()
    if settings.preservation_prompts:
        return settings.preservation_prompts
    pattern = trigger_pattern(settings.trigger_word)
    plain = (" ".join(pattern.sub(lambda _: settings.class_word, item.caption).split()) for item in dataset.items)
    return tuple(dict.fromkeys(caption for caption in plain if caption))


def planned(parts: Loaded, settings: JobSettings, whole: PreparedDataset) -> tuple[Plan, Findings]:
    """Encode the data set, attach the method, and say what the loop is to run, and what was found in the `whole` data
    set, of which the one to encode is a part. The pre-flight report is written beside it.
    """
    family, method, dataset, accelerator = parts.family, parts.method, parts.dataset, parts.accelerator
    preserved = preserved_prompts(settings, method, dataset)
    with parts.stages.stage("cache"):
        # before the method attaches: what is cached of the text is the base model's
        captions = () if method.needs_text_grad else [item.caption for item in dataset.items]
        cached = cache.build(family, dataset, [*captions, *preserved], parts.stages.progress)
        family.free(VAE)
        groups = method.attach(family)
    findings = examine(whole, preflight.reader_of(family, method, settings.trigger_word))
    findings = findings.model_copy(update={"warnings": (*findings.warnings, *family.notes)})
    if accelerator.is_main_process:
        write_preflight(whole, findings)
    if not method.needs_text_grad:
        family.free(TEXT)
    if settings.gradient_checkpointing:
        family.enable_gradient_checkpointing()
    if settings.enable_xformers:
        family.enable_xformers()
    identity = fingerprint(settings, dataset.dataset_hash) | {
        "base_hash": families.fingerprint(settings.base_model),
        "processes": accelerator.num_processes,
    }
    plan = Plan(
        module=TrainStep(family, method, cached, settings),
        batches=BatchMaker(cached, settings, accelerator.device, preserved),
        groups=groups,
        method=method,
        settings=settings,
        checkpoints=Checkpoints(settings.output_dir / "checkpoints", identity, settings.checkpoints_total_limit),
        on_step=parts.stages.on_step_of(settings.max_train_steps),
        beside=_writer(parts, settings) if settings.save_diffusers else None,
    )
    return plan, findings


def _writer(parts: Loaded, settings: JobSettings) -> Callable[[Path], None]:
    """What puts the weights in diffusers' layout into each checkpoint, whose name tells the step."""

    def write(folder: Path) -> None:
        step = int(folder.name.rpartition("_")[2])
        manifest = delivery.manifest_of(parts.family, parts.method, parts.dataset, (settings, step))
        parts.method.save_diffusers(folder, manifest)

    return write


def fit(parts: Loaded, settings: JobSettings) -> tempfile.TemporaryDirectory | None:
    """Encode, train and save the weights into a temporary folder (first process only)."""
    accelerator, stages = parts.accelerator, parts.stages
    plan, _ = planned(parts, settings, parts.dataset)
    if accelerator.is_main_process and not settings.resume:
        # of an earlier job: never mixed with this one's
        shutil.rmtree(plan.checkpoints.folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    with stages.stage("train"), training_attention(accelerator.device):
        step = Loop(accelerator, plan).run(settings.output_dir)
    if not accelerator.is_main_process:
        return None
    with stages.stage("save"):
        weights = tempfile.TemporaryDirectory(prefix="weights-")
        delivery.save_weights(Path(weights.name), parts.family, parts.method, parts.dataset, (settings, step))
    return weights


def finish(folder: Path, dataset: PreparedDataset, stages: Stages, settings: JobSettings) -> JobResult:
    """Pack the weights, draw previews from the packed archive, write the report, and pack again with both."""
    archive = settings.output_dir / ARCHIVE
    artifact.write(folder, archive)
    if settings.save_diffusers and methods.METHODS[settings.method].trains_base_weights:
        with stages.stage("pipeline"):
            delivery.save_pipeline(folder, settings)
    previews, remarks = [], ()
    with stages.stage("preview"):
        try:
            previews = draw_previews(archive, settings, stages.progress)
        except families.NoCompanion as error:  # the weights are finished all the same
            remarks = (f"No pictures were drawn: {error}",)
            print(f"warning: {remarks[0]}", file=sys.stderr)
    report = delivery.add_report(folder, dataset, settings, (previews, remarks), stages.seconds)
    artifact.write(folder, archive)
    samples = tuple(preview.adapted for preview in previews)
    return JobResult(archive, report, settings.output_dir, samples, dict(stages.seconds))
