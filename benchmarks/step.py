"""Speed and memory of a training job: `python benchmarks/step.py --steps 40 [--json]`.

Runs a short job on pictures made from a demo sprite, in this process, and prints images/s, peak memory and the seconds
of each stage beside the machine's name.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 5  # steps whose speed is not counted: first allocations, first kernels
MIB = 2**20


def machine() -> dict[str, Any]:
    """The machine in words: CPU, cores this process may use, threads, GPU, torch."""
    import torch

    cpu = platform.processor() or platform.machine()
    described = Path("/proc/cpuinfo")
    if described.exists():
        names = [line.partition(":")[2].strip() for line in described.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
    }


def peak_memory() -> dict[str, float]:
    """Most memory held so far, in MiB: the process's, and the GPU's where there is one."""
    import torch

    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB}
    if torch.cuda.is_available():
        peak["gpu_mib"] = torch.cuda.max_memory_allocated() / MIB
    return peak


class Clock:
    """A job's progress callback that notes when each training step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "train" and done:
            self.ends.append(time.perf_counter())

    def step_seconds(self) -> float:
        """Median over the steps after the warm-up."""
        return statistics.median(after - before for before, after in itertools.pairwise(self.ends[WARM_UP - 1 :]))


def measure(settings: dict[str, Any], pictures: int) -> dict[str, Any]:
    """Train on `pictures` pictures with `settings` (fields of JobSettings) and give back the figures."""
    from trainer import job
    from trainer.commandline import check
    from trainer.config import JobSettings

    sprite = min((ROOT / "toybox" / "sprites").glob("*.png"))
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "data.zip"
        command = [
            sys.executable,
            "-m",
            "toybox.concept",
            "--sprite",
            sprite,
            "--count",
            str(pictures),
            "--out",
            archive,
        ]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        places = {"input_images": archive, "output_dir": Path(folder) / "job"}
        chosen, clock = job.fill(check(JobSettings, settings | places)), Clock()
        result = job.train(chosen, progress=clock)
        names = ("base_model", "method", "resolution", "max_train_steps", "train_batch_size", "lora_rank")
        return {
            "settings": {name: getattr(chosen, name) for name in names},
            "machine": machine(),
            "images_per_second": chosen.train_batch_size / clock.step_seconds(),
            "peak": peak_memory(),
            "stage_seconds": dict(result.stage_seconds),
        }


def table(figures: dict[str, Any]) -> str:
    """The figures for people."""
    rows = [(name, str(value)) for name, value in (figures["machine"] | figures["settings"]).items()]
    rows.append(("images/s", f"{figures['images_per_second']:.2f}"))
    rows += [(f"peak, {name.removesuffix('_mib')}", f"{value:.0f} MiB") for name, value in figures["peak"].items()]
    rows += [(f"stage {name}", f"{seconds:.2f} s") for name, seconds in figures["stage_seconds"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def main(argv: list[str]) -> None:
    """The command line. Raises UserError for settings that do not fit."""
    parser = argparse.ArgumentParser(description="Speed and memory of a short training job.")
    parser.add_argument("--base_model", default="toybox")
    parser.add_argument("--method", default="pivotal")
    parser.add_argument("--steps", type=int, default=40, help=f"more than {WARM_UP}, which are not counted")
    parser.add_argument("--batch", type=int, default=None, help="pictures a step; else what suits the base model")
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of the table")
    args = parser.parse_args(argv)
    if args.steps <= WARM_UP:
        parser.error(f"--steps should be more than {WARM_UP}")
    settings = {"base_model": args.base_model, "method": args.method, "max_train_steps": args.steps}
    if args.batch is not None:
        settings["train_batch_size"] = args.batch
    figures = measure(settings, args.pictures)
    print(json.dumps(figures) if args.json else table(figures))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # so that it also runs as a file
    from trainer.commandline import run

    sys.exit(run(main))
