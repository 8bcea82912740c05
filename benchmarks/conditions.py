"""What conditions cost in drawing: `python benchmarks/conditions.py [--base_model toybox/flux] [--json]`.

For one to four conditions of the picture's size, or half its side (compact), prints the tokens of the attention and the
seconds a picture takes, computed at every step and with stored keys and values, and whether both draw the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.step import machine  # noqa: E402 (the path comes first)

ROUNDS = 3


def measure(base_model: str, steps: int, counts: range) -> list[dict[str, Any]]:
    """A row for each number of conditions and size, LoRA of rank 4 with random weights in."""
    import torch
    from peft import LoraConfig

    from trainer.branches import Layout, Placement
    from trainer.generate import Generator
    from trainer.methods import adapters

    generator = Generator(base_model)
    family, size = generator.family, generator.geometry.resolution
    net = family.module("transformer")
    targets, unread = family.condition_layers()
    adapters.inject(net, LoraConfig(r=4, target_modules=targets, exclude_modules=unread))
    rows = []
    for share in (1.0, 0.5):
        side = int(size * share)
        latents = family.encode_pixels(torch.rand(max(counts), 3, side, side) * 2 - 1)
        for count in counts:
            layout = Layout((Placement(scale=1 / share),) * count, independent=True)
            family.remove_branches()
            family.add_branches(layout)
            conditions = {f"condition_{i}": latents[i : i + 1] for i in range(count)}
            plain, stored = (_drawn(generator, conditions, steps, reuse) for reuse in (False, True))
            picture = (size // family.pixels_per_token) ** 2
            context = family.encode_text([""])["context"].shape[1]
            rows.append(
                {
                    "conditions": count,
                    "side": side,
                    "tokens": context + picture + count * (side // family.pixels_per_token) ** 2,
                    "tokens_stored": context + picture,
                    "seconds": plain[0],
                    "seconds_stored": stored[0],
                    "equal": bool(torch.equal(plain[1], stored[1])),
                }
            )
            family.remove_branches()
    return rows


def _drawn(generator: Any, conditions: dict[str, Any], steps: int, reuse: bool) -> tuple[float, Any]:
    """Median seconds of a picture's denoising, and its latents."""
    import torch

    family = generator.family
    pipe, text = family.pipeline(), family.encode_text(["a photo of a dog"])
    inputs = {name: value for name, value in family.pipeline_inputs(text, text).items() if "negative" not in name}
    size, times, latents = generator.geometry.resolution, [], None
    with torch.no_grad():
        for _ in range(ROUNDS + 1):
            chosen = replace(family.conditions_of(conditions), stores={} if reuse else None)
            noise = torch.Generator().manual_seed(0)
            started = time.perf_counter()
            with family.branches.on(chosen):
                latents = pipe(
                    **inputs, width=size, height=size, num_inference_steps=steps, generator=noise, output_type="latent"
                ).images
            if latents.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:]), latents


def main(argv: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What conditions cost in drawing.")
    parser.add_argument("--base_model", default="toybox/flux")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--conditions", type=int, default=4, help="up to so many")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    rows = measure(args.base_model, args.steps, range(1, args.conditions + 1))
    if args.json:
        print(json.dumps({"machine": machine(), "rows": rows}))
        return
    print("  ".join(f"{name}: {value}" for name, value in machine().items()))
    for row in rows:
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
