"""Do conditions learn? `python -m benchmarks.condition_learning --out results.json [--run canny fill ...]`

For each way in RUNS the real job trains method condition on drawn scenes, a bounded number of steps, and the toybox's
judges say how far the pictures obey a condition that was not trained on, beside the base model without the adapter.
Told too are the tokens that a step computes of a picture, and the median seconds of a step. `--costs` stops after a few
steps and judges nothing. A result that `--out` holds already is not made again; the drawn archives are left beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.runs import FEW, keep, read_kept
from benchmarks.scenes import write_scenes
from benchmarks.step import Clock
from trainer import commandline

if TYPE_CHECKING:
    from trainer.generate import Generator

PICTURES = 1000
SCENES_SEED = 60_001
FILL: dict[str, Any] = {"condition_tasks": ["fill"], "caption_dropout": 1.0}  # what is known is to tell, not the words
RUNS: dict[str, dict[str, Any]] = {
    "canny": {"condition_tasks": ["canny"]},
    "canny, no words": {"condition_tasks": ["canny"], "caption_dropout": 1.0},
    "fill": FILL,
    "fill, tokens integrated": FILL | {"token_integration": True},
    "canny, keys and values stored": {"condition_tasks": ["canny"], "independent_condition": True},
    "canny, compact": {"condition_tasks": ["canny"], "condition_resolution": 32},
}
FIXED: dict[str, Any] = {
    "method": "condition",
    "captioner": "none",
    "lora_rank": 32,
    "optimizer": "muon",
    "learning_rate": 4e-3,
    "train_batch_size": 8,
    "max_train_steps": 1500,
    "caption_dropout": 0.1,
    "image_dropout": 0.05,
    "preview_prompts": ["a red star"],
    "holdout": 0,
    "report_to": "none",
}


def tokens(generator: Generator, chosen: dict[str, Any]) -> int:
    """The tokens of text, picture and condition that a step computes of one picture."""
    side = generator.geometry.resolution // generator.family.pixels_per_token
    shown = chosen.get("condition_resolution", generator.geometry.resolution) // generator.family.pixels_per_token
    of_condition = 0 if chosen.get("token_integration") else shown**2  # else known ones are the condition alone
    return generator.family.encode_text([""])["context"].shape[1] + side**2 + of_condition


def train(base_model: str, name: str, kept: Path, pictures: int) -> dict[str, Any]:
    """Train one way and judge it by that many pictures; with 0 stop after a few steps."""
    from toybox.condition_score import score_condition
    from trainer import job
    from trainer.config import JobSettings
    from trainer.generate import Generator

    chosen = FIXED | RUNS[name] | ({} if pictures else {"max_train_steps": FEW})
    with tempfile.TemporaryDirectory(prefix="condition-") as folder:
        archive = Path(folder) / "scenes.zip"
        write_scenes(archive, PICTURES, SCENES_SEED)
        places = {"base_model": base_model, "input_images": archive, "output_dir": Path(folder) / "out"}
        clock = Clock()
        result = job.train(JobSettings(**chosen | places), progress=clock)
        weights = kept / f"{name.replace(', ', '_').replace(' ', '_')}.tar"
        weights.write_bytes(result.archive.read_bytes())
    generator = Generator(base_model)
    measured = {
        "steps": chosen["max_train_steps"],
        "seconds": result.stage_seconds,
        "tokens": tokens(generator, chosen),
        "step_seconds": clock.step_seconds(),
    }
    if pictures:
        measured["scores"] = score_condition(generator, weights, pictures, told=chosen["caption_dropout"] < 1)
    return measured


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown, before each what the base model draws for the same prompts."""
    columns = next((list(one["scores"]["with"]) for one in results.values() if "scores" in one), [])
    lines = [
        f"| {' | '.join(['trained', 'steps', 'tokens', 'seconds a step', *columns])} |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for name, one in results.items():
        after = [""] * len(columns)
        if "scores" in one:
            before, after = ([f"{100 * one['scores'][row][c]:.1f} %" for c in columns] for row in ("without", "with"))
            lines.append(f"| {' | '.join([f'nothing, for {name}', '', '', '', *before])} |")
        cells = [name, str(one["steps"]), str(one["tokens"]), f"{one['step_seconds']:.2f}"]
        lines.append(f"| {' | '.join([*cells, *after])} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON that results are kept in")
    parser.add_argument("--base_model", default="toybox/flux", help="as in train.py (default toybox/flux)")
    parser.add_argument("--run", nargs="+", choices=RUNS, default=list(RUNS), help="ways of training (default all)")
    parser.add_argument("--pictures", type=int, default=48, help="how many are judged (default 48)")
    parser.add_argument("--costs", action="store_true", help=f"{FEW} steps each, and nothing is judged")
    args = parser.parse_args(argv)
    results = read_kept(args.out)
    for name in args.run:
        key = f"{name} (costs)" if args.costs else name
        if key not in results:
            results[key] = train(args.base_model, name, args.out.parent, 0 if args.costs else args.pictures)
            keep(args.out, results)
            print(table(results), flush=True)
    print(table(results))


if __name__ == "__main__":
    sys.exit(commandline.run(main))
