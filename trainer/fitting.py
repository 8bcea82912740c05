"""From a prepared data set to weights: encode, attach, cross-validate or hold out, train, choose the step."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from preprocessing.concepts import without_triggers
from preprocessing.errors import UserError
from preprocessing.findings import Findings, examine
from preprocessing.preflight import write_preflight
from preprocessing.prepared import PreparedDataset
from trainer import alignment, cache, delivery, families, preflight, text_warmup
from trainer.cache import Cache
from trainer.checkpoint import Checkpoints, fingerprint
from trainer.config import JobSettings
from trainer.devices import training_attention
from trainer.evaluation import history
from trainer.evaluation.history import History
from trainer.evaluation.judge import BEST, LAST, Judge, Kept, rule
from trainer.evaluation.points import UNRELATED, Points, affordable
from trainer.evaluation.split import Split, split
from trainer.evaluation.summary import FOLDS, HELD_OUT, SEEN, Measured, Summary, curve
from trainer.families.base import TEXT, VAE, Family
from trainer.loop import Loop, Plan
from trainer.methods.base import Method, ParameterGroup
from trainer.preview import Gallery
from trainer.stages import Stages
from trainer.step import BatchMaker, TrainStep

WEIGHTS, CHECKPOINTS, EVALUATION = "weights", "checkpoints", "evaluation"  # folders in output_dir
HISTORY = "history.jsonl"


@dataclass(frozen=True)
class Loaded:
    """What training needs: the data set, and the family and method, neither attached to the other yet."""

    accelerator: Accelerator
    dataset: PreparedDataset
    family: Family
    method: Method
    stages: Stages
    settings: JobSettings  # with every open choice made, also by what init_adapter decides
    started_from: dict[str, str]  # init_adapter and the hash of its weights, or nothing


@dataclass(frozen=True)
class Fitted:
    """A finished run: the folder of the weights that are best, their step, and why these."""

    weights: Path
    step: int
    last_step: int
    planned_steps: int
    parting: Split
    main: History  # of the run that made the weights
    judged: History  # what the step was chosen by: the same, or the folds' together
    figures: Callable[[float], dict[str, float]] = lambda loss: {}  # what else a loss is told as


def fit(parts: Loaded, settings: JobSettings) -> Fitted | None:
    """Encode, train, choose. None on all processes but the first. Raises UserError for an adapter without effect."""
    accelerator, dataset, output = parts.accelerator, parts.dataset, settings.output_dir
    parting = split(dataset, settings)
    plan, cached, _ = planned(parts, settings, dataset, parting.held_out)
    if accelerator.is_main_process and not settings.resume:
        for name in (CHECKPOINTS, EVALUATION, WEIGHTS):  # of an earlier job: never mixed with this one's
            shutil.rmtree(output / name, ignore_errors=True)
    accelerator.wait_for_everyone()
    pooled = cross_validated(parts, plan, cached, parting.folds)
    best_step = pooled.chosen_step() if pooled else None
    kept = Kept(
        output / WEIGHTS,
        lambda folder, step: delivery.save_weights(
            folder, parts.family, parts.method, dataset, delivery.Run(settings, step, parts.started_from)
        ),
    )
    judged_by = rule(settings, best_step, unseen=bool(parting.held_out))
    judge = Judge(
        questions(plan, cached, parting.asked(dataset)), judged_by, output / EVALUATION / HISTORY, kept, told(parts)
    )
    with parts.stages.stage("train"):
        step = run(parts, replace(plan, judge=judge), output)
    if not accelerator.is_main_process:
        return None
    with parts.stages.stage("save"):
        kept.save(LAST, step)
    judged = pooled or judge.history
    best = judged.chosen_step()
    if judge.history.is_dead(best) and not parts.started_from:
        raise UserError(
            f"The training had no measurable effect: after {best} steps every prediction is what it was before. Raise "
            f"learning_rate (it is {settings.learning_rate}) or max_train_steps; the weights are in {kept.folder}."
        )
    weights = kept.folder / (LAST if best == step else BEST)
    delivery.add_exports(weights, parts.family)
    return Fitted(
        weights, best, step, settings.max_train_steps, parting, judge.history, judged, type(parts.family).figures
    )


def run(parts: Loaded, plan: Plan, folder: Path) -> int:
    """One run of the loop; its last step."""
    set_seed(plan.settings.seed % 2**32)  # the same whatever ran before it
    with training_attention(parts.accelerator.device):
        return Loop(parts.accelerator, plan).run(folder)


def cross_validated(parts: Loaded, plan: Plan, cached: Cache, folds: Sequence[tuple[int, ...]]) -> History | None:
    """One run for each fold without its pictures, which are then asked about; all their answers as one history.

    The method is attached when it begins and when it ends, fresh. A fold that is finished is not run again on a resume.
    None where there are no folds, and on all processes but the first.
    """
    settings, method, family = plan.settings, parts.method, parts.family
    found: list[History | None] = []
    # beside weights that are stored in 8 bits peft rounds a fresh adapter to 8 bits, too: each run begins as the first
    rounds = settings.base_precision == "fp8"
    fresh = [p.detach().clone() for group in plan.groups for p in group.parameters] if rounds else []
    for number, fold in enumerate(folds, start=1):
        folder = settings.output_dir / EVALUATION / f"fold_{number}"
        finished = history.read(folder / HISTORY, settings.max_train_steps) if settings.resume else None
        if finished is None or finished.steps[-1] < settings.max_train_steps:
            judge = Judge(questions(plan, cached, fold), rule(settings, stop_early=False), folder / HISTORY)
            single = replace(
                plan,
                batches=plan.batches.without(fold),
                checkpoints=Checkpoints(folder / CHECKPOINTS, plan.checkpoints.identity, 1),
                judge=judge,
                beside=None,
                on_step=parts.stages.on_fold_of(settings.max_train_steps, (number, len(folds))),
                name=f"cross-validation {number} of {len(folds)}",
            )
            folder.mkdir(parents=True, exist_ok=True)
            with parts.stages.stage("cross-validate"):
                run(parts, single, folder)
            finished = judge.history if parts.accelerator.is_main_process else None
            method.detach(family)
            plan.groups[:] = attached(parts, cached)
            for parameter, value in zip((p for group in plan.groups for p in group.parameters), fresh, strict=False):
                parameter.data.copy_(value)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        found.append(finished)
    return history.merged(found) if found and parts.accelerator.is_main_process else None


def questions(plan: Plan, cached: Cache, pictures: Sequence[int]) -> tuple[TrainStep, Points]:
    """The points on these pictures, and the module that answers."""
    settings = plan.settings
    evaluations = len(rule(settings).steps) + 1
    count = affordable(settings, plan.checkpoints.identity["processes"], evaluations)
    points = Points.of(cached, settings, pictures, (count, unrelated_prompts(settings)))
    return plan.module, points.prepared(plan.module)


def told(parts: Loaded) -> Callable[[History], None]:
    """Says each evaluation in the terminal and to the trackers."""

    def tell(judged: History) -> None:
        step = judged.steps[-1]
        values = {"loss": judged.at(step).losses.mean(), "gain": judged.gain(step).mean}
        values |= {"trigger_contrast": judged.contrast(step).mean, "drift": judged.drift(step).mean}
        figures = parts.family.figures(float(values["loss"]))
        values |= figures
        more = "".join(f", {name} {value:.4f}" for name, value in figures.items())
        of = "held_out" if judged.unseen else "trained"
        parts.accelerator.log({f"{of}/{name}": float(value) for name, value in values.items()}, step=step)
        gain = judged.gain(step)
        tqdm.write(
            f"step {step}: {of.replace('_', '-')} pictures: loss {values['loss']:.4f}{more}, "
            f"{100 * gain.mean:.1f} % better than the base model ({100 * gain.low:.1f} to {100 * gain.high:.1f} %), "
            f"drift {values['drift']:.4f}",
            file=sys.stderr,
        )

    return tell


def unrelated_prompts(settings: JobSettings) -> tuple[str, ...]:
    """Prompts that have nothing to do with the subject: the user's, the base model's own, or any."""
    own = families.recommended(settings.base_model, "draw").get("unrelated_prompts", UNRELATED)
    return tuple(settings.unrelated_prompts or own)


def preserved_prompts(settings: JobSettings, method: Method, dataset: PreparedDataset) -> tuple[str, ...]:
    """The prompts on which the base model's predictions are to be kept; none where the method cannot change them."""
    if not settings.preservation_weight or not method.changes_weights:
        return ()
    if settings.preservation_prompts:
        return settings.preservation_prompts
    plain = (without_triggers(item.caption, settings.class_words) for item in dataset.items)
    return tuple(dict.fromkeys(caption for caption in plain if caption))


