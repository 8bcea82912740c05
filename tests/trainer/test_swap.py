"""Putting weights in is a transaction: stopped at whatever line, the ones before are in, whole."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.test_foreign import trained
from trainer.drawing import DrawSettings
from trainer.generate import Generator

__all__ = ["trained"]
OURS = str(Path(__file__).resolve().parents[2] / "trainer")
SAMPLES = 16


class Cancelled(BaseException):
    """As Cog's: no Exception, and it may come at any line."""


def run_to_line(number: int, work: Callable[[], Any]) -> int:
    """Do `work`, and raise Cancelled at its `number`-th line in our modules; the count of lines that were run."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            count += 1
            if count == number:
                sys.settrace(None)
                raise Cancelled
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


def drawn(generator: Generator) -> np.ndarray:
    settings = DrawSettings(prompt="TOK on a hill", token_scale=1.0, num_inference_steps=1, guidance_scale=5.0)
    return np.asarray(generator.draw_prompts(["TOK on a hill"], [4], settings)[0])


@pytest.mark.parametrize("tiny_model", ["sd"], indirect=True)
@pytest.mark.parametrize(
    "variants",
    [
        ("pivotal", "lora text"),
        *(pytest.param(v, marks=pytest.mark.slow) for v in (("lora", "full"), ("full", "pivotal dora"))),
    ],
)
def test_a_swap_that_is_stopped_anywhere_changes_nothing(variants: tuple[str, str], trained, lab, tiny_model) -> None:
    folders = []
    for variant in variants:
        folders.append(trained(variant))
        lab.family = lab_family(tiny_model)
    first, second = folders
    generator = Generator(str(tiny_model), "cpu")
    before = {name: value.clone() for name, value in generator.family.module("unet").state_dict().items()}
    pictures = {}
    for folder in folders:
        generator.use(folder)
        pictures[folder] = drawn(generator)
    generator.use(first)
    lines = run_to_line(0, lambda: generator.use(second))
    assert lines > SAMPLES
    assert (pictures[first] != pictures[second]).any()
    for number in np.linspace(1, lines, SAMPLES, dtype=int):
        generator.use(first)
        with pytest.raises(Cancelled):
            run_to_line(int(number), lambda: generator.use(second))
        (used,) = generator.archives  # after its last step the new ones are in already
        assert (drawn(generator) == pictures[used]).all(), number
        assert used == first or number > lines * 0.9
    generator.release()
    after = generator.family.module("unet").state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def lab_family(source: Path) -> Any:
    """The base model anew: each variant is trained on a fresh one."""
    return Generator(str(source), "cpu").family
