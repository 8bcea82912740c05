"""The comparison's own arithmetic, and the model that it makes; what it measures is the job's."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import prefix
from trainer import families
from trainer.families.base import DENOISER, TEXT


def test_the_small_model_is_what_it_is_said_to_be(tmp_path: Path) -> None:
    prefix.save_small_omnigen2(tmp_path)
    family = families.load(str(tmp_path), frozenset({DENOISER, TEXT}), torch.float32)
    counts = {net.name: sum(p.numel() for p in family.module(net.name).parameters()) / 1e6 for net in family.nets}
    assert (round(counts["transformer"], 1), round(counts["mllm"], 1)) == (29.8, 24.7)
    assert family.geometry(str(tmp_path)).stride == 16
    assert family.encode_text(["a dog"])["context"].shape[2] == 384


def test_memory_is_counted_from_the_first_step_on() -> None:
    held = torch.ones(60 * 2**18)  # 60 MiB, before
    watch = prefix.Watch()
    watch("cache", 1, 1)
    assert watch.before is None
    watch("train", 0, 2)
    taken = torch.ones(200 * 2**18)
    watch("train", 1, 2)
    assert len(watch.ends) == 1 and 150 < watch.most - watch.before < 300
    del held, taken


def test_the_table_has_scores_where_there_are_some() -> None:
    one = {"parameters": 1920, "stored_bytes": 7872, "seconds_per_step": 0.5, "memory_mib": 100.4, "gain": 0.13}
    scored = one | {"scores": {"subject": 0.5, "likeness": 0.625, "background": 1.0, "position": 0.25, "drift": 0.0051}}
    results = {"toybox/sd|prefix": scored, "toybox/sd|lora|costs": one | {"memory_mib": None}}
    results["toybox/sd|nothing"] = {"scores": {"subject": 0.0, "likeness": 0.1, "background": 1.0, "position": 0.9}}
    lines = prefix.table(results).splitlines()
    assert (
        lines[2]
        == "| toybox/sd | prefix | 1,920 | 8 kB | 0.50 s | 100 MiB | 13.0 % | 0.50 | 0.62 | 1.00 | 0.25 | 0.005 |"
    )
    assert lines[3].startswith("| toybox/sd | lora, costs | 1,920 | 8 kB | 0.50 s |  |") and lines[0].count("|") == 13
    assert lines[4] == "| toybox/sd | nothing |  |  |  |  |  | 0.00 | 0.10 | 1.00 | 0.90 |  |"
