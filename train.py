"""The door to training.

    python train.py --input_images data.zip --base_model toybox --trigger_word TOK --output_dir outputs/x
    python train.py recipes/toybox_pivotal.yaml --max_train_steps 50
    python train.py recipes/toybox_pivotal.yaml --dry_run      # only what it would train on, and what that would cost

`train` is the same job for Cog. Cog reads its signature from the source without running it, so defaults, bounds and
choices are written out as literals; a test holds them equal to JobSettings.
"""

import contextlib
import math
import sys
import uuid
from pathlib import Path as LocalPath
from typing import Any, Optional

from cog import Input, Path, current_scope

from preprocessing.errors import UserError
from trainer import cancel, commandline, hosted
from trainer.config import JobSettings

OUTPUTS = LocalPath("outputs")  # under the working directory, which `cog train` shares with the host

METHODS = ["pivotal", "lora", "textual_inversion", "full", "condition", "prefix", "perfusion"]
CAPTIONERS = ["auto", "toybox", "blip", "florence2", "qwen-vl", "lavis", "none"]
MASKS = ["auto", "none", "alpha", "text", "face"]
MODES = ["subject", "face", "style", "captions"]
OPTIMIZERS = ["adamw", "adamw8bit", "prodigy", "muon"]
PRECISIONS = ["auto", "no", "fp16", "bf16"]

hosted.redact_downloads()  # here, for Cog calls nothing of ours before it downloads


def train(
    input_images: Path = Input(description="Zip or tar of pictures. Uploads over 75 MiB get 413: give an http(s) URL."),
    base_model: str = Input(default="toybox", description="A toybox model's name, a folder or a Hub id."),
    method: str = Input(default="pivotal", choices=METHODS, description="pivotal: token embeddings and LoRA."),
    mode: str = Input(
        default="subject", choices=MODES, description="What is taught: wordings, masks, flips, previews."
    ),
    trigger_word: str = Input(default="TOK", description="Word that calls the subject."),
    class_word: str = Input(default="", description="What the subject is, in one word."),
    captioner: str = Input(default="auto", choices=CAPTIONERS, description="Captions pictures that have none."),
    resolution: Optional[int] = Input(default=None, ge=16, le=4096, description="Side in pixels of a square picture."),
    horizontal_flip: bool = Input(default=False, description="Also train on mirrored pictures."),
    mask_from: str = Input(default="auto", choices=MASKS, description="Where the loss counts; x.mask.png always wins."),
    max_train_steps: Optional[int] = Input(default=None, ge=1, description="Optimiser steps."),
    train_batch_size: Optional[int] = Input(default=None, ge=1, description="Pictures a step."),
    gradient_accumulation_steps: int = Input(default=1, ge=1, description="Batches summed into one step."),
    optimizer: Optional[str] = Input(default=None, choices=OPTIMIZERS, description="prodigy finds its own rate."),
    learning_rate: Optional[float] = Input(default=None, ge=0, description="Of the LoRA or full weights."),
    text_embedding_lr: Optional[float] = Input(default=None, ge=0, description="Of the new tokens."),
    n_tokens: Optional[int] = Input(default=None, ge=1, le=64, description="New tokens for the trigger word."),
    pivot_fraction: float = Input(default=0.7, ge=0, le=1, description="Share of the run that trains the tokens."),
    lora_rank: Optional[int] = Input(default=None, ge=1, le=1024, description="Rank of the LoRA matrices."),
    use_dora: bool = Input(default=False, description="Weight-decomposed LoRA (DoRA)."),
    train_text_encoder: bool = Input(default=False, description="Adapt text encoders too (methods lora, full)."),
    snr_gamma: float = Input(default=5.0, description="Min-SNR weighting; above 0."),
    noise_offset: float = Input(default=0.0, ge=0, description="Noise per channel, for darker and brighter pictures."),
    caption_dropout: float = Input(default=0.1, ge=0, le=1, description="Share of captions replaced by none."),
    seed: int = Input(default=0, ge=0, description="The same seed gives the same weights."),
    mixed_precision: str = Input(default="auto", choices=PRECISIONS, description="auto: bf16 where it is fast."),
    gradient_checkpointing: bool = Input(default=False, description="Less memory for about 40 % more time."),
    config: Optional[str] = Input(default=None, description="More settings, YAML or JSON; inputs not at default win."),
) -> Path:
    """Train and give back the archive of weights; for Cog. Settings that are not given take the base model's values.

    `config` holds any setting of `python train.py --help`, as text, as a data: URL or as a file's path. An input that
    differs from its default wins over it; an input left at its default does not override it.
    """
    inputs = dict(locals())
    with hosted.told_shortly():
        return cancel.run(lambda: _trained(inputs, inputs.pop("config")))


def _trained(inputs: dict[str, Any], config: str | None) -> Path:
    """Run the job in a folder of its own and make sure of its result: Cog calls a missing file a success."""
    settings = hosted.job_settings(inputs, config, OUTPUTS, f"train-{uuid.uuid4().hex[:12]}")

    commandline.quiet_libraries()
    from trainer import job

    try:
        result = job.train(settings, progress=_tell, on_step=_tell_step)
    except BaseException:  # a cancel is no Exception
        if left := hosted.resumable(settings.output_dir):
            print(f"not finished: {left}", flush=True)
        with contextlib.suppress(OSError):  # only a folder in which nothing lies can be removed
            settings.output_dir.rmdir()
        raise
    finally:
        hosted.give_memory_back()
    if not result.archive.is_file():
        raise FileNotFoundError(f"the training ended without {result.archive}")
    print("\n".join(result.summary.sentences()), flush=True)
    for name, value in result.summary.scores().items():
        current_scope().record_metric(name, value)
    if result.pushed is not None:
        print(result.pushed.told, flush=True)
    return Path(result.archive)


def _tell(stage: str, done: int, total: int) -> None:
    """What the job is at, for Cog's polls and webhooks."""
    current_scope().record_metric("stage", stage)


def _tell_step(row: dict[str, float], total: int) -> None:
    """How far the training is. Every key keeps its type from the first step to the last, as Cog asks."""
    scope = current_scope()
    scope.record_metric("step", int(row["step"]))
    scope.record_metric("total_steps", int(total))
    for name in ("loss", "images_per_second", "eta_s"):
        value = float(row[name])
        if math.isfinite(value):  # JSON knows no other; the step before is still shown
            scope.record_metric(name, value)


def main(argv: list[str]) -> None:
    """The command line; `argv` are the program's arguments. Raises UserError for a mistake of the user's."""
    description = "Teach a base model a subject from an archive of pictures."
    parser = commandline.build_parser(JobSettings, "train.py", description, recipe=True)
    settings = commandline.read(parser, JobSettings, argv)

    from trainer import job

    if settings.dry_run:
        found = job.dry_run(settings)
        if found is not None:
            print(f"{found.findings.told()}\nreport: {found.report}")
        return
    result = job.train(settings)
    if result is not None:  # of several processes the first one tells
        print("\n".join(result.summary.sentences()))
        print(f"weights: {result.archive}\nreport: {result.report}")
        if result.pushed is not None and result.pushed.error is not None:
            raise UserError(result.pushed.error)
        if result.pushed is not None:
            print(result.pushed.told)


if __name__ == "__main__":
    sys.exit(commandline.run(main))
