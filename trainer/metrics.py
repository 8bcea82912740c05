"""What a run says while it goes: a progress bar, metrics.jsonl, tensorboard or wandb, and a caller's callback."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; an unfinished last line (the run was killed) is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _as_json(row: dict[str, Any]) -> str:
    """A row as strict JSON, which knows no NaN: null stands for what is not finite."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False)


class Metrics:
    """Reports every optimiser step from `span[0]` to `span[1]`, on the first process only.

    The trackers hear only of the run without a name, which is the job's own.
    """

    def __init__(self, path: Path, accelerator: Any, span: tuple[int, int], name: str = ""):
        first_step, steps = span
        self._accelerator, self._tracked = accelerator, not name
        self._active = accelerator.is_main_process
        self._started, self._first, self._steps = time.monotonic(), first_step, steps
        self._file = None
        if self._active:
            kept = [row for row in read_metrics(path) if row["step"] <= first_step] if first_step else []
            path.write_text("".join(_as_json(row) + "\n" for row in kept), encoding="utf-8")
            self._file = path.open("a", encoding="utf-8")
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            desc=name or "train",
            disable=not self._active,
            mininterval=1.0,
            dynamic_ncols=True,
        )

    def step(self, step: int, pictures: int, values: dict[str, float]) -> dict[str, float]:
        """Report one finished step of `pictures` pictures; returns the row, speed and time left with it."""
        seconds = time.monotonic() - self._started
        done = step - self._first
        row = {
            "step": step,
            **values,
            "images_per_second": round(done * pictures / seconds, 3),
            "eta_s": round(seconds / done * (self._steps - step), 1),
        }
        if self._active:
            self._file.write(_as_json(row) + "\n")
            self._file.flush()
            rates = {name: f"{value:.1e}" for name, value in values.items() if name.startswith("lr/")}
            speed = {"img/s": f"{row['images_per_second']:.1f}"}
            self._bar.set_postfix({"loss": f"{values['loss']:.4f}"} | rates | speed, refresh=False)
            self._bar.update()
        if self._tracked:
            self._accelerator.log({name: value for name, value in row.items() if name != "step"}, step=step)
        return row

    def close(self) -> None:
        self._bar.close()
        if self._file:
            self._file.close()
