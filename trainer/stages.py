"""Times the stages of a job, and passes its progress on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Progress = Callable[[str, int, int], None]
OnStep = Callable[[dict[str, float], int], None]


@dataclass
class Stages:
    """The seconds that each stage took, so far."""

    progress: Progress
    on_step: OnStep
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside; a stage that comes several times is summed."""
        self.progress(name, 0, 1)
        started = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0) + time.monotonic() - started, 3)

    def on_step_of(self, steps: int) -> Callable[[dict[str, float]], None]:
        """What the loop calls with each row of a run of `steps` steps."""

        def told(row: dict[str, float]) -> None:
            self.progress("train", row["step"], steps)
            self.on_step(row, steps)

        return told

    def on_fold_of(self, steps: int, fold: tuple[int, int]) -> Callable[[dict[str, float]], None]:
        """The same for the run of `fold` = (number, how many there are), which is not the job's own."""
        number, count = fold
        return lambda row: self.progress("cross-validate", (number - 1) * steps + row["step"], count * steps)
