"""Pivotal tuning's switches, each alone against one baseline: `python -m benchmarks.concepts --out results.json`

For each variant, sprite and seed the real job trains on twelve pictures of the sprite, all of them, to the last step,
on one thread of a process beside, and the oracle judges 64 pictures that its weights draw. A run that `--out` holds
is not made again, so the benchmark may be stopped at any time. `--plot` draws the variants, subject against prompt
and against drift.

Told are the means over the runs of the first SEEDS seeds with 95 % intervals (resampled runs), how much subject,
likeness and prompt differ from the baseline's run with the same sprite and seed, and the spread of the subject's score
over the seeds of a sprite; where a sprite was run with more seeds, a table of its own has the spread over all of them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.judging import SubjectJudge
from benchmarks.runs import ROOT, run_missing, trained_numbers
from benchmarks.step import machine
from trainer import commandline
from trainer.evaluation.bootstrap import Interval, interval

if TYPE_CHECKING:
    from trainer.job import JobResult

SPRITES = sorted((ROOT / "toybox" / "sprites").glob("*.png"))
BASELINE = "baseline"
START: dict[str, Any] = {"n_tokens": 3}  # what every variant changes: three tokens, and no class word
SCENE = ("striped", "green", "left")  # that a prompt is aligned to
CHOSEN = "class word, 8 tokens"  # the toybox's recipe, by what this table says
BETTER_TOKENS: dict[str, Any] = {"class_word": "sticker", "n_tokens": 8}
ADAMW: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 0.006}
VARIANTS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "rank 8": {"lora_rank": 8},
    "rank 64": {"lora_rank": 64},
    "alpha 2 x rank": {"lora_alpha": 64},
    "DoRA": {"use_dora": True},
    "attention only": {"lora_targets": "attention"},
    "1 token": {"n_tokens": 1},
    "8 tokens": {"n_tokens": 8},
    "class word": {"class_word": "sticker"},
    CHOSEN: BETTER_TOKENS,
    f"{CHOSEN}, no std penalty": BETTER_TOKENS | {"token_std_penalty": 0.0},
    f"{CHOSEN}, AdamW": BETTER_TOKENS | ADAMW,
    f"{CHOSEN}, Prodigy for the LoRA": BETTER_TOKENS | {"optimizer": "prodigy"},
    f"{CHOSEN}, from the text": BETTER_TOKENS | {"token_text_warmup": 100},
    "no std penalty": {"token_std_penalty": 0.0},
    "L1 0.03": {"lora_l1_penalty": 0.03},
    "no preservation": {"preservation_weight": 0.0},
    "noise offset 0.02": {"noise_offset": 0.02},
    "no Min-SNR": {"snr_gamma": None},
    "no caption dropout": {"caption_dropout": 0.0},
    "Prodigy, LoRA": {"optimizer": "prodigy"},
    "Prodigy, tokens": {"text_embedding_optimizer": "prodigy"},
    "Prodigy, both": {"optimizer": "prodigy", "text_embedding_optimizer": "prodigy"},
    "pivot at half": {"pivot_fraction": 0.5},
    "no pivot": {"pivot_fraction": 1.0},
    "rate rises": {"lr_schedule": "exponential"},
    "average of weights": {"ema_decay": 0.99},
    "450 steps": {"max_train_steps": 450},
    "AdamW": ADAMW,
    "AdamW, 450 steps": ADAMW | {"max_train_steps": 450},  # the default before Muon
    "AdamW, LoRA+ 16": ADAMW | {"lora_plus_ratio": 16.0, "learning_rate": 0.001},
    "LoKr": {"adapter_type": "lokr"},
    "LoKr, factor 2": {"adapter_type": "lokr", "lokr_factor": 2},
    "OFT, attention": {"adapter_type": "oft", "lora_targets": "attention"},
    "covariance 0.01": {"token_covariance_penalty": 0.01},
    "conditioning norm 0.1": {"conditioning_norm_penalty": 0.1, "class_word": "sticker"},
    "conditioning noise 0.1": {"conditioning_noise": 0.1},
    "masks": {},
    "masks, attention in them": {"token_attention_penalty": 0.1},
    "tokens from the text, 100": {"token_text_warmup": 100, "class_word": "sticker"},
    "aligned to a prompt": {
        "alignment_prompt": "{{trigger}} on a {} {} background on the {}".format(*SCENE),
        "alignment_weight": 0.001,
        "class_word": "sticker",
    },
    "perfusion": {"method": "perfusion", "class_word": "sticker"},
    "no tokens": {"method": "lora"},
}
SEEDS = 3  # that the variants are compared over
MASKED = ("masks", "masks, attention in them")  # variants whose pictures come with masks
WITH_SCENE = (BASELINE, "class word", "aligned to a prompt")  # variants that SCENE's prompt alone is drawn with, too
SCORES = ("subject", "likeness", "background", "position", "drift", "bleed")
COLUMNS = ("subject", "background", "position", "likeness", "drift", "bleed", "seconds", "parameters")
Runs = dict[str, dict[str, Any]]  # by "variant/sprite/seed"


@cache
def judge_of(sprite: Path) -> SubjectJudge:
    """One a sprite and process: it loads the base model, and draws what that draws by itself."""
    return SubjectJudge(sprite)


def settings_of(variant: str) -> dict[str, Any]:
    """What its job is given, beside pictures and seed."""
    return START | VARIANTS[variant]


def trained(variant: str, sprite: Path, seed: int, folder: Path) -> JobResult:
    """The real job on all of the pictures to the last step, in an empty folder; its results lie in `out`."""
    from toybox import concept
    from trainer import job
    from trainer.config import JobSettings

    wanted = ["--masks"] if variant in MASKED else []
    concept.main(["--sprite", str(sprite), "--out", str(folder / "data.zip"), *wanted])
    fixed = {"input_images": folder / "data.zip", "output_dir": folder / "out", "seed": seed, "holdout": 0}
    fixed |= {"evaluate_every": 10**6, "early_stop": False, "report_to": "none", "workers": 0}
    fixed |= {"preview_prompts": ("TOK",), "preview_seeds": (0,)}
    return job.train(JobSettings(**fixed | settings_of(variant)))


def measure(variant: str, sprite: Path, seed: int) -> dict[str, Any]:
    """One run."""
    with tempfile.TemporaryDirectory(prefix="concepts-") as name:
        folder = Path(name)
        result = trained(variant, sprite, seed, folder)
        judge = judge_of(sprite)
        found = judge.adapter_scores(result.archive)
        scene = {"scene": judge.scene_scores(result.archive, *SCENE)} if variant in WITH_SCENE else {}
        return (
            scene
            | {name: found[name] for name in SCORES}
            | {
                "seconds": result.stage_seconds["train"],
                "parameters": trained_numbers(folder / "out"),
                "machine": machine(),
            }
        )


def prompt_score(run: dict[str, Any]) -> float:
    """How well the prompt was obeyed: the mean of background and position."""
    return (run["background"] + run["position"]) / 2


# what is compared with the baseline's run of the same sprite and seed; likeness varies least from seed to seed
COMPARED = {"subject": lambda run: run["subject"], "likeness": lambda run: run["likeness"], "prompt": prompt_score}
# what the subject is drawn against
AGAINST = (("prompt: mean of background and position", prompt_score), ("drift", lambda run: run["drift"]))


def of_variant(runs: Runs, variant: str) -> dict[str, dict[str, Any]]:
    """Its runs by "sprite/seed"."""
    return {key.partition("/")[2]: run for key, run in runs.items() if key.partition("/")[0] == variant}


def first_seeds(runs: Runs) -> Runs:
    """Those that are compared: more seeds of some variants on a sprite would weigh it more."""
    return {key: run for key, run in runs.items() if int(key.rpartition("/")[2]) < SEEDS}


def measured_variants(runs: Runs) -> list[str]:
    """The variants that have runs; last those that are no more, whose switch these runs spoke against."""
    ran = dict.fromkeys(key.partition("/")[0] for key in runs)
    return [name for name in VARIANTS if name in ran] + [name for name in ran if name not in VARIANTS]


def mean(values: list[float]) -> Interval:
    return interval(values, [0] * len(values))


def against_baseline(runs: Runs, variant: str, score: Callable[[dict[str, Any]], float]) -> Interval | None:
    """How much a variant's score differs from that of the baseline's runs with the same sprite and seed."""
    own, baseline = of_variant(runs, variant), of_variant(runs, BASELINE)
    shared = sorted(own.keys() & baseline.keys())
    return mean([score(own[key]) - score(baseline[key]) for key in shared]) if shared else None


def seed_spread(own: dict[str, dict[str, Any]]) -> float:
    """Standard deviation of the subject's score over the seeds of a sprite, of all sprites the root mean square."""
    by_sprite: dict[str, list[float]] = {}
    for key, run in own.items():
        by_sprite.setdefault(key.partition("/")[0], []).append(run["subject"])
    return math.sqrt(statistics.mean(statistics.pvariance(values) for values in by_sprite.values()))


