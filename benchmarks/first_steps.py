"""Does a run destroy what the base model can before it learns? `python -m benchmarks.first_steps --out results.json`

The real job by variants of benchmarks.concepts, stopped after the last of STEPS; the oracle judges what the weights of
each of STEPS draw: how often the subject is found, and the prompt's background and position obeyed. A variant that
`--out` holds is not run again. Likeness is how well the subject fits where it fits best.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.concepts import CHOSEN, SPRITES, VARIANTS, settings_of
from benchmarks.evaluation import scores
from benchmarks.runs import keep, read_kept
from trainer import commandline

STEPS = (10, 25, 50, 100)
COLUMNS = ("subject", "likeness", "background", "position")
EVERY = 5  # divides each of STEPS: a job keeps the weights that it evaluates


class Enough(Exception):
    """The steps that are looked at have been made."""


def stop_after(stage: str, done: int, total: int) -> None:
    """A job's progress callback that ends it."""
    if stage == "train" and done > STEPS[-1]:
        raise Enough


def measure(variant: str, sprite: Path) -> dict[int, dict[str, float]]:
    """The scores by step."""
    from toybox import concept
    from trainer import job
    from trainer.config import JobSettings

    with tempfile.TemporaryDirectory(prefix="first-steps-") as name:
        folder = Path(name)
        concept.main(["--sprite", str(sprite), "--out", str(folder / "data.zip")])
        fixed = {"input_images": folder / "data.zip", "output_dir": folder / "out", "holdout": 0, "report_to": "none"}
        fixed |= {"evaluate_every": EVERY, "keep_evaluated": True, "early_stop": False, "workers": 0}
        try:
            job.train(JobSettings(**fixed | settings_of(variant)), progress=stop_after)
        except Enough:
            return scores(sprite, folder / "out" / "weights", STEPS)
    raise RuntimeError(f"the job ended before step {STEPS[-1]}")


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [f"| variant | step | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for variant, by_step in results.items():
        for step, found in by_step.items():
            lines.append(f"| {variant} | {step} | {' | '.join(f'{found[name]:.2f}' for name in COLUMNS)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON that results are kept in")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=[CHOSEN], metavar="VARIANT")
    parser.add_argument("--sprite", type=Path, default=SPRITES[0], help="an RGBA drawing (default: the robot)")
    args = parser.parse_args(argv)
    results = read_kept(args.out)
    for variant in (name for name in args.variant if name not in results):
        results[variant] = measure(variant, args.sprite)
        keep(args.out, results)
    print(table(results))


if __name__ == "__main__":
    sys.exit(commandline.run(main))
