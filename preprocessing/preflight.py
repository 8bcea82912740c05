"""The pre-flight report of a prepared data set: dataset.json for programs, report.html for people, in its folder.

Like the job's report the page opens from disk with no network: pictures lie in it, and there is no script.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from preprocessing.findings import Findings
from preprocessing.page import Shown, environment, shown
from preprocessing.prepared import PreparedDataset, PreparedItem

REPORT, DATASET = "report.html", "dataset.json"
TEMPLATE = "preflight.html.jinja"
THUMBNAIL_SIDE = 192
MOST_THUMBNAILS = 300  # keeps the page of a large data set at some megabytes
MOST_ROWS = 2000  # of the table of files; dataset.json holds all
UNMASKED = 0.25  # brightness of what lies outside a mask in its preview


def write_preflight(dataset: PreparedDataset, findings: Findings) -> Path:
    """Write both files into the data set's folder, whole; returns the report's path."""
    warned = {file.source: file.warnings for file in findings.files}
    page = (
        environment(Path(__file__).parent)
        .get_template(TEMPLATE)
        .render(
            dataset=dataset,
            findings=findings,
            most_rows=MOST_ROWS,
            thumbnails=[
                (item, shown(dataset.folder / item.image, THUMBNAIL_SIDE), _masked(dataset, item), warned[item.source])
                for item in dataset.items[:MOST_THUMBNAILS]
            ],
        )
    )
    _write(dataset.folder / DATASET, findings.model_dump_json(indent=2))
    _write(dataset.folder / REPORT, page)
    return dataset.folder / REPORT


def _masked(dataset: PreparedDataset, item: PreparedItem) -> Shown | None:
    """The crop as the loss sees it: dark where it does not count."""
    if item.mask is None:
        return None
    with Image.open(dataset.folder / item.image) as opened, Image.open(dataset.folder / item.mask) as mask:
        picture = opened.convert("RGB")
        dark = picture.point(lambda value: round(value * UNMASKED))
        return shown(Image.composite(picture, dark, mask.convert("L")), THUMBNAIL_SIDE)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    # A file name of an archive may hold bytes that are no text.
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    temporary.replace(path)
