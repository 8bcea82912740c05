"""How good the toybox's base model, or an adapter trained on it, is: judged by the oracle, never by eye.

python -m toybox.score base                                                  the base model on 200 fixed prompts
python -m toybox.score adapter --weights trained_model.tar --sprite X.png    an adapter of a sprite: one JSON line
python -m toybox.score condition --weights trained_model.tar                 what a condition picture tells: two rows
python -m toybox.score oracle                                                how far the judges can be trusted
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from preprocessing.errors import UserError
from toybox.calibration import blurred, damages, finder_rates, oracle_rates
from toybox.captions import caption, compose
from toybox.concept import Pasted, plan
from toybox.drawings import random_drawing
from toybox.finder import Finder
from toybox.oracle import agreement, fit_ground, look, nearest_position, object_centre, pixels_of
from toybox.prompts import base_scenes, picture_seeds, unrelated_scenes
from toybox.sprite import load_sprite
from toybox.world import Scene, held_out
from trainer import commandline

if TYPE_CHECKING:
    from trainer.generate import Generator

SPRITES = Path(__file__).parent / "sprites"
ATTRIBUTES = ("shape", "colour", "background", "position")
MIN_ADAPTER_PICTURES = 64
PLAN_SEED = 40_001  # of the backgrounds and positions that an adapter is asked for
CALIBRATION_SEED = 50_001
Pictures = list[Image.Image]
Draw = Callable[[list[str]], Pictures]
Table = dict[str, dict[str, float]]


def drawing_with(generator: Generator, **drawn: Any) -> Draw:
    """Drawing one picture per prompt, the i-th always with the same seed, with whatever the generator holds.

    `drawn` are fields of DrawSettings. The precision is what training would take: bf16 on a CPU that is fast at it,
    where the generator alone draws in fp32. That takes half the time, and pictures differ by 0.1 % of their range.
    """
    import torch

    from trainer.devices import DTYPES, training_precision
    from trainer.generate import DrawSettings

    settings, device = DrawSettings(prompt="", **drawn), generator.device
    dtype = DTYPES[training_precision("auto", device)]
    lower = device.type == "cpu" and dtype != torch.float32

    def draw(prompts: list[str]) -> Pictures:
        with torch.autocast("cpu", dtype, enabled=lower):
            return generator.draw_prompts(prompts, picture_seeds(len(prompts)), settings)

    return draw


def shares(pictures: Pictures, scenes: list[Scene]) -> dict[str, float]:
    """How often (0..1) each attribute is as the scene has it."""
    seen = [agreement(look(picture), scene) for picture, scene in zip(pictures, scenes, strict=True)]
    return {name: round(float(np.mean([s[name] for s in seen])), 4) for name in ATTRIBUTES}


def score_base(draw: Draw, count: int) -> Table:
    """Rows "all", "seen pairs", "held-out pairs": number of pictures and how often each attribute is right."""
    scenes = base_scenes(count)
    pictures = draw([caption(scene) for scene in scenes])
    withheld = [held_out(scene.shape, scene.colour) for scene in scenes]
    rows = {
        "all": range(count),
        "seen pairs": [i for i in range(count) if not withheld[i]],
        "held-out pairs": [i for i in range(count) if withheld[i]],
    }
    return {
        name: {"pictures": len(row), **shares([pictures[i] for i in row], [scenes[i] for i in row])}
        for name, row in rows.items()
        if row
    }


@dataclass(frozen=True)
class AdapterTask:
    """What an adapter is asked to draw: its subject on backgrounds it was not trained on, and unrelated scenes."""

    subjects: list[Pasted]
    unrelated: list[Scene]

    @classmethod
    def of(cls, sprite: Image.Image, count: int) -> AdapterTask:
        """The same for a sprite and count always."""
        return cls(plan(sprite, count, random.Random(PLAN_SEED), training=False), unrelated_scenes(count))

    def subject_prompts(self, trigger: str) -> list[str]:
        return [compose(trigger, pasted.background, pasted.position) for pasted in self.subjects]

    def unrelated_prompts(self) -> list[str]:
        return [caption(scene) for scene in self.unrelated]


@dataclass(frozen=True)
class AdapterPictures:
    """What was drawn for a task, in its order; `before` is the base model's, with the seeds of `after`."""

    subjects: Pictures
    before: Pictures
    after: Pictures


