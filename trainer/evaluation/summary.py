"""evaluation.json: how good a job's weights are, in numbers with intervals; and the same in plain sentences."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from trainer.evaluation.bootstrap import Interval
from trainer.evaluation.history import LOST, History

HELD_OUT, FOLDS, SEEN = "held-out pictures", "cross-validation", "training pictures"


class Measured(BaseModel):
    """A mean with the bounds of its 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, found: Interval) -> Measured:
        return cls(mean=found.mean, low=found.low, high=found.high)

    def percent(self) -> str:
        """For a sentence: 12.1 % (10.0 to 14.2 %)."""
        return f"{100 * self.mean:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f} %)"


class Evaluation(BaseModel):
    """One evaluation of a run; see `trainer.evaluation.history.History` for what the figures mean."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    loss: float
    gain: Measured
    trigger_contrast: Measured
    drift: Measured
    bands: tuple[Measured, ...]  # loss by quarter of time, from little noise to mostly noise


class Summary(BaseModel):
    """What a job found out about itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    judged_by: Literal["held-out pictures", "cross-validation", "training pictures"]
    held_out: tuple[str, ...] = ()  # names of the pictures in the upload
    delivered_step: int
    best_step: int  # with the lowest loss on the pictures that it is judged by
    last_step: int
    planned_steps: int
    risen: Measured  # at the end of what was judged: see History.risen
    overfitted: bool
    base_loss: float
    curve: tuple[Evaluation, ...]
    by_concept: dict[str, Measured] = {}  # of several concepts: the gain on the pictures of each, by trigger word
    near_copies: float | None = None  # share of the samples that look like a copy of a training picture
    diversity: float | None = None  # over seeds, as a share of the base model's
    seconds: float = 0.0  # that judging took
    share: float = 0.0  # of the job's time
    figures: dict[str, float] = {}  # what else the delivered weights' loss is told as (bits_per_dim)
    base_figures: dict[str, float] = {}  # and the base model's

    @property
    def delivered(self) -> Evaluation:
        """The evaluation of the delivered step."""
        return next(one for one in self.curve if one.step == self.delivered_step)

    def scores(self) -> dict[str, float]:
        """The figures of the delivered weights by name, for the manifest."""
        own = self.delivered
        gain = "trained_gain" if self.judged_by == SEEN else "held_out_gain"
        found = {gain: own.gain.mean, "trigger_contrast": own.trigger_contrast.mean, "drift": own.drift.mean}
        more = {"near_copies": self.near_copies, "diversity": self.diversity}
        found |= {f"{gain.rpartition('_')[0]}_{name}": value for name, value in self.figures.items()}
        return {name: round(value, 6) for name, value in (found | more).items() if value is not None}

    def sentences(self) -> list[str]:
        """The summary for a person."""
        told = [
            self._which(),
            self._gain(),
            self._by_concept(),
            *self._figures(),
            self._turn(),
            self._trigger(),
            self._drift(),
            *self._drawn(),
            self._cost(),
        ]
        return [sentence for sentence in told if sentence]

    def _which(self) -> str:
        if self.delivered_step == self.last_step == self.planned_steps:
            return f"The weights are those of the last step, {self.last_step}."
        if self.delivered_step == self.last_step:
            return f"Training was ended after step {self.last_step} of {self.planned_steps}; these are its weights."
        return f"The weights are those of step {self.delivered_step}; training ended at step {self.last_step}."

    def _gain(self) -> str:
        gain = self.delivered.gain
        if self.judged_by == SEEN:
            return (
                f"Its own training pictures are predicted {gain.percent()} better than by the base model; no picture "
                f"was kept from training, so that nothing can be said of unseen ones."
            )
        whose = {
            HELD_OUT: f"Pictures that were kept from training ({', '.join(self.held_out)})",
            FOLDS: "Pictures that were left out of training in turn (cross-validation)",
        }[self.judged_by]
        if gain.high < 0:
            return f"{whose} are predicted worse than by the base model: gain {gain.percent()}."
        if gain.low <= 0:
            return f"{whose} are predicted about as well as by the base model: gain {gain.percent()}."
        return f"{whose} are predicted {gain.percent()} better than by the base model."

    def _by_concept(self) -> str:
        told = ", ".join(f"{name} {gain.percent()}" for name, gain in self.by_concept.items())
        return f"Of that the pictures of each concept: {told}." if told else ""

    def _figures(self) -> list[str]:
        return [
            f"Their {name.replace('_', ' ')}: {value:.3f}; by the base model {self.base_figures[name]:.3f}."
            for name, value in self.figures.items()
        ]

    def _turn(self) -> str:
        if self.judged_by == SEEN:
            return ""
        if self.overfitted:
            return (
                f"Probably overfitted after step {self.best_step}: by the end, the loss on them had risen by "
                f"{self.risen.percent()} of {self._unit()}, so that step was chosen."
            )
        if self.risen.low > 0:
            return (
                f"They were predicted best after step {self.best_step}; since then the loss has risen by "
                f"{self.risen.percent()} of {self._unit()}. Up to {100 * LOST:.0f} % is no reason to take an earlier "
                f"step: pictures that are drawn may still get better."
            )
        return "There is no sign of overfitting."

    def _unit(self) -> str:
        """What `risen` is a share of."""
        best = min(one.loss for one in self.curve if one.step > 0)
        return "what had been gained" if best < self.base_loss else "the base model's loss"

    def _trigger(self) -> str:
        contrast = self.delivered.trigger_contrast
        if contrast.mean == contrast.low == contrast.high == 0:  # no caption has the trigger in it
            return ""
        if contrast.low <= 0 <= contrast.high:
            return f"The trigger word makes no difference that could be measured: {contrast.percent()} of the loss."
        verb = "lowers" if contrast.mean > 0 else "raises"
        low, high = sorted(map(abs, (contrast.low, contrast.high)))
        size = Measured(mean=abs(contrast.mean), low=low, high=high)
        return f"Against the class word, the trigger word {verb} their loss by {size.percent()}."

    def _drift(self) -> str:
        drift = self.delivered.drift
        return f"Predictions on unrelated prompts differ from the base model's by {drift.percent()} of their square."

    def _drawn(self) -> list[str]:
        told = []
        if self.near_copies is not None:
            told.append(f"{100 * self.near_copies:.0f} % of the drawn pictures look like a copy of a training picture.")
        if self.diversity is not None:
            told.append(f"Over seeds they differ {self.diversity:.2f} times as much as the base model's.")
        return told

    def _cost(self) -> str:
        return f"Judging took {self.seconds:.0f} s, {100 * self.share:.0f} % of the job." if self.seconds else ""


def curve(history: History) -> tuple[Evaluation, ...]:
    """Every evaluation of a run."""
    return tuple(
        Evaluation(
            step=step,
            loss=float(history.at(step).losses.mean()),
            gain=Measured.of(history.gain(step)),
            trigger_contrast=Measured.of(history.contrast(step)),
            drift=Measured.of(history.drift(step)),
            bands=tuple(map(Measured.of, history.bands(step))),
        )
        for step in history.steps
    )
