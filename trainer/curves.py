"""The curves of the report, each as the address of one SVG picture."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from preprocessing.page import address

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trainer.evaluation.summary import Measured, Summary

MOST_POINTS = 2000  # of a curve
# Mid tones, so that the one picture of the curve reads on a light page and on a dark one.
INK, COLOURS = "#878d96", ("#3b82f6", "#f97316", "#22a06b", "#a855f7")


def series(metrics: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have a finite value of that name."""
    found = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
    return [(step, value) for step, value in found if math.isfinite(value)]


@contextmanager
def _page_style() -> Iterator[None]:
    from matplotlib import rc_context

    with rc_context({"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "svg.hashsalt": "report"}):
        yield


def _as_address(figure: Figure) -> str:
    """The figure, whose axes lie above one another, as the address of an SVG picture."""
    axes = figure.get_axes()
    axes[-1].set_xlabel("step")
    for axis in axes:
        axis.tick_params(colors=INK)
        axis.grid(color=INK, alpha=0.25, linewidth=0.6)
        axis.set_facecolor("none")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return address("image/svg+xml", drawn.getvalue())


def loss_curve(metrics: list[dict[str, Any]]) -> str | None:
    """Training loss and learning rates over the steps; None where no loss was recorded."""
    from matplotlib.figure import Figure

    loss = series(metrics, "loss")
    if not loss:
        return None
    names = sorted({key for row in metrics for key in row if key.startswith("lr/")})
    rates = {name.removeprefix("lr/"): found for name in names if (found := series(metrics, name))}
    with _page_style():
        figure = Figure(figsize=(8.5, 4.6 if rates else 3.0), layout="constrained")
        axes = figure.subplots(2 if rates else 1, sharex=True, squeeze=False, height_ratios=[2, 1][: 1 + bool(rates)])
        _draw_loss(axes[0, 0], loss)
        if rates:
            _draw_rates(axes[1, 0], rates)
        return _as_address(figure)


def evaluation_curve(summary: Summary) -> str:
    """What the evaluations found, with 95 % intervals: gain over the base model, loss by time, drift."""
    from matplotlib.figure import Figure

    steps = [one.step for one in summary.curve]
    with _page_style():
        figure = Figure(figsize=(8.5, 6.2), layout="constrained")
        gain, bands, drift = figure.subplots(3, sharex=True, height_ratios=[2, 2, 1])
        _draw_measured(gain, steps, [one.gain for one in summary.curve], (COLOURS[0], "gain over the base model"))
        contrast = [one.trigger_contrast for one in summary.curve]
        _draw_measured(gain, steps, contrast, (COLOURS[1], "what the trigger word adds"))
        gain.axhline(0, color=INK, linewidth=0.8)
        gain.axvline(summary.delivered_step, color=COLOURS[2], linestyle="--", linewidth=1.2, label="delivered")
        gain.set_ylabel("share of the loss")
        names = ("little noise", "", "", "mostly noise")
        for index, (name, colour) in enumerate(zip(names, COLOURS, strict=True)):
            _draw_measured(bands, steps, [one.bands[index] for one in summary.curve], (colour, name or None))
        bands.set_ylabel(f"loss on {summary.judged_by}", fontsize="small")
        _draw_measured(drift, steps, [one.drift for one in summary.curve], (COLOURS[3], "drift on unrelated prompts"))
        return _as_address(figure)


def _draw_measured(axis: Axes, steps: list[int], found: list[Measured], look: tuple[str, str | None]) -> None:
    colour, name = look
    axis.plot(steps, [one.mean for one in found], color=colour, linewidth=1.8, marker="o", markersize=3, label=name)
    axis.fill_between(steps, [one.low for one in found], [one.high for one in found], color=colour, alpha=0.2, lw=0)


def _draw_loss(axis: Axes, loss: list[tuple[float, float]]) -> None:
    import numpy as np

    steps, values = np.array(loss, dtype=np.float64).T
    # A running mean over a twentieth of the run; at both ends over the part of the window that exists.
    window = np.ones(max(1, len(values) // 20))
    smooth = np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
    every = -(-len(values) // MOST_POINTS)
    axis.plot(steps[::every], values[::every], color=COLOURS[0], alpha=0.3, linewidth=0.8, label="each step")
    axis.plot(steps[::every], smooth[::every], color=COLOURS[0], linewidth=1.8, label="running mean")
    axis.set_ylabel("loss")
    # The first steps' peaks would press the rest flat.
    low, high = np.percentile(values, (0, 99))
    margin = 0.1 * (high - low) or 1.0
    axis.set_ylim(low - margin / 2, high + margin)


def _draw_rates(axis: Axes, rates: dict[str, list[tuple[float, float]]]) -> None:
    for index, (name, found) in enumerate(rates.items()):
        every = -(-len(found) // MOST_POINTS)
        axis.plot(*zip(*found[::every], strict=True), color=COLOURS[index % len(COLOURS)], linewidth=1.5, label=name)
    axis.set_ylabel("learning rate")
    peaks = [max(rate for _, rate in found) for found in rates.values()]
    if min(peaks) > 0 and max(peaks) > 20 * min(peaks):
        axis.set_yscale("log")