def judge_subjects(finder: Finder, task: AdapterTask, pictures: Pictures) -> dict[str, float]:
    """How often (0..1) the sprite is found, and the background and position are those asked for.

    likeness: how well the sprite fits where it fits best, on average; at most 1, and finder.MIN_LIKENESS finds it.
    """
    rows = []
    for picture, pasted in zip(pictures, task.subjects, strict=True):
        pixels = pixels_of(picture)
        ground = fit_ground(pixels)
        find = finder.find(picture, ground)
        centre = (find.place.x, find.place.y) if find.found else object_centre(pixels, ground)
        asked = (pasted.background.pattern, pasted.background.colour)
        as_asked = ground.known and (ground.pattern, ground.colour) == asked
        position = nearest_position(centre) if centre else None
        rows.append((find.found, as_asked, position == pasted.position, find.likeness))
    means = np.mean(np.array(rows, dtype=float), axis=0)
    names = ("subject", "background", "position", "likeness")
    return {name: round(float(mean), 4) for name, mean in zip(names, means, strict=True)}


def judge_adapter(sprite: Image.Image, task: AdapterTask, pictures: AdapterPictures) -> dict[str, object]:
    """The adapter's scores, shares in 0..1.

    subject, background, position: how often the sprite is found and the prompt obeyed; likeness: how well it is drawn,
    found or not. drift: mean absolute difference of unrelated pictures from the base model's; drift_attributes: how
    much less often their attributes are right than the base model's; bleed: how often the sprite is found in them.
    """
    finder = Finder(sprite)
    before, after = shares(pictures.before, task.unrelated), shares(pictures.after, task.unrelated)
    moved = [
        np.abs(pixels_of(a) - pixels_of(b)).mean() / 255 for a, b in zip(pictures.before, pictures.after, strict=True)
    ]
    return judge_subjects(finder, task, pictures.subjects) | {
        "drift": round(float(np.mean(moved)), 4),
        "drift_attributes": {name: round(before[name] - after[name], 4) for name in ATTRIBUTES},
        "bleed": round(float(np.mean([finder.find(picture).found for picture in pictures.after])), 4),
        "pictures": len(task.subjects),
    }


def draw_adapter(draw: Draw, task: AdapterTask, trigger: str, before: Pictures) -> AdapterPictures:
    """What weights in use draw for a task, beside what the base model drew for its unrelated prompts."""
    return AdapterPictures(draw(task.subject_prompts(trigger)), before, draw(task.unrelated_prompts()))


def score_adapter(args: argparse.Namespace) -> dict[str, object]:
    """Draw with the base model and with the archive's weights, and judge."""
    if args.pictures < MIN_ADAPTER_PICTURES:
        raise UserError(f"--pictures {args.pictures} is too few: ask for {MIN_ADAPTER_PICTURES} or more")
    sprite = load_sprite(args.sprite)
    from trainer.artifact import opened, read_manifest
    from trainer.generate import Generator

    with opened(args.weights) as folder:
        manifest = read_manifest(folder)
    task = AdapterTask.of(sprite, args.pictures)
    generator = Generator(args.base_model or manifest.base_model, args.device)
    before = drawing_with(generator)(task.unrelated_prompts())
    generator.use(args.weights)
    pictures = draw_adapter(drawing_with(generator), task, args.trigger or manifest.trigger_word, before)
    rates = finder_rates(sprite, args.calibration, CALIBRATION_SEED, blurred)
    trust = {"accepted": round(rates.accepted["sprite"], 4), "wrong": round(rates.wrong["sprite"], 4)}
    return judge_adapter(sprite, task, pictures) | {"calibration": trust}


def run_condition(args: argparse.Namespace) -> None:
    from toybox.condition_score import score_condition
    from trainer.artifact import opened, read_manifest
    from trainer.generate import Generator

    with opened(args.weights) as folder:
        base_model = args.base_model or read_manifest(folder).base_model
    table = score_condition(Generator(base_model, args.device), args.weights, args.pictures, args.told)
    if args.json:
        print(json.dumps(table))
    else:
        _print_table("right", table)


def _print_table(title: str, table: Table) -> None:
    columns = list(next(iter(table.values())))
    width = max(len(name) for name in (title, *table)) + 2
    print(title.ljust(width) + "".join(column.rjust(len(column) + 3) for column in columns))
    for name, row in table.items():
        cells = (str(row[c]) if isinstance(row[c], int) else f"{100 * row[c]:.1f} %" for c in columns)
        print(name.ljust(width) + "".join(cell.rjust(len(c) + 3) for cell, c in zip(cells, columns, strict=True)))


