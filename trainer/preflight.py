"""What the pre-flight report needs of the base model: how captions are read, and what a few real steps cost."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from preprocessing.concepts import trigger_pattern
from preprocessing.findings import Estimate, Read, Reader
from preprocessing.prepared import PreparedDataset
from trainer.config import JobSettings
from trainer.evaluation.points import SHARE as JUDGING
from trainer.evaluation.split import split
from trainer.families.base import Family, TextTower
from trainer.methods.base import Method

STEPS, WARM_UP = 6, 3  # of these the first are not counted: allocations, kernels
MIB = 2**20


def reader_of(family: Family, method: Method, triggers: Sequence[str]) -> Reader | None:
    """How the text encoder that reads the least of a caption reads it; trigger words as the method's tokens.

    None for a family that reads none.
    """
    if not family.text:
        return None

    def read(caption: str) -> Read:
        there = [one for one in triggers if trigger_pattern(one).search(caption)] or triggers[:1]
        words, wanted = method.words([caption, " ".join(there)])
        reads = [_read(tower, words, wanted, method.reserved(tower)) for tower in family.text]
        return max(reads, key=lambda one: (not one.trigger_kept, one.tokens - one.limit))

    return read


def _read(tower: TextTower, words: str, trigger: str, reserved: int) -> Read:
    tokenizer = tower.tokenizer
    limit = tokenizer.model_max_length - reserved
    encoded = tokenizer(words, return_offsets_mapping=True, verbose=False)
    ids, cut = encoded.input_ids, ""
    if len(ids) > limit:
        # The last place that is read is the end token's.
        cut = words[encoded.offset_mapping[limit - 1][0] :]
        ids = ids[: limit - 1]
    needed = set(tokenizer(trigger, add_special_tokens=False).input_ids)
    return Read(len(encoded.input_ids), limit, cut.strip(), needed <= set(ids))


def of_largest_size(dataset: PreparedDataset, settings: JobSettings) -> PreparedDataset:
    """As many pictures of the largest size as a step takes at the most."""
    size = max((item.size for item in dataset.items), key=lambda size: size[0] * size[1])
    most = settings.train_batch_size * settings.gradient_accumulation_steps
    items = [item for item in dataset.items if item.size == size][:most]
    return dataset.model_copy(update={"items": tuple(items)})


def few_steps(settings: JobSettings, scratch: Path) -> JobSettings:
    """The settings of the measured steps, which leave nothing in output_dir."""
    changes: dict[str, Any] = {"max_train_steps": STEPS, "output_dir": scratch, "resume": False}
    changes["save_diffusers"] = False
    return settings.model_copy(update=changes)


class Watch:
    """Notes when each step ended, and the most memory that was held."""

    def __init__(self, device: torch.device):
        self._ends: list[float] = []
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def on_step(self, row: dict[str, float], steps: int) -> None:
        """What the loop calls after each step."""
        self._ends.append(time.monotonic())

    def estimate(
        self, datasets: tuple[PreparedDataset, PreparedDataset], seconds: dict[str, float], settings: JobSettings
    ) -> Estimate:
        """What the whole job costs: `datasets` are the whole one and the measured part, `seconds` those of the stages
        so far, of which encoding grows with the pictures.
        """
        whole, part = datasets
        gaps = [after - before for before, after in zip(self._ends, self._ends[1:], strict=False)]
        step = median(gaps[WARM_UP - 1 :])
        runs = 1 + len(split(whole, settings).folds)
        training = runs * step * settings.max_train_steps * (1 + JUDGING)
        encoding = seconds["cache"] * len(whole.items) / len(part.items)
        # Linux counts ru_maxrss in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return Estimate(
            steps=settings.max_train_steps,
            runs=runs,
            measured_steps=len(gaps) - WARM_UP + 1,
            bucket=part.items[0].size,
            seconds_per_step=step,
            peak_memory_mib=(torch.cuda.max_memory_allocated() if self._cuda else own) / MIB,
            memory_of="accelerator" if self._cuda else "process",
            seconds_total=seconds["prepare"] + seconds["load"] + encoding + training,
        )
