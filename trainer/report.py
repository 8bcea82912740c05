"""report.html: what a job did, in one file that opens from disk with no network.

Pictures and the loss curve lie in the page as data: addresses, there is no script, and a content security policy
forbids everything else, so that no caption or file name in it can fetch or run a thing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from preprocessing.page import Shown, duration, environment, shown
from preprocessing.prepared import PreparedDataset, PreparedItem
from trainer.artifact import Manifest, written_whole
from trainer.config import JobSettings
from trainer.curves import evaluation_curve, loss_curve, series
from trainer.evaluation.summary import Summary

TEMPLATE = "report.html.jinja"
PREVIEW_SIDE, THUMBNAIL_SIDE = 768, 192  # pixels; larger pictures are made smaller for the page
MOST_THUMBNAILS = 300  # keeps the page of a large data set at some 5 MB
MOST_NEIGHBOURS = 4


@dataclass(frozen=True)
class Preview:
    """The same prompt and seed drawn without and with the adapter; `base` is None where it was not drawn."""

    prompt: str
    seed: int
    base: Path | None
    adapted: Path


@dataclass(frozen=True)
class Verdict:
    """How good the weights are. `grid` has, by seed and prompt, the base model's picture and one for each strength;
    `nearest` a sample, the index of the data set's picture it is nearest to, and their distance, nearest first.
    """

    summary: Summary
    strengths: tuple[float, ...]
    grid: dict[int, dict[str, list[Path]]]
    nearest: list[tuple[Path, int, float]]


@dataclass(frozen=True)
class ReportData:
    """What the report tells of: `metrics` are the rows of metrics.jsonl (step, loss, lr/..., images_per_second)."""

    manifest: Manifest
    dataset: PreparedDataset
    metrics: list[dict[str, Any]]
    previews: list[Preview]
    stage_seconds: dict[str, float]
    remarks: tuple[str, ...] = ()  # on what went otherwise than asked
    verdict: Verdict | None = None


def write_report(path: Path, data: ReportData) -> None:
    """Write the report to `path`, whole. Raises FileNotFoundError for a picture that is not there."""
    page = (
        environment(Path(__file__).parent)
        .get_template(TEMPLATE)
        .render(
            manifest=data.manifest,
            dataset=data.dataset,
            facts=_facts(data),
            concepts=_concepts(data),
            previews=_by_prompt(data.previews),
            verdict=_verdict(data) if data.verdict else None,
            curve=loss_curve(data.metrics),
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
    losses = [loss for _, loss in series(data.metrics, "loss")]
    speeds = [speed for _, speed in series(data.metrics, "images_per_second")]
    facts = [("pictures", str(len(data.dataset.items))), ("steps", str(data.manifest.step))]
    if losses:
        tail = losses[-max(1, len(losses) // 10) :]
        facts.append(("loss at the end", f"{sum(tail) / len(tail):.4g}"))
    if speeds:
        facts.append(("pictures a second", f"{median(speeds):.3g}"))
    if data.stage_seconds:
        facts.append(("time in all", duration(sum(data.stage_seconds.values()))))
    return facts


def _concepts(data: ReportData) -> list[dict[str, Any]]:
    """The folders of several concepts; nothing where there is one."""
    dataset, tokens = data.dataset, data.manifest.special_params
    total = sum(one.weight for one in dataset.concepts)
    return [
        {
            "triggers": one.triggers,
            "class_word": one.class_word,
            "tokens": " and ".join(tokens.get(word, "") for word in one.triggers) if tokens else "",
            "folder": one.folder,
            "pictures": len({item.source for item in dataset.items if item.concept == number}),
            "share": one.weight / total,
        }
        for number, one in enumerate(dataset.concepts)
    ]


def _by_prompt(previews: list[Preview]) -> dict[str, list[tuple[int, Shown | None, Shown]]]:
    """Per prompt the seed, the base model's picture and the adapted one, all in the given order."""
    grouped: dict[str, list[tuple[int, Shown | None, Shown]]] = {}
    for one in previews:
        base = shown(one.base, PREVIEW_SIDE) if one.base else None
        grouped.setdefault(one.prompt, []).append((one.seed, base, shown(one.adapted, PREVIEW_SIDE)))
    return grouped


def _verdict(data: ReportData) -> dict[str, Any]:
    """The judgement as the page shows it."""
    verdict = data.verdict
    near = []
    for sample, index, distance in verdict.nearest[:MOST_NEIGHBOURS]:
        item = data.dataset.items[index]
        own = shown(data.dataset.folder / item.image, THUMBNAIL_SIDE)
        near.append((shown(sample, THUMBNAIL_SIDE), own, item, distance))
    return {
        "summary": verdict.summary,
        "curve": evaluation_curve(verdict.summary),
        "strengths": verdict.strengths,
        "grid": {
            seed: {prompt: [shown(path, PREVIEW_SIDE) for path in row] for prompt, row in rows.items()}
            for seed, rows in verdict.grid.items()
        },
        "nearest": near,
    }


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