def run_base(args: argparse.Namespace) -> None:
    from trainer.generate import Generator

    table = score_base(drawing_with(Generator(args.base_model, args.device)), args.pictures)
    rates = oracle_rates(args.calibration, CALIBRATION_SEED, blurred)
    trust = {"accepted": min(rates.accepted.values()), "wrong": max(rates.wrong.values())}
    if args.json:
        print(json.dumps({"scores": table, "oracle": trust}))
        return
    _print_table("right in", table)
    print(
        f"the oracle accepts {100 * trust['accepted']:.1f} % of true and {100 * trust['wrong']:.1f} % of wrong objects "
        f"at worst (each attribute on {args.calibration} blurred renders)"
    )


def run_adapter(args: argparse.Namespace) -> None:
    print(json.dumps(score_adapter(args)))


def run_oracle(args: argparse.Namespace) -> None:
    """Two tables for the oracle (true accepted, wrong accepted) and two for the finder."""
    measured = {name: oracle_rates(args.pictures, args.seed, damage) for name, damage in damages().items()}
    _print_table("true accepted", {name: rates.accepted for name, rates in measured.items()})
    _print_table("wrong accepted", {name: rates.wrong for name, rates in measured.items()})
    sprites = {path.stem: load_sprite(path) for path in (args.sprite or sorted(SPRITES.glob("*.png")))}
    rng = random.Random(args.seed)
    sprites |= {f"drawing {i + 1}": random_drawing(rng) for i in range(args.drawings)}
    count = max(1, args.pictures // 8)
    found = {
        name: {kind: finder_rates(sprite, count, args.seed, damage) for kind, damage in damages().items()}
        for name, sprite in sprites.items()
    }
    _print_table("true found", {n: {k: r.accepted["sprite"] for k, r in row.items()} for n, row in found.items()})
    _print_table("wrong found", {n: {k: r.wrong["sprite"] for k, r in row.items()} for n, row in found.items()})


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def parser() -> argparse.ArgumentParser:
    """The command line: base, adapter and oracle."""
    result = argparse.ArgumentParser(
        prog="python -m toybox.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = result.add_subparsers(dest="command", required=True)
    base = commands.add_parser("base", help="score a base model on fixed prompts, held-out pairs on their own row")
    base.add_argument("--base_model", default="toybox", help="as in train.py (default toybox)")
    base.add_argument("--pictures", type=_positive, default=200, help="how many prompts (default 200)")
    base.add_argument("--json", action="store_true", help="print JSON and no table")
    base.set_defaults(run=run_base)
    adapter = commands.add_parser("adapter", help="score an archive of weights trained on pictures of a sprite")
    adapter.add_argument("--weights", type=Path, required=True, help="trained_model.tar or an unpacked folder")
    adapter.add_argument("--sprite", type=Path, required=True, help="the sprite that toybox.concept pasted")
    adapter.add_argument("--trigger", help="the word that is asked for; of several concepts the first (default)")
    adapter.add_argument("--base_model", help="default: the one the weights were trained on")
    adapter.add_argument("--pictures", type=_positive, default=64, help="of each kind, 64 or more (default 64)")
    adapter.set_defaults(run=run_adapter)
    condition = commands.add_parser("condition", help="score what weights of method condition draw from a picture")
    condition.add_argument("--weights", type=Path, required=True, help="trained_model.tar or an unpacked folder")
    condition.add_argument("--base_model", help="default: the one the weights were trained on")
    condition.add_argument("--pictures", type=_positive, default=48, help="how many (default 48)")
    condition.add_argument("--told", action="store_true", help="prompts are the scenes' captions (default: empty)")
    condition.add_argument("--device", help="cpu, cuda, ... (default: the best there is)")
    condition.add_argument("--json", action="store_true", help="print JSON and no table")
    condition.set_defaults(run=run_condition)
    for command, count in ((base, 100), (adapter, 48)):
        command.add_argument("--device", help="cpu, cuda, ... (default: the best there is)")
        command.add_argument(
            "--calibration", type=_positive, default=count, help=f"renders to calibrate on (default {count})"
        )
    oracle = commands.add_parser("oracle", help="try the judges on fresh renders whose truth is known")
    oracle.add_argument("--pictures", type=_positive, default=400, help="scenes of each kind (default 400)")
    oracle.add_argument("--seed", type=int, default=0, help="of the renders (default 0)")
    oracle.add_argument("--sprite", type=Path, nargs="+", help="sprites to look for (default: the demo sprites)")
    oracle.add_argument("--drawings", type=int, default=4, help="random drawings to look for besides (default 4)")
    oracle.set_defaults(run=run_oracle)
    return result


def main(argv: list[str]) -> None:
    """The command line. Raises UserError for what the user can mend."""
    args = parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(commandline.run(main))
