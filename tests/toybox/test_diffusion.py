"""The loop that trains the toybox's text-to-image models, with a learner of one matrix in place of a net."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from toybox import diffusion, training
from toybox.world import DRAWING, random_scene


class Tinted(diffusion.Learner):
    """Guesses latents by a matrix (for Muon) and a shift (for AdamW)."""

    name: ClassVar[str] = "tinted"
    draw: ClassVar[dict[str, Any]] = {}
    latent_scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.shift = nn.Parameter(torch.eye(4)), nn.Parameter(torch.zeros(4))
        self.asked: list[str] = []

    def matrices(self) -> list[nn.Parameter]:
        return [self.matrix]

    def forward(self, latents: Tensor, captions: list[str]) -> Tensor:
        self.asked += captions
        guess = torch.einsum("oc,bchw->bohw", self.matrix, torch.randn_like(latents)) + self.shift.view(1, -1, 1, 1)
        return (guess - latents).square()

    def as_pipeline(self, vae: Path) -> DiffusionPipeline:
        raise AssertionError("not asked for")


def trained(folder: Path, monkeypatch, stops: list[int], *options: str) -> Tinted:
    """A learner trained up to each of `stops` in turn, every time by a fresh start from the saved state."""
    monkeypatch.setattr(diffusion, "_finish", lambda *_: None)
    folder.mkdir()
    rng = random.Random(0)
    world = diffusion.World([random_scene(rng) for _ in range(40)], torch.rand(40, 8, 16, 16).half(), Path("vae"))
    parser = diffusion.arguments("", steps=stops[-1], batch=4)
    args = parser.parse_args(["--out", "out", "--work", str(folder), "--vae", "vae", "--save_every", "3", *options])
    for stop in stops:
        training.start(args)
        learner = Tinted()
        _train_to(stop, learner, world, args, monkeypatch)
    return learner


def _train_to(stop: int, learner: Tinted, world: diffusion.World, args: Any, monkeypatch) -> None:
    """Stop as a user would, behind a saved state: args.steps, which the rates hang on, stays that of the whole run."""
    save = training.Run.save

    def save_and_leave(run: training.Run) -> None:
        save(run)
        if run.step == stop < args.steps:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training.Run, "save", save_and_leave)
        try:
            diffusion.train(learner, world, args)
        except KeyboardInterrupt:
            assert stop < args.steps


def test_a_resumed_training_is_the_one_that_was_not_stopped(tmp_path: Path, monkeypatch) -> None:
    torch.manual_seed(1)
    whole = trained(tmp_path / "whole", monkeypatch, [9])
    torch.manual_seed(1)
    parts = trained(tmp_path / "parts", monkeypatch, [3, 6, 9])
    assert torch.equal(whole.matrix, parts.matrix)
    assert torch.equal(whole.shift, parts.shift)
    assert not torch.equal(whole.matrix, torch.eye(4))


def test_the_first_share_of_a_run_has_no_drawings(tmp_path: Path, monkeypatch) -> None:
    nouns = {"sticker", "toy", "creature", "figure"}

    def asked(name: str, told: str) -> list[bool]:
        captions = trained(tmp_path / name, monkeypatch, [20], "--told", told).asked
        return [bool(nouns & set(caption.split())) for caption in captions]

    half = asked("half", "0.5")
    assert not any(half[:40])
    assert any(half[40:])
    assert any(asked("none", "0")[:40])


def test_told_scenes_are_all_but_the_drawings() -> None:
    rng = random.Random(0)
    world = diffusion.World([random_scene(rng) for _ in range(40)], torch.zeros(0), Path("vae"))
    left = set(range(40)) - set(world.told)
    assert left
    assert {world.scenes[index].shape for index in left} == {DRAWING}
