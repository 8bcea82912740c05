"""Is the step that a job delivers a good one? `python -m benchmarks.evaluation --out results.json [--sprite X.png ...]`

For each sprite, and each way of training in RUNS, the real job trains on drawn pictures and keeps the weights of every
evaluation; the toybox's oracle then scores all of them. A table compares the delivered step with the last one and with
the best in hindsight. A result that `--out` holds already is not made again.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.judging import SubjectJudge
from benchmarks.runs import ROOT, keep, read_kept
from preprocessing.errors import UserError
from trainer import commandline

SPRITES = ROOT / "toybox" / "sprites"
SCORED = ("subject", "background", "position")
RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    # far too long at a rate that never falls, with nothing that holds the base model
    "overtrained": {"lr_schedule": "constant", "preservation_weight": 0.0, "max_train_steps": 900, "early_stop": False},
    "overtrained, early stop": {"lr_schedule": "constant", "preservation_weight": 0.0, "max_train_steps": 900},
    "learning rate 0": {"learning_rate": 0.0, "text_embedding_lr": 0.0, "max_train_steps": 40},
}


def train(sprite: Path, name: str, folder: Path) -> dict[str, Any]:
    """Train one way and judge every kept step; {"failed": the job's sentence} where it ended in an error."""
    from toybox import concept
    from trainer import job
    from trainer.config import JobSettings

    archive = folder / "data.zip"
    concept.main(["--sprite", str(sprite), "--out", str(archive)])
    fixed = {"input_images": archive, "output_dir": folder / "out", "keep_evaluated": True, "report_to": "none"}
    try:
        result = job.train(JobSettings(**fixed | RUNS[name]))
    except UserError as error:
        return {"failed": str(error)}
    summary = result.summary
    return {
        "delivered_step": summary.delivered_step,
        "last_step": summary.last_step,
        "overfitted": summary.overfitted,
        "sentences": summary.sentences(),
        "curve": {one.step: one.gain.model_dump() for one in summary.curve},
        "judging_share": summary.share,
        "seconds": result.stage_seconds,
        "scores": scores(sprite, folder / "out" / "weights"),
    }


def scores(sprite: Path, weights: Path, steps: Collection[int] = ()) -> dict[int, dict[str, float]]:
    """What the oracle says of the weights of each step that was kept, or of those named."""
    judge, found = SubjectJudge(sprite), {}
    kept = {int(match[1]): path for path in weights.iterdir() if (match := re.fullmatch(r"step_(\d+)", path.name))}
    for step, path in sorted((step, path) for step, path in kept.items() if not steps or step in steps):
        judge.generator.use(path)
        found[step] = judge.scores(judge.draw())
    return found


def total(score: dict[str, float]) -> float:
    """One number: the mean of subject, background and position."""
    return sum(score[name] for name in SCORED) / len(SCORED)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [
        "| sprite | run | delivered step | its score | last step's | best in hindsight | said to be | judging |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, result in results.items():
        sprite, name = key.split("/")
        if "failed" in result:
            lines.append(f"| {sprite} | {name} | none: “{result['failed'].partition(':')[0]}” | | | | | |")
            continue
        judged = {int(step): score for step, score in result["scores"].items()}
        best = max(judged, key=lambda step: total(judged[step]))
        picked, last = judged[result["delivered_step"]], judged[result["last_step"]]
        told = "overfitted" if result["overfitted"] else "sound"
        lines.append(
            f"| {sprite} | {name} | {result['delivered_step']} of {result['last_step']} "
            f"| {total(picked):.3f} (subject {picked['subject']:.2f}) | {total(last):.3f} "
            f"| {total(judged[best]):.3f} (step {best}) | {told} | {100 * result['judging_share']:.0f} % |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON that results are kept in")
    parser.add_argument("--sprite", type=Path, nargs="+", default=sorted(SPRITES.glob("*.png")), help="RGBA drawings")
    parser.add_argument("--run", nargs="+", choices=RUNS, default=["default"], help="ways of training")
    args = parser.parse_args(argv)
    results = read_kept(args.out)
    for sprite in args.sprite:
        for name in args.run:
            key = f"{sprite.stem}/{name}"
            if key not in results:
                with tempfile.TemporaryDirectory(prefix="evaluation-") as folder:
                    results[key] = train(sprite, name, Path(folder))
                keep(args.out, results)
    print(table(results))


if __name__ == "__main__":
    sys.exit(commandline.run(main))
