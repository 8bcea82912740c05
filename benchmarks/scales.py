"""What lora_scale and token_scale do at drawing: `python -m benchmarks.scales --out results.json`

For each sprite and seed the real job trains as `benchmarks.concepts` found best, and the oracle judges what its weights
draw at each LORA strength, with the tokens at the strength that each of TOKENS gives: as drawing chooses it, all of it,
or as much as of the LoRA. Told are the means over the runs, which `--out` keeps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.concepts import CHOSEN, SPRITES, judge_of, trained
from benchmarks.runs import run_missing
from trainer import commandline

LORA = (0.25, 0.5, 0.75, 1.0, 1.25)
TOKENS: dict[str, Callable[[float], float | None]] = {
    "as drawing chooses": lambda lora: None,
    "1": lambda lora: 1.0,
    "lora_scale": lambda lora: lora,
}
COLUMNS = ("subject", "likeness", "background", "position", "drift")
Rows = dict[str, dict[str, float]]  # scores by "lora_scale/name in TOKENS"


def measure(sprite: Path, seed: int) -> Rows:
    """The scores of one run's weights."""
    judge, rows = judge_of(sprite), {}
    with tempfile.TemporaryDirectory(prefix="scales-") as folder:
        result = trained(CHOSEN, sprite, seed, Path(folder))
        for lora, tokens in asked():
            strengths = {"lora_scale": lora, "token_scale": TOKENS[tokens](lora)}
            scores = judge.adapter_scores(result.archive, **strengths)
            rows[f"{lora}/{tokens}"] = {column: scores[column] for column in COLUMNS}
    return rows


def asked() -> list[tuple[float, str]]:
    """Every pair of strengths; of lora_scale 1 once, where all of TOKENS are 1."""
    return [(lora, tokens) for lora in LORA for tokens in TOKENS if lora != 1 or tokens == next(iter(TOKENS))]


def table(runs: dict[str, Rows]) -> str:
    """The means over the runs in Markdown, a row a pair of strengths."""
    lines = [f"| lora_scale | token_scale | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for lora, tokens in asked():
        rows = [rows[f"{lora}/{tokens}"] for rows in runs.values()]
        means = [statistics.mean(row[column] for row in rows) for column in COLUMNS]
        lines.append(f"| {lora:g} | {tokens} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON that the runs are kept in")
    parser.add_argument("--sprite", type=Path, nargs="+", default=SPRITES, help="RGBA drawings (default: the four)")
    parser.add_argument("--seeds", type=int, default=1, help="runs with seeds 0, 1, ... (default 1)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    args = parser.parse_args(argv)
    given = {f"{path.stem}/{seed}": (path.resolve(), seed) for seed in range(args.seeds) for path in args.sprite}
    print(table(run_missing(args.out, measure, given, args.jobs, apart=False)))


if __name__ == "__main__":
    sys.exit(commandline.run(main))
