"""report.html: what a job did, in one file that opens from disk with no network.

Pictures and the loss curve lie in the page as data: addresses, there is no script, and a content security policy
forbids everything else, so that no caption or file name in it can fetch or run a thing.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from preprocessing.page import Shown, address, duration, environment, shown
from preprocessing.prepared import PreparedDataset, PreparedItem
from trainer.artifact import Manifest, written_whole
from trainer.config import JobSettings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = "report.html.jinja"
PREVIEW_SIDE, THUMBNAIL_SIDE = 768, 192  # pixels; larger pictures are made smaller for the page
MOST_THUMBNAILS = 300  # keeps the page of a large data set at some 5 MB
MOST_POINTS = 2000  # of a curve
# Mid tones, so that the one picture of the curve reads on a light page and on a dark one.
INK, COLOURS = "#878d96", ("#3b82f6", "#f97316", "#22a06b", "#a855f7")


@dataclass(frozen=True)
class Preview:
    """The same prompt and seed drawn without and with the adapter; `base` is None where it was not drawn."""

    prompt: str
    seed: int
    base: Path | None
    adapted: Path


@dataclass(frozen=True)
class ReportData:
    """What the report tells of: `metrics` are the rows of metrics.jsonl (step, loss, lr/..., images_per_second)."""

    manifest: Manifest
    dataset: PreparedDataset
    metrics: list[dict[str, Any]]
    previews: list[Preview]
    stage_seconds: dict[str, float]
    remarks: tuple[str, ...] = ()  # on what went otherwise than asked


def write_report(path: Path, data: ReportData) -> None:
    """Write the report to `path`, whole. Raises FileNotFoundError for a picture that is not there."""
    page = (
        environment(Path(__file__).parent)
        .get_template(TEMPLATE)
        .render(
            manifest=data.manifest,
            dataset=data.dataset,
            facts=_facts(data),
            previews=_by_prompt(data.previews),
            curve=_curve(data.metrics),
            stages=data.stage_seconds,
            remarks=data.remarks,
            thumbnails=[(item, *_thumbnail(data.dataset, item)) for item in data.dataset.items[:MOST_THUMBNAILS]],
            settings=_settings(data.manifest),
        )
    )
    with written_whole(path) as temporary:
        # A file name of an archive may hold bytes that are no text.
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")


def _facts(data: ReportData) -> list[tuple[str, str]]:
    """The figures at the head of the page."""
    losses = [loss for _, loss in _series(data.metrics, "loss")]
    speeds = [speed for _, speed in _series(data.metrics, "images_per_second")]
    facts = [("pictures", str(len(data.dataset.items))), ("steps", str(data.manifest.step))]
    if losses:
        tail = losses[-max(1, len(losses) // 10) :]
        facts.append(("loss at the end", f"{sum(tail) / len(tail):.4g}"))
    if speeds:
        facts.append(("pictures a second", f"{median(speeds):.3g}"))
    if data.stage_seconds:
        facts.append(("time in all", duration(sum(data.stage_seconds.values()))))
    return facts


def _by_prompt(previews: list[Preview]) -> dict[str, list[tuple[int, Shown | None, Shown]]]:
    """Per prompt the seed, the base model's picture and the adapted one, all in the given order."""
    grouped: dict[str, list[tuple[int, Shown | None, Shown]]] = {}
    for one in previews:
        base = shown(one.base, PREVIEW_SIDE) if one.base else None
        grouped.setdefault(one.prompt, []).append((one.seed, base, shown(one.adapted, PREVIEW_SIDE)))
    return grouped


def _thumbnail(dataset: PreparedDataset, item: PreparedItem) -> tuple[Shown, str]:
    """The picture as it was trained on, and what was done to the original."""
    steps = ["{}×{}".format(*item.original_size)]
    if item.resized_size != item.original_size:
        steps.append("resized to {}×{}".format(*item.resized_size))
    if item.size != item.resized_size:
        steps.append("cut to {}×{} at ({}, {})".format(*item.size, *item.crop))
    if item.mask:
        steps.append("masked")
    return shown(dataset.folder / item.image, THUMBNAIL_SIDE), ", ".join(steps)


def _settings(manifest: Manifest) -> list[tuple[str, str, str]]:
    """Name, value and meaning of each setting."""
    rows = []
    for name, value in manifest.settings.items():
        field = JobSettings.model_fields.get(name)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        rows.append((name, text, field.description or "" if field else ""))
    return rows


def _series(metrics: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have a finite value of that name."""
    found = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
    return [(step, value) for step, value in found if math.isfinite(value)]


def _curve(metrics: list[dict[str, Any]]) -> str | None:
    """Loss and learning rates over the steps as the address of an SVG picture; None where no loss was recorded."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    loss = _series(metrics, "loss")
    if not loss:
        return None
    names = sorted({key for row in metrics for key in row if key.startswith("lr/")})
    rates = {name.removeprefix("lr/"): series for name in names if (series := _series(metrics, name))}
    with rc_context({"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "svg.hashsalt": "report"}):
        figure = Figure(figsize=(8.5, 4.6 if rates else 3.0), layout="constrained")
        axes = figure.subplots(2 if rates else 1, sharex=True, squeeze=False, height_ratios=[2, 1][: 1 + bool(rates)])
        _draw_loss(axes[0, 0], loss)
        if rates:
            _draw_rates(axes[1, 0], rates)
        axes[-1, 0].set_xlabel("step")
        for axis in axes[:, 0]:
            axis.tick_params(colors=INK)
            axis.grid(color=INK, alpha=0.25, linewidth=0.6)
            axis.set_facecolor("none")
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, fontsize="small")
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return address("image/svg+xml", drawn.getvalue())


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
    for index, (name, series) in enumerate(rates.items()):
        every = -(-len(series) // MOST_POINTS)
        axis.plot(*zip(*series[::every], strict=True), color=COLOURS[index % len(COLOURS)], linewidth=1.5, label=name)
    axis.set_ylabel("learning rate")
    peaks = [max(rate for _, rate in series) for series in rates.values()]
    if min(peaks) > 0 and max(peaks) > 20 * min(peaks):
        axis.set_yscale("log")
