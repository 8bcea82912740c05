"""Checkpoints: written whole, limited in number, and enough to go on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preprocessing.errors import UserError
from trainer.config import JobSettings

STATE_FILE, INFO_FILE = "state.pt", "info.json"
NAME = re.compile(r"step_(\d{8})")
# settings that may differ between a run and its resumption without changing what is trained
FREE_SETTINGS = frozenset(
    {"input_images", "output_dir", "resume", "report_to", "checkpoint_every", "checkpoints_total_limit"}
    | {"save_diffusers", "preview_prompts", "preview_seeds", "workers", "dry_run", "push_to_hub", "hub_private"}
    | {"init_adapter"}  # wherever it lies: the hash of its content is in the fingerprint
)


def fingerprint(settings: JobSettings, dataset_hash: str) -> dict[str, Any]:
    """What must be the same for a resumed run to equal an unbroken one."""
    return settings.model_dump(mode="json", exclude=set(FREE_SETTINGS)) | {"dataset_hash": dataset_hash}


def random_state() -> dict[str, Any]:
    """The state of every global generator (dropout inside nets draws from torch's)."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


class Checkpoints:
    """The checkpoints of one job: folders named by their step, inside `folder`."""

    def __init__(self, folder: Path, identity: dict[str, Any], limit: int):
        self.folder, self.identity, self.limit = folder, identity, limit

    def list(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = [p for p in self.folder.glob("step_*") if NAME.fullmatch(p.name) and (p / INFO_FILE).exists()]
        return sorted(found)

    def save(self, step: int, state: dict[str, Any], beside: Callable[[Path], None] | None = None) -> Path:
        """Write a checkpoint under a temporary name, rename it, then remove those over the limit.

        `beside` may write more into the folder that it is given.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{step:08d}"
        temporary = self.folder / f"unfinished_{step:08d}"
        for stale in (temporary, path):
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        torch.save(state, temporary / STATE_FILE)
        if beside is not None:
            beside(temporary)
        info = {"step": step, "identity": self.identity}
        (temporary / INFO_FILE).write_text(json.dumps(info, indent=2), encoding="utf-8")
        os.replace(temporary, path)
        for old in self.list()[: -self.limit]:
            shutil.rmtree(old)
        return path

    def load_last(self) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint as (step, state), or None; raises UserError when it is of another job."""
        finished = self.list()
        if not finished:
            return None
        info = json.loads((finished[-1] / INFO_FILE).read_text(encoding="utf-8"))
        differing = sorted(
            k for k in info["identity"] | self.identity if info["identity"].get(k) != self.identity.get(k)
        )
        if differing:
            raise UserError(
                f"The checkpoint {finished[-1]} was made with another {', '.join(differing)}: resume with the same "
                f"settings and pictures, or choose another output_dir."
            )
        state = torch.load(finished[-1] / STATE_FILE, map_location="cpu", weights_only=True)
        return info["step"], state
