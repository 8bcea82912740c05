"""The captioner of the package salesforce-lavis, which cannot live beside today's transformers: it runs as a child
process in an environment of its own, made by `sh setup_lavis.sh`.

A picture on which the child dies or hangs is asked for again alone; if that fails too it is left without a caption.
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocessing.captioners.base import Lines, OnProgress
from preprocessing.captioners.worker import JsonWorker, WorkerFailed
from preprocessing.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-lavis" / "bin" / "python"
SCRIPT = Path(__file__).with_name("lavis_worker.py")
SETUP = "sh setup_lavis.sh"
MODEL = "large_coco"
MOST_FAILURES = 3  # pictures in a row: then it is not the pictures' fault


@dataclass(frozen=True)
class LavisSource:
    """The environment's Python, the model (one of LAVIS's names or a .yaml of one's own) and how long to wait, in s.

    `folder` is where it runs: of a folder bert-base-uncased there LAVIS takes its vocabulary.
    """

    python: Path = PYTHON
    model: str = MODEL
    script: Path = SCRIPT
    folder: Path = ROOT
    start_timeout: float = 900.0  # the first start downloads the model
    timeout: float = 120.0  # a batch


class LavisCaptioner:
    """LAVIS's `blip_caption`, greedy. Holds a process: close it."""

    batch_size = 8

    def __init__(self, source: LavisSource):
        if not source.python.is_file():
            raise UserError(
                f"captioner lavis has no environment at {source.python.parent.parent}: make it with `{SETUP}`, "
                "or use captioner blip, which gives the same captions."
            )
        self._source = source
        self._worker = self._started()
        self._failed = 0

    def _started(self) -> JsonWorker:
        source = self._source
        # -P: the script's folder is this package, whose modules must not be taken for others
        command = [source.python, "-P", source.script, "--model", source.model]
        try:
            return JsonWorker(command, source.folder, source.start_timeout)
        except WorkerFailed as error:
            raise UserError(
                f"captioner lavis cannot be used: its process {error}; make its environment anew with `{SETUP}`, "
                "or use captioner blip."
            ) from error

    def caption(self, pictures: Sequence[Image.Image], on_progress: OnProgress) -> Lines:
        lines: Lines = []
        while len(lines) < len(pictures):
            batch = [pictures[i] for i in range(len(lines), min(len(lines) + self.batch_size, len(pictures)))]
            said = self._batch(batch)
            lines += said
            on_progress(said)
        return lines

    def _batch(self, pictures: list[Image.Image]) -> Lines:
        try:
            return self._say(pictures)
        except WorkerFailed as error:
            self.close()
            self._worker = self._started()
            if len(pictures) > 1:
                return [line for picture in pictures for line in self._batch([picture])]
            self._failed += 1
            if self._failed >= MOST_FAILURES:
                raise UserError(
                    f"captioner lavis failed on {self._failed} pictures in a row; its process {error}; "
                    "use captioner blip, or caption the pictures yourself."
                ) from error
            print(f"lavis: a picture stays without a caption, its process {error}", file=sys.stderr)
            return [None]

    def _say(self, pictures: list[Image.Image]) -> Lines:
        answer = self._worker.ask({"pictures": [_packed(picture) for picture in pictures]}, self._source.timeout)
        self._failed = 0
        return [_line(one) for one in answer["captions"]]

    def close(self) -> None:
        """End the process, the only sure way to have its memory back."""
        self._worker.close()


def _packed(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def _line(answer: dict[str, Any]) -> str | None:
    if "error" in answer:
        print(f"lavis: a picture stays without a caption: {answer['error']}", file=sys.stderr)
    return answer.get("caption")
