"""The one training loop. It knows losses, optimisers and steps; no family and no method is named in it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from torch import nn

from preprocessing.errors import UserError
from trainer import checkpoint, sampler
from trainer.checkpoint import Checkpoints
from trainer.config import JobSettings
from trainer.methods.base import Method, ParameterGroup
from trainer.metrics import METRICS_FILE, Metrics
from trainer.optimisers import build
from trainer.step import BatchMaker

MAX_BAD_STEPS = 3
# a fp16 gradient scaler starts far too high on purpose and finds its scale by overflowing
MAX_SCALER_OVERFLOWS = 20


class Judge(Protocol):
    """Who looks at the weights in the middle of a run; asked on the first process only."""

    @property
    def steps(self) -> Collection[int]:
        """The steps after which it wants to."""

    def begin(self, step: int) -> None:
        """The run begins, or goes on, after `step` steps."""

    def __call__(self, step: int) -> None:
        """The live weights are those after `step` steps."""

    def should_stop(self, step: int) -> bool:
        """Whether the run is to end here."""


@dataclass(frozen=True)
class Plan:
    """What the loop runs: the module that returns a loss, where its batches come from, what it moves."""

    module: nn.Module
    batches: BatchMaker
    groups: list[ParameterGroup]
    method: Method
    settings: JobSettings
    checkpoints: Checkpoints
    judge: Judge | None = None
    on_step: Callable[[dict[str, float]], None] = lambda row: None
    beside: Callable[[Path], None] | None = None  # writes more into a checkpoint, of the weights to be delivered
    name: str = ""  # of a run that is not the job's own: trackers hear nothing of it
    figures: Callable[[float], dict[str, float]] = lambda loss: {}  # what else a loss is told as


class Loop:
    """Runs a plan from its last checkpoint, or from the start."""

    def __init__(self, accelerator: Accelerator, plan: Plan):
        self.accelerator, self.plan, self.settings = accelerator, plan, plan.settings
        self.module = accelerator.prepare(plan.module)
        self.parameters = [p for group in plan.groups for p in group.parameters]
        self.optimisers = [build(group) for group in plan.groups]
        self.average = None
        if self.settings.ema_decay is not None:
            self.average = EMAModel(self.parameters, decay=self.settings.ema_decay, use_ema_warmup=True, power=0.75)
        self.step = self._bad_steps = self._overflows = 0
        per_process = self.settings.train_batch_size * self.settings.gradient_accumulation_steps
        self.pictures_per_step = per_process * accelerator.num_processes
        if self.settings.resume:
            self._resume()

    def run(self, folder: Path) -> int:
        """Train to max_train_steps, or until the judge ends it; returns the last step. Writes metrics, checkpoints."""
        settings = self.settings
        self.module.train()
        cache = self.plan.batches.cache
        steps = sampler.steps(cache.buckets(), self.pictures_per_step, settings.seed, cache.repeats, cache.balance)
        span = (self.step, settings.max_train_steps)
        metrics = Metrics(folder / METRICS_FILE, self.accelerator, span, self.plan.name)
        every = settings.checkpoint_every or max(1, math.ceil(settings.max_train_steps / 4))
        try:
            judge = self.plan.judge
            stopped = judge is not None and self._judged(judge.begin)
            for indices in itertools.islice(steps, self.step, settings.max_train_steps):
                if stopped:
                    break
                values = self._optimise(indices)
                self.step += 1
                self.plan.on_step(metrics.step(self.step, self.pictures_per_step, values))
                stopped = judge is not None and self.step in judge.steps and self._judged(judge)
                if stopped or self.step % every == 0 or self.step == settings.max_train_steps:
                    self.save()
        finally:
            metrics.close()
        if self.average is not None:
            self.average.copy_to(self.parameters)
        return self.step

    def _judged(self, ask: Callable[[int], None]) -> bool:
        """Show the judge the weights as they would be delivered; whether the run is to end, on all processes alike."""
        stop = [False]
        if self.accelerator.is_main_process:
            self.plan.module.eval()
            with self._averaged(), self.accelerator.autocast():
                ask(self.step)
            self.plan.module.train()
            stop = [self.plan.judge.should_stop(self.step)]
        return broadcast_object_list(stop)[0]

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the parameters are their average, where one is kept and there was a step to average."""
        if self.average is None or not self.step:
            yield
            return
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)

    def _optimise(self, indices: list[int]) -> dict[str, float]:
        """One optimiser step over all its batches, on all processes; a step that is not finite is not applied."""
        factors = self.plan.method.schedule(self.step / self.settings.max_train_steps)
        for scheduled in self.optimisers:
            scheduled.optimiser.zero_grad(set_to_none=True)
            scheduled.set_factor(factors.get(scheduled.group.name, 1.0))
        loss = self._backward(indices)
        scaler = self.accelerator.scaler
        if scaler is not None:
            for scheduled in self.optimisers:
                scaler.unscale_(scheduled.optimiser)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm).item()
        if math.isfinite(loss) and math.isfinite(norm):
            self._bad_steps = self._overflows = 0
            self._apply(scaler)
        else:
            self._refuse(loss, scaler)
        rates = {f"lr/{scheduled.group.name}": scheduled.learning_rate for scheduled in self.optimisers}
        figures = self.plan.figures(loss) | self.plan.method.figures()
        return {"loss": loss, "grad_norm": norm, **figures, **rates}

    def _backward(self, indices: list[int]) -> float:
        """Gradients of the mean loss over the step's pictures; that mean, over all processes."""
        settings, accelerator = self.settings, self.accelerator
        size, total = settings.train_batch_size, torch.zeros((), device=accelerator.device)
        for micro in range(settings.gradient_accumulation_steps):
            first = (micro * accelerator.num_processes + accelerator.process_index) * size
            positions = range(first, first + size)
            batch = self.plan.batches.make(self.step, [indices[i] for i in positions], positions, len(indices))
            last = micro == settings.gradient_accumulation_steps - 1
            with _unless(last, accelerator, self.module):
                loss = self.module(batch) / settings.gradient_accumulation_steps
                accelerator.backward(loss)
            total += loss.detach()
        return accelerator.reduce(total, "mean").item()

    def _apply(self, scaler: torch.amp.GradScaler | None) -> None:
        for scheduled in self.optimisers:
            if scheduled.factor == 0:
                continue
            if scaler is None:
                scheduled.optimiser.step()
            else:
                scaler.step(scheduled.optimiser)
        if scaler is not None:
            scaler.update()
        if self.average is not None:
            self.average.step(self.parameters)

    def _refuse(self, loss: float, scaler: torch.amp.GradScaler | None) -> None:
        """Count a step that is not applied; stop the job when it is no accident."""
        if scaler is not None and math.isfinite(loss):
            scaler.update()
            self._overflows += 1
        else:
            self._bad_steps += 1
        if self._bad_steps < MAX_BAD_STEPS and self._overflows < MAX_SCALER_OVERFLOWS:
            return
        path = self.save()
        raise UserError(
            f"The loss or its gradient was not finite {max(self._bad_steps, self._overflows)} steps in a row, last at "
            f"step {self.step + 1}: lower learning_rate or use mixed_precision no; the last good state is {path}."
        )

    def save(self) -> Path:
        """Write a checkpoint of the state after `self.step` applied steps (first process only)."""
        state: dict[str, Any] = {
            "parameters": [p.detach().cpu() for p in self.parameters],
            "optimisers": [scheduled.optimiser.state_dict() for scheduled in self.optimisers],
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            "method": self.plan.method.state(),
            "random": checkpoint.random_state(),
        }
        path = self.plan.checkpoints.folder
        if self.accelerator.is_main_process:
            with self._averaged() if self.plan.beside else nullcontext():
                path = self.plan.checkpoints.save(self.step, state, self.plan.beside)
        self.accelerator.wait_for_everyone()
        return path

    def _resume(self) -> None:
        found = self.plan.checkpoints.load_last()
        if found is None:
            return
        self.step, state = found
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        for scheduled, value in zip(self.optimisers, state["optimisers"], strict=True):
            scheduled.optimiser.load_state_dict(value)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
            self.average.to(self.accelerator.device)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if state.get("method"):
            self.plan.method.restore(state["method"])
        checkpoint.restore_random_state(state["random"])


def _unless(last: bool, accelerator: Accelerator, module: nn.Module) -> Any:
    """Gradients are averaged over processes once a step, with its last batch."""
    return nullcontext() if last else accelerator.no_sync(module)
