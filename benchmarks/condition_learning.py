"""Do conditions learn? `python -m benchmarks.condition_learning --out results.json [--run canny fill ...]`

For each way in RUNS the real job trains method condition on drawn scenes, a bounded number of steps, and the toybox's
judges say how far the pictures obey a condition that was not trained on, beside the base model without the adapter.
A result that `--out` holds already is not made again; the drawn archives are left beside it.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.runs import keep, read_kept
from trainer import commandline

PICTURES = 240
SCENES_SEED = 60_001
RUNS: dict[str, dict[str, Any]] = {
    "canny": {"condition_tasks": ["canny"]},
    "fill": {"condition_tasks": ["fill"]},
    "fill, tokens integrated": {"condition_tasks": ["fill"], "token_integration": True},
    "canny, keys and values stored": {"condition_tasks": ["canny"], "independent_condition": True},
    "canny, compact": {"condition_tasks": ["canny"], "condition_resolution": 32},
}
FIXED: dict[str, Any] = {
    "method": "condition",
    "captioner": "none",
    "lora_rank": 32,
    "optimizer": "adamw",
    "learning_rate": 2e-3,
    "train_batch_size": 8,
    "max_train_steps": 500,
    "caption_dropout": 1.0,  # the condition alone is to tell
    "image_dropout": 0.05,
    "preview_prompts": ["a red star"],
    "holdout": 0,
    "report_to": "none",
}


def write_scenes(path: Path) -> None:
    """The archive that is trained on: scenes of the drawn world, without captions."""
    from toybox.concept import write_archive
    from toybox.world import random_scene, render

    rng, members = random.Random(SCENES_SEED), {}
    for index in range(PICTURES):
        encoded = io.BytesIO()
        render(random_scene(rng)).save(encoded, "PNG")
        members[f"{index:03}.png"] = encoded.getvalue()
    write_archive(path, members)


def train(base_model: str, name: str, kept: Path, pictures: int) -> dict[str, Any]:
    """Train one way and judge it."""
    from toybox.condition_score import score_condition
    from trainer import job
    from trainer.config import JobSettings
    from trainer.generate import Generator

    with tempfile.TemporaryDirectory(prefix="condition-") as folder:
        archive = Path(folder) / "scenes.zip"
        write_scenes(archive)
        places = {"base_model": base_model, "input_images": archive, "output_dir": Path(folder) / "out"}
        result = job.train(JobSettings(**FIXED | RUNS[name] | places))
        weights = kept / f"{name.replace(', ', '_').replace(' ', '_')}.tar"
        weights.write_bytes(result.archive.read_bytes())
    return {
        "steps": FIXED["max_train_steps"],
        "seconds": result.stage_seconds,
        "scores": score_condition(Generator(base_model), weights, pictures),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown, the base model's own row first."""
    columns = list(next(iter(results.values()))["scores"]["with"])
    lines = [f"| trained | {' | '.join(columns)} | seconds |", "|---" * (len(columns) + 2) + "|"]
    rows = [("nothing", next(iter(results.values()))["scores"]["without"], "")]
    rows += [(name, one["scores"]["with"], f"{one['seconds']['train']:.0f}") for name, one in results.items()]
    for name, row, seconds in rows:
        lines.append(f"| {name} | {' | '.join(f'{100 * row[c]:.1f} %' for c in columns)} | {seconds} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON that results are kept in")
    parser.add_argument("--base_model", default="toybox/flux", help="as in train.py (default toybox/flux)")
    parser.add_argument("--run", nargs="+", choices=RUNS, default=list(RUNS), help="ways of training (default all)")
    parser.add_argument("--pictures", type=int, default=48, help="how many are judged (default 48)")
    args = parser.parse_args(argv)
    results = read_kept(args.out)
    for name in args.run:
        if name not in results:
            results[name] = train(args.base_model, name, args.out.parent, args.pictures)
            keep(args.out, results)
            print(table(results), flush=True)
    print(table(results))


if __name__ == "__main__":
    sys.exit(commandline.run(main))
