"""Do two concepts of one job keep apart? `python -m benchmarks.two_concepts --out results.json`

The real job trains on two sprites, each in a folder called as its trigger word; 64 pictures are drawn of each word on
backgrounds that were not trained on, and 64 of both words in one prompt, which training pictures show only in the runs
with a folder `together`. Told are, as shares of the pictures, where the word's own sprite is found, where the other
word's is, and where both are, and how often background and position are as asked for. A way of training in RUNS that
`--out` holds is not run again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.concepts import SPRITES
from benchmarks.judging import SubjectJudge
from benchmarks.runs import keep, read_kept
from trainer import commandline

WORDS = ("ROB", "TEA")
PAIR = (SPRITES[0].with_name("robot.png"), SPRITES[0].with_name("teapot.png"))
CLASSED = [{"folder": word, "trigger_word": word, "class_word": "sticker"} for word in WORDS]
BOTH_SHOWN = [*CLASSED, {"folder": "together", "concepts": list(WORDS)}]
RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "class words": {"concepts": CLASSED},
    "class words, 600 steps": {"concepts": CLASSED, "max_train_steps": 600},
    "both shown, 900 steps": {"concepts": BOTH_SHOWN, "max_train_steps": 900},
    "masks, attention in them": {"token_attention_penalty": 0.1},
}
SHARED: dict[str, Any] = {"concepts": "folders", "holdout": 0, "report_to": "none", "early_stop": False, "workers": 0}


def measure(name: str, seed: int) -> dict[str, dict[str, float]]:
    """Train one way; the scores of each word and of both together."""
    from toybox import concept
    from trainer import job
    from trainer.config import JobSettings

    with tempfile.TemporaryDirectory(prefix="two-concepts-") as folder:
        data, sprites = Path(folder) / "data.zip", ["--sprite", *map(str, PAIR), "--trigger", *WORDS]
        concept.main([*sprites, "--out", str(data), *archive_options(RUNS[name])])
        places = {"input_images": data, "output_dir": Path(folder) / "out"}
        result = job.train(JobSettings(**SHARED | RUNS[name], **places, seed=seed))
        judges = [SubjectJudge(sprite) for sprite in PAIR]
        results = {}
        for word, own, other in zip(WORDS, judges, judges[::-1], strict=True):
            own.generator.use(result.archive)
            results[word] = judged(own, other, own.draw(word), ("background", "position"))
        both = " beside ".join(WORDS)  # where each should be is not said
        results[both] = judged(*judges[::-1], judges[-1].draw(both), ("background",))
    return results


def archive_options(settings: dict[str, Any]) -> list[str]:
    """What `toybox.concept` is asked for besides the two folders."""
    masks = ["--masks"] if "token_attention_penalty" in settings else []
    return masks + (["--together", "12"] if settings.get("concepts") == BOTH_SHOWN else [])


def judged(own: SubjectJudge, other: SubjectJudge, pictures: list[Any], told: tuple[str, ...]) -> dict[str, float]:
    """Where the sprites are found in pictures of a prompt, and how often what it told besides was obeyed."""
    scores = own.scores(pictures)
    return presence(*own.found_beside(other, pictures)) | {name: scores[name] for name in told}


def presence(own: list[bool], other: list[bool]) -> dict[str, float]:
    """Shares of the pictures in which one, the other and both are found."""
    count = len(own)
    both = sum(a and b for a, b in zip(own, other, strict=True))
    return {"own": sum(own) / count, "other": sum(other) / count, "both": both / count}


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The results in Markdown."""
    columns = ("own", "other", "both", "background", "position")
    lines = [f"| run | prompt | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for run, rows in results.items():
        for word, scores in rows.items():
            cells = [f"{scores[name]:.2f}" if name in scores else "" for name in columns]
            lines.append(f"| {run} | {word} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON that results are kept in")
    parser.add_argument("--run", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN")
    parser.add_argument("--seeds", type=int, default=1, help="runs with seeds 0, 1, ... (default 1)")
    args = parser.parse_args(argv)
    results = read_kept(args.out)
    wanted = {f"{name}, seed {seed}": (name, seed) for seed in range(args.seeds) for name in args.run}
    for key in (key for key in wanted if key not in results):
        results[key] = measure(*wanted[key])
        keep(args.out, results)
    print(table(results))


if __name__ == "__main__":
    sys.exit(commandline.run(main))
