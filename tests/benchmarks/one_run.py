"""Runs for test_runs: what a process beside can do."""

from __future__ import annotations

import os


def spoken(text: str) -> dict[str, str | int]:
    """The text in capitals, the process that did it and its threads; ValueError for "b"."""
    import torch

    if text == "b":
        raise ValueError("b is refused")
    return {"said": text.upper(), "process": os.getpid(), "threads": torch.get_num_threads()}