def texts(settings: JobSettings, method: Method, captions: Sequence[str]) -> list[str]:
    """What the base model's reading is wanted of: the captions, with the class words for the triggers too."""
    plain = [without_triggers(caption, settings.class_words) for caption in captions]
    return [*(() if method.needs_text_grad else captions), *plain, *alignment.prompts(settings)]


def planned(
    parts: Loaded, settings: JobSettings, whole: PreparedDataset, held_out: Sequence[int] = ()
) -> tuple[Plan, Cache, Findings]:
    """Encode the data set, attach the method, and say what the loop is to run, on all pictures but those held out, and
    what was found in the `whole` data set, of which the one to encode is a part. The pre-flight report is written
    beside it.
    """
    family, method, dataset, accelerator = parts.family, parts.method, parts.dataset, parts.accelerator
    captions = [item.caption for item in dataset.items]
    if settings.token_attention_penalty and not any(item.mask for item in dataset.items):
        raise UserError("token_attention_penalty needs masks: set mask_from, or upload x.mask.png beside x.png.")
    trained = tuple(item for i, item in enumerate(dataset.items) if i not in held_out)
    preserved = preserved_prompts(settings, method, dataset.model_copy(update={"items": trained}))
    with parts.stages.stage("cache"):
        # before the method attaches: what is cached of the text is the base model's
        text = [*texts(settings, method, captions), *unrelated_prompts(settings), *preserved]
        cached = cache.build(family, dataset, text, parts.stages.progress, method)
        if not method.needs_vae:
            family.free(VAE)
        groups = attached(parts, cached)
    findings = examine(whole, preflight.reader_of(family, method, list(settings.class_words)))
    findings = findings.model_copy(update={"warnings": (*findings.warnings, *family.notes)})
    if accelerator.is_main_process:
        write_preflight(whole, findings)
    if not method.needs_text_grad:
        family.free(TEXT)
    if settings.base_precision == "fp8":
        family.store_in_fp8()
    if settings.gradient_checkpointing:
        family.enable_gradient_checkpointing()
    if settings.enable_xformers:
        family.enable_xformers()
    identity = fingerprint(settings, dataset.dataset_hash) | {
        "base_hash": families.fingerprint(settings.base_model),
        "processes": accelerator.num_processes,
        "init_adapter_hash": parts.started_from.get("sha256"),
    }
    plan = Plan(
        module=TrainStep(family, method, cached, settings),
        batches=BatchMaker(cached.without(held_out), settings, accelerator.device, preserved),
        groups=groups,
        method=method,
        settings=settings,
        checkpoints=Checkpoints(settings.output_dir / CHECKPOINTS, identity, settings.checkpoints_total_limit),
        on_step=parts.stages.on_step_of(settings.max_train_steps),
        beside=_writer(parts, settings) if settings.save_diffusers else None,
        figures=family.figures,
    )
    if accelerator.is_main_process:
        _tell_parameters(groups)
    return plan, cached, findings


