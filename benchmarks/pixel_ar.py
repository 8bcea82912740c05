"""Seconds a picture of pixel_ar, drawn with cached rows and by a whole forward pass a value.

    python -m benchmarks.pixel_ar

The naive loop is timed over its first `--forwards` passes, which all cost the same, and multiplied by the number of
values. On a CPU the seconds are those that the process used (times its threads).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from benchmarks.step import machine

SIDES = (16, 32, 64)


def measure(pipe: Any, side: int, batch: int, forwards: int) -> dict[str, float]:
    """Seconds a picture both ways, and how many times faster the one is."""
    import torch

    from trainer.families.pixel_ar.sampling import Sampling, draw

    model = pipe.model
    # on a CPU the seconds of this process, which other work on the machine does not stretch
    now = time.process_time if model.device.type == "cpu" else time.perf_counter
    ids = pipe.encode(["a big red star on a striped blue background"] * batch)["ids"]
    uniform = torch.rand(batch, side, side, 3, generator=torch.Generator().manual_seed(0)).to(model.device)
    with torch.no_grad():
        condition = model.condition(ids, None)
        started = now()
        values = draw(model, condition, uniform, Sampling())
        cached = now() - started
        passes = []
        for _ in range(forwards + 1):
            started = now()
            model(values, ids)
            passes.append(now() - started)
    naive = statistics.median(passes[1:]) * 3 * side * side
    return {"cached_s": cached / batch, "naive_s": naive / batch, "times_faster": naive / cached}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default="toybox/pixel_ar", help="a folder or name, as in train.py")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="pictures at a time (default 1 and 16)")
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES), help="in pixels (default 16, 32, 64)")
    parser.add_argument("--forwards", type=int, default=3, help="passes of the naive loop that are timed (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    args = parser.parse_args()
    import torch

    from trainer import families
    from trainer.families.base import DENOISER

    torch.set_num_threads(args.threads)
    family = families.load(args.base_model, frozenset({DENOISER}), torch.float32)
    print(json.dumps(machine()))
    for batch in args.batch:
        for side in args.sides:
            found = measure(family.pipeline().stock, side, batch, args.forwards)
            told = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
            print(f"{side} x {side}, {batch} at a time:  {told}", flush=True)


if __name__ == "__main__":
    main()
