"""Runs that a benchmark keeps, so that it may be stopped and goes on; each may have a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
FEW = 12  # steps where costs alone are asked for


def read_kept(path: Path) -> dict[str, Any]:
    """The runs that the JSON file holds by name; none where there is no file yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def keep(path: Path, runs: dict[str, Any]) -> None:
    """Write the runs whole or not at all."""
    whole = path.with_name(path.name + ".tmp")
    whole.write_text(json.dumps(runs, indent=1), encoding="utf-8")
    os.replace(whole, path)


def run_apart(module: str, options: list[str | Path]) -> Any:
    """What `python -m MODULE --out FILE OPTIONS` leaves in the file, run on one thread: no run takes another's memory.

    Raises CalledProcessError where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        single = Path(folder) / "one.json"
        command = [sys.executable, "-m", module, "--out", single, *options]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return json.loads(single.read_text(encoding="utf-8"))


def run_missing(path: Path, module: str, options: dict[str, list[str | Path]], jobs: int) -> dict[str, Any]:
    """All runs that the JSON file holds, after those that `options` name and it lacks: `jobs` at a time, each kept as
    soon as it is there. Where one fails, those that have begun are still kept, and CalledProcessError is raised.
    """
    runs = read_kept(path)
    missing = {key: given for key, given in options.items() if key not in runs}
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(run_apart, module, given): key for key, given in missing.items()}
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


def weight_files(output: Path) -> list[Path]:
    """The files of weights that a job's folder of results ended with."""
    return sorted((output / "weights" / "last").glob("*.safetensors"))


def trained_numbers(output: Path) -> int:
    """How many numbers those files hold."""
    from trainer import artifact

    return sum(value.numel() for path in weight_files(output) for value in artifact.load_tensors(path)[0].values())


def adapter_scores(archive: Path, sprite: Path) -> dict[str, Any]:
    """What `toybox.score adapter` says of an archive's weights."""
    command = [sys.executable, "-m", "toybox.score", "adapter", "--weights", archive, "--sprite", sprite]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])