def attached(parts: Loaded, cached: Cache) -> list[ParameterGroup]:
    """Attach the method; its parameter groups, at the values from which a run begins."""
    groups = parts.method.attach(parts.family)
    if parts.method.settings.token_text_warmup:
        captions = [item.caption for item in parts.dataset.items]
        before, after = text_warmup.fit(parts.family, parts.method, groups, cached, captions)
        if parts.accelerator.is_main_process:
            print(f"text warm-up: distance to the class word {before:.4f} -> {after:.4f}", file=sys.stderr)
    return groups


def _tell_parameters(groups: Sequence[ParameterGroup]) -> None:
    """Say in the terminal what is trained."""
    counts = {group.name: sum(p.numel() for p in group.parameters) for group in groups}
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    print(f"trained parameters: {sum(counts.values()):,} ({parts})", file=sys.stderr)


def _writer(parts: Loaded, settings: JobSettings) -> Callable[[Path], None]:
    """What puts the weights in diffusers' layout into each checkpoint, whose name tells the step."""

    def write(folder: Path) -> None:
        run_at = delivery.Run(settings, int(folder.name.rpartition("_")[2]), parts.started_from)
        manifest = delivery.manifest_of(parts.family, parts.method, parts.dataset, run_at)
        parts.method.save_diffusers(folder, manifest)

    return write


def summarised(fitted: Fitted, dataset: PreparedDataset, gallery: Gallery, seconds: dict[str, float]) -> Summary:
    """What evaluation.json says; `seconds` are those of the stages."""
    judged, main = fitted.judged, fitted.main
    end = judged.steps[-1]
    runs = (main,) if judged is main else (main, judged)
    spent = sum(answers.seconds for one in runs for answers in one.answers)
    spent += seconds["preview"] * gallery.extra_share
    return Summary(
        judged_by=FOLDS if judged is not main else HELD_OUT if judged.unseen else SEEN,
        held_out=tuple(dataset.items[index].source for index in fitted.parting.held_out),
        delivered_step=fitted.step,
        best_step=judged.best_step,
        last_step=fitted.last_step,
        planned_steps=fitted.planned_steps,
        risen=Measured.of(judged.risen(end)),
        overfitted=judged.overfitted(end),
        base_loss=float(judged.base.mean()),
        curve=curve(judged),
        near_copies=gallery.seen.near_copies,
        diversity=gallery.seen.diversity,
        seconds=round(spent, 1),
        share=round(spent / sum(seconds.values()), 4),
        by_concept=_by_concept(fitted, dataset),
        figures=fitted.figures(float(judged.at(fitted.step).losses.mean())),
        base_figures=fitted.figures(float(judged.base.mean())),
    )


def _by_concept(fitted: Fitted, dataset: PreparedDataset) -> dict[str, Measured]:
    """The gain on each concept's own pictures, of those that were asked about; nothing where there is one concept."""
    parting, judged = fitted.parting, fitted.judged
    asked = parting.asked(dataset) if judged is fitted.main else [index for fold in parting.folds for index in fold]
    places: dict[str, list[int]] = {}
    for place, index in enumerate(asked):
        places.setdefault(" and ".join(dataset.triggers_of(dataset.items[index])), []).append(place)
    if len(dataset.triggers) < 2:
        return {}
    return {name: Measured.of(judged.of(own).gain(fitted.step)) for name, own in sorted(places.items())}
