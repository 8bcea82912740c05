"""Runs that a benchmark keeps, so that it may be stopped and goes on; several at a time."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
FEW = 12  # steps where costs alone are asked for
Work = Callable[..., Any]  # a function at the top of its module


def read_kept(path: Path) -> dict[str, Any]:
    """The runs that the JSON file holds by name; none where there is no file yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def keep(path: Path, runs: dict[str, Any]) -> None:
    """Write the runs whole or not at all."""
    whole = path.with_name(path.name + ".tmp")
    whole.write_text(json.dumps(runs, indent=1), encoding="utf-8")
    os.replace(whole, path)


def run_missing(path: Path, work: Work, given: dict[str, tuple[Any, ...]], jobs: int, apart: bool) -> dict[str, Any]:
    """All runs that the JSON file holds, after those that `given` names with `work`'s arguments and it lacks: `jobs` at
    a time, each kept as soon as it is there.

    Each is made on one thread in a process beside this one, with `apart` in one of its own, so that none takes
    another's memory. Where one fails, those that have begun are still kept, and its error is raised.
    """
    runs = read_kept(path)
    missing = {key: arguments for key, arguments in given.items() if key not in runs}
    beside = get_context("spawn")
    with ProcessPoolExecutor(jobs, beside, _on_one_thread, max_tasks_per_child=1 if apart else None) as pool:
        waiting = {pool.submit(work, *arguments): key for key, arguments in missing.items()}
        failed: list[BaseException] = []
        bar = tqdm(as_completed(waiting), total=len(waiting), desc="runs", file=sys.stderr)
        for done in bar:
            if done.cancelled():
                continue
            if error := done.exception():
                failed.append(error)
                pool.shutdown(wait=False, cancel_futures=True)
                continue
            runs[waiting[done]] = done.result()
            keep(path, runs)
            bar.set_postfix_str(waiting[done])
    if failed:
        raise failed[0]
    return runs


def _on_one_thread() -> None:
    import torch

    Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def _end_with_parent() -> None:
    """Nobody would keep the run of a benchmark that was killed."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def weight_files(output: Path) -> list[Path]:
    """The files of weights that a job's folder of results ended with."""
    return sorted((output / "weights" / "last").glob("*.safetensors"))


def trained_numbers(output: Path) -> int:
    """How many numbers those files hold."""
    from trainer import artifact

    return sum(value.numel() for path in weight_files(output) for value in artifact.load_tensors(path)[0].values())