def _told(found: Interval) -> str:
    return f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})"


def _signed(found: Interval | None) -> str:
    return "" if found is None else f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


def table(runs: Runs) -> str:
    """The runs of the first seeds in Markdown, a row a variant."""
    runs = first_seeds(runs)
    titles = ("variant", "runs", *COLUMNS, "spread", *(f"{name} − baseline" for name in COMPARED))
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for variant in measured_variants(runs):
        own = list(of_variant(runs, variant).values())
        means = {column: mean([run[column] for run in own]) for column in COLUMNS}
        cells = [_told(means["subject"])]
        cells += [f"{means[column].mean:.3f}" for column in COLUMNS[1:6]]
        cells += [f"{means['seconds'].mean:.0f}", f"{means['parameters'].mean:,.0f}"]
        cells += [f"{seed_spread(of_variant(runs, variant)):.3f}"]
        own_row = variant == BASELINE
        cells += ["" if own_row else _signed(against_baseline(runs, variant, score)) for score in COMPARED.values()]
        lines.append(f"| {' | '.join([variant, str(len(own)), *cells])} |")
    return "\n".join(lines)


def scene_table(runs: Runs) -> str:
    """Of the variants that drew SCENE's prompt alone, how well it was obeyed: Markdown, a row a variant."""
    runs = first_seeds(runs)
    columns = ("subject", "background", "position")
    lines = [f"| one prompt | runs | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for variant in WITH_SCENE:
        scenes = [run["scene"] for run in of_variant(runs, variant).values()]
        if scenes:
            cells = [_told(mean([scene[column] for scene in scenes])) for column in columns]
            lines.append(f"| {' | '.join([variant, str(len(scenes)), *cells])} |")
    return "\n".join(lines)


def spread_table(runs: Runs) -> str:
    """How far the seeds of a sprite are apart, where a variant was run with more than SEEDS of them: Markdown."""
    scores = ("subject", "likeness")
    titles = [f"{title}{of}" for of in scores for title in ("", "least ", "deviation of ")]
    lines = [f"| sprite | variant | seeds | {' | '.join(titles)} |", "|---" * (len(titles) + 3) + "|"]
    more = {tuple(key.split("/")[1::-1]) for key in runs.keys() - first_seeds(runs).keys()}
    order = measured_variants(runs)
    for sprite, variant in sorted(more, key=lambda pair: (pair[0], order.index(pair[1]))):
        own = [run for key, run in of_variant(runs, variant).items() if key.partition("/")[0] == sprite]
        cells = []
        for name in scores:
            values = [run[name] for run in own]
            cells += [statistics.mean(values), min(values), statistics.pstdev(values)]
        lines.append(f"| {sprite} | {variant} | {len(own)} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    return "\n".join(lines)


def plot(runs: Runs, path: Path) -> None:
    """Subject against prompt and against drift, a point a variant with its intervals, of the first seeds."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    runs = first_seeds(runs)
    with rc_context({"svg.hashsalt": "concepts"}):
        figure = Figure(figsize=(12, 7.5), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for index, variant in enumerate(measured_variants(runs)):
            own = of_variant(runs, variant).values()
            subject, marker = mean([run["subject"] for run in own]), "os^vD"[index // 10 % 5]
            for axes, (_, score) in zip(panels, AGAINST, strict=True):
                along = mean([score(run) for run in own])
                errors = {"xerr": _arms(along), "yerr": _arms(subject)}
                axes.errorbar(along.mean, subject.mean, **errors, fmt=marker, elinewidth=0.4, label=variant)
        for axes, (title, _) in zip(panels, AGAINST, strict=True):
            axes.set_xlabel(title)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel("subject found")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", fontsize="small", ncols=5)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _arms(found: Interval) -> list[list[float]]:
    """The interval's ends as matplotlib takes them: distances from the mean."""
    return [[found.mean - found.low], [found.high - found.mean]]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--out", type=Path, required=True, help="JSON that the runs are kept in")
    result.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    result.add_argument("--sprite", type=Path, nargs="+", default=SPRITES, help="RGBA drawings (default: the four)")
    result.add_argument("--seeds", type=int, default=SEEDS, help=f"runs with seeds 0, 1, ... (default {SEEDS})")
    result.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1; a GPU has room for several)")
    result.add_argument("--plot", type=Path, help="SVG or PNG to draw")
    return result


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    sprites = {path.stem: path.resolve() for path in args.sprite}
    # seed by seed, so that a benchmark that is stopped has compared everything a little
    wanted = product(range(args.seeds), sprites, args.variant)
    given = {f"{variant}/{name}/{seed}": (variant, sprites[name], seed) for seed, name, variant in wanted}
    runs: Runs = run_missing(args.out, measure, given, args.jobs, apart=False)
    print(table(runs), scene_table(runs), spread_table(runs), sep="\n\n")
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    sys.exit(commandline.run(main))
