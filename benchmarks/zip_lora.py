"""Does a zipped LoRA draw the subject in the style? `python -m benchmarks.zip_lora --out results.json`

The subject is a sprite; the style is to be pale: every colour half as far from white, which can be undone, so that the
toybox's oracle can judge styled pictures too. Both LoRAs are trained by the real job, then joined by `trainer.zip_lora`
with no steps (their sum) and with its own number. For each of SETS 64 pictures of the subject tell:

pale: how many are; subject: in how many of the pale ones, their colours made whole again, the sprite is found, as a
share of all; background and position likewise obeyed; subject, not pale: in how many the sprite is found as it was.

A sprite and seed that `--out` holds are not run again; the archives stay beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.concepts import SPRITES
from benchmarks.judging import SubjectJudge
from benchmarks.runs import keep, read_kept
from benchmarks.scenes import write_scenes
from trainer import commandline

SETS = ("subject", "style", "added", "zipped")
STYLE_PICTURES, STYLE_SEED = 24, 70_001
WHITE, PALE = 255, 100  # no channel of a pale colour is darker, with a margin: (0 + 255) / 2 = 127
DARKEST = 2  # percent of a picture's pixels that may be darker all the same
STYLE: dict[str, Any] = {"method": "lora", "preservation_weight": 0.0, "captioner": "none", "max_train_steps": 200}
SHARED: dict[str, Any] = {"holdout": 0, "report_to": "none", "early_stop": False, "workers": 0}


def paled(picture: Image.Image) -> Image.Image:
    """The picture in the style."""
    return Image.eval(picture, lambda value: (value + WHITE) // 2)


def whole(picture: Image.Image) -> Image.Image:
    """A pale picture in its own colours."""
    return Image.eval(picture, lambda value: max(0, 2 * value - WHITE))


def is_pale(picture: Image.Image) -> bool:
    """Whether hardly any pixel has a dark channel."""
    return bool(np.percentile(np.asarray(picture.convert("RGB")).min(axis=2), DARKEST) >= PALE)


def trained(data: Path, out: Path, settings: dict[str, Any]) -> Path:
    """The archive of weights that the job makes of the data, unless it is there."""
    from trainer import job
    from trainer.config import JobSettings

    if not out.exists():
        folder = out.with_suffix("")
        result = job.train(JobSettings(**SHARED | settings, input_images=data, output_dir=folder))
        out.write_bytes(result.archive.read_bytes())
    return out


def archives(sprite: Path, seed: int, folder: Path) -> dict[str, Path]:
    """The weights of each of SETS, made in the folder."""
    from toybox import concept
    from trainer.zip_lora import ZipSettings, zip_weights

    folder.mkdir(parents=True, exist_ok=True)
    concept.main(["--sprite", str(sprite), "--out", str(folder / "subject.zip")])
    write_scenes(folder / "style.zip", STYLE_PICTURES, STYLE_SEED, paled)
    found = {
        "subject": trained(folder / "subject.zip", folder / "subject.tar", {"seed": seed}),
        "style": trained(folder / "style.zip", folder / "style.tar", STYLE | {"seed": seed}),
    }
    pair = {"weights": found["subject"], "style_weights": found["style"], "seed": seed}
    pair |= {"style_prompt": "a big red star on a plain blue background in the middle"}
    for name, steps in (("added", {"steps": 0}), ("zipped", {})):
        found[name] = folder / f"{name}.tar"
        zip_weights(ZipSettings(**pair | steps, out=found[name]))
    return found


def judged(judge: SubjectJudge, pictures: list[Image.Image]) -> dict[str, float]:
    """The scores of pictures in the judge's order."""
    pale = [is_pale(picture) for picture in pictures]
    empty = Image.new("RGB", pictures[0].size)  # has no subject
    styled = judge.scores([whole(one) if lightened else empty for one, lightened in zip(pictures, pale, strict=True)])
    as_drawn = judge.scores([empty if lightened else one for one, lightened in zip(pictures, pale, strict=True)])
    return {
        "pale": sum(pale) / len(pale),
        **{name: styled[name] for name in ("subject", "background", "position")},
        "subject, not pale": as_drawn["subject"],
    }


def measure(sprite: Path, seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """The scores of each of SETS."""
    weights, judge, results = archives(sprite, seed, folder), SubjectJudge(sprite), {}
    for name in SETS:
        judge.generator.use(weights[name])
        results[name] = judged(judge, judge.draw())
    return results


def table(runs: dict[str, dict[str, dict[str, float]]]) -> str:
    """The means over the runs in Markdown, a row for each of SETS."""
    columns = list(next(iter(runs.values()))[SETS[0]])
    lines = [f"| weights | runs | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name in SETS:
        means = [sum(run[name][column] for run in runs.values()) / len(runs) for column in columns]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(f'{value:.2f}' for value in means)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON that results are kept in")
    parser.add_argument(
        "--sprite", type=Path, nargs="+", default=SPRITES[:1], help="RGBA drawings (default: the robot)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs with seeds 0, 1, ... (default 1)")
    args = parser.parse_args(argv)
    runs = read_kept(args.out)
    wanted = {f"{sprite.stem}/{seed}": (sprite, seed) for seed in range(args.seeds) for sprite in args.sprite}
    for key in (key for key in wanted if key not in runs):
        runs[key] = measure(*wanted[key], args.out.with_suffix("") / key)
        keep(args.out, runs)
    print(table(runs))


if __name__ == "__main__":
    sys.exit(commandline.run(main))
