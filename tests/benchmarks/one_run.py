"""Runs for test_runs: what a process beside can do."""

from __future__ import annotations

import os
import time


def spoken(text: str) -> dict[str, str | int]:
    """The text in capitals, the process that did it and its threads; ValueError for "b"."""
    import torch

    if text == "b":
        raise ValueError("b is refused")
    return {"said": text.upper(), "process": os.getpid(), "threads": torch.get_num_threads()}


def endless() -> None:
    """Says that it has begun and does not end."""
    print("begun", flush=True)
    time.sleep(600)
