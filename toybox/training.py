"""What the three training scripts share: arguments, resumable state written whole, one progress line."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


def arguments(description: str, steps: int, batch: int) -> argparse.ArgumentParser:
    """The options of every script; each adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that the finished model is written to")
    parser.add_argument("--work", type=Path, required=True, help="folder for the state that a stopped run resumes from")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--save_every", type=int, default=200, help="steps between two saved states")
    return parser


def start(args: argparse.Namespace) -> torch.device:
    """Seed, set the threads and make the folders."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    return torch.device(args.device)


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    """The factor of a learning rate: linear warm-up, then half a cosine down to 1 % of it."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + float(np.cos(np.pi * min(1.0, done))))


class Together:
    """Several optimisers that step as one."""

    def __init__(self, *optimisers: torch.optim.Optimizer):
        self._each = optimisers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for one in self._each for group in one.param_groups]

    def zero_grad(self) -> None:
        for one in self._each:
            one.zero_grad()

    def step(self) -> None:
        for one in self._each:
            one.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [one.state_dict() for one in self._each]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for one, state in zip(self._each, states, strict=True):
            one.load_state_dict(state)


def descend(optimiser: torch.optim.Optimizer | Together, loss: torch.Tensor, learning_rate: float) -> None:
    """One step at that rate, or a group's multiple of it (`rate`), gradients clipped to a norm of 1."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate * group.get("rate", 1.0)
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
    optimiser.step()


@contextmanager
def averaged(average: EMAModel, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters are their average."""
    average.store(parameters)
    average.copy_to(parameters)
    yield
    average.restore(parameters)


@dataclass
class Run:
    """The state of one training: whatever has a state_dict, under a name, saved together with the random state."""

    path: Path
    parts: dict[str, Any]
    step: int = 0
    started: float = field(default_factory=time.time)
    started_step: int = 0

    def resume(self) -> None:
        if not self.path.exists():
            return
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        self.step = self.started_step = state["step"]
        print(f"resumed at step {self.step}", flush=True)

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        temporary = self.path.with_suffix(".tmp")
        torch.save(state | {"random": torch.get_rng_state(), "step": self.step}, temporary)
        os.replace(temporary, self.path)

    def report(self, steps: int, **figures: float) -> None:
        seconds = (time.time() - self.started) / max(1, self.step - self.started_step)
        left = seconds * (steps - self.step) / 60
        text = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        print(f"step {self.step}/{steps}  {text}  {seconds:.3f} s a step, {left:.0f} min left", flush=True)


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size -> uint8 [B, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).contiguous()


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1
