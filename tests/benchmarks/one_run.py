"""A run for test_runs: writes what it was told, and how many threads it has."""

import argparse
import json
import os
from pathlib import Path

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--say")
    args = parser.parse_args()
    args.out.write_text(json.dumps({"said": args.say, "threads": os.environ["OMP_NUM_THREADS"]}))
