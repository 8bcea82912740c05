"""What a run answered at its points, evaluation by evaluation, and which step follows from that."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.evaluation.bootstrap import Interval, interval
from trainer.evaluation.points import BANDS

# Of the best gain: a run that has lost more is overfitted. Less is usual for few pictures, and what is drawn goes on
# getting better meanwhile (docs/evaluation.md has the figures).
LOST = 1.0
PATIENCE = 2  # evaluations in a row that must say so before a run is stopped
ALIVE = 1e-6  # relative change of a loss that is no rounding


@dataclass(frozen=True)
class Answers:
    """One evaluation: losses at the points [N], those with the class word for the trigger [N], drift [D]."""

    step: int
    losses: np.ndarray
    plain: np.ndarray
    drift: np.ndarray
    seconds: float = 0.0

    def as_row(self) -> dict[str, Any]:
        named = {name: getattr(self, name).tolist() for name in ("losses", "plain", "drift")}
        return {"step": self.step, **named, "seconds": self.seconds}

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Answers:
        return cls(**{name: np.array(value) if isinstance(value, list) else value for name, value in row.items()})


@dataclass(frozen=True)
class History:
    """The base model's losses at the points, with the class word: `base` [N]; what each point is; all answers."""

    base: np.ndarray
    times: tuple[float, ...]  # in [0, 1): 1 is noise
    pictures: tuple[int, ...]  # the picture that each point is of
    unseen: bool  # whether the points' pictures were kept from training
    answers: tuple[Answers, ...] = ()

    def at(self, step: int) -> Answers:
        """The evaluation after `step` steps; KeyError where there was none."""
        for answers in self.answers:
            if answers.step == step:
                return answers
        raise KeyError(step)

    def of(self, pictures: Collection[int]) -> History:
        """The points of these pictures alone."""
        kept = np.isin(self.pictures, list(pictures))
        answers = (replace(one, losses=one.losses[kept], plain=one.plain[kept]) for one in self.answers)
        times, owners = (tuple(np.array(values)[kept].tolist()) for values in (self.times, self.pictures))
        return replace(self, base=self.base[kept], times=times, pictures=owners, answers=tuple(answers))

    @property
    def steps(self) -> list[int]:
        return [answers.step for answers in self.answers]

    @property
    def best_step(self) -> int:
        """The trained step with the lowest loss."""
        trained = [answers for answers in self.answers if answers.step > 0]
        return min(trained, key=lambda answers: answers.losses.mean()).step

    def gain(self, step: int) -> Interval:
        """How much better than the base model, told the class word, the points' pictures are predicted: 1 is all."""
        return interval((self.base - self.at(step).losses) / self.base.mean(), self.pictures)

    def contrast(self, step: int) -> Interval:
        """What the trigger adds: the loss that the class word has instead, as a share of that; 0 is nothing."""
        answers = self.at(step)
        return interval((answers.plain - answers.losses) / answers.plain.mean(), self.pictures)

    def drift(self, step: int) -> Interval:
        """Mean squared change of predictions on unrelated prompts, as a share of their square; 0 is none."""
        drift = self.at(step).drift
        return interval(drift, [0] * len(drift))

    def bands(self, step: int) -> list[Interval]:
        """The loss in each quarter of time, from little noise to mostly noise."""
        band = np.minimum((np.array(self.times) * BANDS).astype(int), BANDS - 1)
        losses, owners = self.at(step).losses, np.array(self.pictures)
        return [interval(losses[band == k], owners[band == k]) for k in range(BANDS)]

    def risen(self, step: int) -> Interval:
        """How far the loss at `step` lies over that of the best step before it, in units of the best step's gain.

        0: not at all. 1: all that was gained over the base model is lost. Where nothing was gained, in units of the
        base model's loss.
        """
        best = replace(self, answers=tuple(one for one in self.answers if one.step <= step)).best_step
        gained = self.base.mean() - self.at(best).losses.mean()
        unit = gained if gained > 0 else self.base.mean()
        return interval((self.at(step).losses - self.at(best).losses) / unit, self.pictures)

    def overfitted(self, step: int) -> bool:
        """Whether, with confidence, more than LOST of the gain was lost by `step`; never told by pictures seen."""
        if not self.unseen:
            return False
        gained = self.base.mean() > self.at(self.best_step).losses.mean()
        return self.risen(step).low > (LOST if gained else 0)

    def turned(self) -> bool:
        """Whether the last PATIENCE evaluations all found it overfitted."""
        late = [step for step in self.steps if step > 0][-PATIENCE:]
        return len(late) == PATIENCE and all(map(self.overfitted, late))

    def chosen_step(self) -> int:
        """The last step, or the best where the last is overfitted."""
        last = self.steps[-1]
        return self.best_step if self.overfitted(last) else last

    def is_dead(self, step: int) -> bool:
        """Whether at `step` every loss is what it was before training."""
        before, after = self.at(0).losses, self.at(step).losses
        return bool((np.abs(after - before) <= ALIVE * np.abs(before)).all())

    def joined(self, other: History) -> History:
        """The points of both runs as one history, at the steps that both evaluated."""
        shift = max(self.pictures) + 1
        shared = sorted(set(self.steps) & set(other.steps))
        pairs = [(self.at(step), other.at(step)) for step in shared]
        answers = [
            Answers(
                step=one.step,
                losses=np.concatenate([one.losses, two.losses]),
                plain=np.concatenate([one.plain, two.plain]),
                drift=np.concatenate([one.drift, two.drift]),
                seconds=one.seconds + two.seconds,
            )
            for one, two in pairs
        ]
        return History(
            base=np.concatenate([self.base, other.base]),
            times=self.times + other.times,
            pictures=self.pictures + tuple(index + shift for index in other.pictures),
            unseen=self.unseen and other.unseen,
            answers=tuple(answers),
        )


def write(path: Path, history: History) -> None:
    """A line of what the points are, then one for each evaluation."""
    head = {"base": history.base.tolist(), "times": history.times, "pictures": history.pictures}
    rows = [head | {"unseen": history.unseen}, *(answers.as_row() for answers in history.answers)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path: Path, last_step: int) -> History | None:
    """What `write` wrote, up to `last_step`; None where there is nothing."""
    if not path.exists():
        return None
    head, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    answers = tuple(Answers.of_row(row) for row in rows if row["step"] <= last_step)
    return History(np.array(head["base"]), tuple(head["times"]), tuple(head["pictures"]), head["unseen"], answers)


def merged(histories: Sequence[History]) -> History:
    """Those of several folds as one."""
    whole, *others = histories
    for other in others:
        whole = whole.joined(other)
    return whole
