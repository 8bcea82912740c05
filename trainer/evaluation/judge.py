"""What the loop calls in the middle of a run: asks the points, keeps the best weights, says when to stop."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.config import JobSettings
from trainer.evaluation import history
from trainer.evaluation.history import Answers, History
from trainer.evaluation.points import Points
from trainer.step import TrainStep

BEST, MIDDLE, LAST = "best", "middle", "last"
PER_RUN = 8  # evaluations, unless the settings say how often


class Kept:
    """The weights of a few steps, each a folder that `predict` takes, in `folder`."""

    def __init__(self, folder: Path, write: Callable[[Path, int], None]):
        self.folder, self._write = folder, write

    def save(self, name: str, step: int) -> Path:
        """Write the live weights, whole, in place of any of that name."""
        path, temporary = self.folder / name, self.folder / f"unfinished_{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        self._write(temporary, step)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        return path


@dataclass(frozen=True)
class Rule:
    """When a run is judged and ends."""

    steps: tuple[int, ...]  # after which it is judged; the last one is the end of the run
    stop_early: bool
    keep_all: bool = False  # weights of every evaluation
    unseen: bool = True  # whether the pictures asked about are kept from training
    best_step: int | None = None  # told by cross-validation: there the run is at its best, and ends


def rule(settings: JobSettings, best_step: int | None = None, stop_early: bool = True, unseen: bool = True) -> Rule:
    """Evaluations evenly over the run, and at its end."""
    last = settings.max_train_steps
    every = settings.evaluate_every or math.ceil(last / PER_RUN)
    steps = (*range(every, last, every), last)
    return Rule(steps, stop_early and settings.early_stop, settings.keep_evaluated, unseen, best_step)


class Judge:
    """Asks at the steps of a rule and remembers the answers in the file `log`; `asked` is who answers, and what."""

    def __init__(
        self,
        asked: tuple[TrainStep, Points],
        rule: Rule,
        log: Path,
        kept: Kept | None = None,
        tell: Callable[[History], None] = lambda history: None,
    ):
        (self._module, self._points), self.rule, self._log = asked, rule, log
        self._kept, self._tell = kept, tell
        self._history: History | None = None

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps after which it asks."""
        return self.rule.steps

    @property
    def history(self) -> History:
        if self._history is None:
            raise RuntimeError("asked before the run began")
        return self._history

    def begin(self, step: int) -> None:
        """Ask for the first time, or go on with what was answered up to `step`."""
        self._history = history.read(self._log, step) if step else None
        if self._history is None:
            points, base = self._points, self._points.base_losses(self._module).numpy()
            self._history = History(base, tuple(points.times), tuple(points.pictures), self.rule.unseen)
            self._ask(step)

    def __call__(self, step: int) -> None:
        """Judge the live weights, which are those after `step` steps."""
        self._ask(step)
        if self._kept is None:
            return
        best = self.rule.best_step
        if step == best or (best is None and self.rule.unseen and self.history.best_step == step):
            self._kept.save(BEST, step)
        if step == min(self.rule.steps, key=lambda one: abs(one - self.rule.steps[-1] / 2)):
            self._kept.save(MIDDLE, step)
        if self.rule.keep_all:
            self._kept.save(f"step_{step}", step)

    def should_stop(self, step: int) -> bool:
        """Whether the run is to end here, before its last step."""
        if not self.rule.stop_early:
            return False
        return step == self.rule.best_step or self.history.turned()

    def _ask(self, step: int) -> None:
        started = time.monotonic()
        answers = Answers(
            step,
            self._points.losses(self._module).numpy(),
            self._points.plain_losses(self._module).numpy(),
            self._points.drift(self._module).numpy(),
        )
        answers = replace(answers, seconds=round(time.monotonic() - started, 3))
        self._history = replace(self.history, answers=(*self.history.answers, answers))
        history.write(self._log, self._history)
        self._tell(self._history)
