"""The style that zipping is measured with; the LoRAs are the job's, the judging is the oracle's."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from benchmarks import zip_lora
from toybox.world import random_scene, render


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    rng = random.Random(0)
    return [render(random_scene(rng)) for _ in range(60)]


def test_a_style_can_be_told_and_undone(scenes: list[Image.Image]) -> None:
    pale = [zip_lora.paled(scene) for scene in scenes]
    assert all(map(zip_lora.is_pale, pale))
    for scene, light in zip(scenes, pale, strict=True):
        apart = np.abs(np.asarray(zip_lora.whole(light), int) - np.asarray(scene, int))
        assert apart.max() <= 1


def test_scenes_are_hardly_ever_pale_of_themselves(scenes: list[Image.Image]) -> None:
    assert np.mean([zip_lora.is_pale(scene) for scene in scenes]) <= 0.1


def test_a_subject_counts_as_it_was_drawn(scenes: list[Image.Image]) -> None:
    class Judge:
        """Finds the subject in every picture that is one of the scenes, give or take rounding."""

        def scores(self, pictures: list[Image.Image]) -> dict[str, float]:
            def known(picture: Image.Image) -> bool:
                return any(np.abs(np.asarray(picture, int) - np.asarray(scene, int)).max() <= 1 for scene in scenes)

            found = float(np.mean([known(picture) for picture in pictures]))
            return {"subject": found, "background": found, "position": found, "likeness": found}

    dark = [scene for scene in scenes if not zip_lora.is_pale(scene)][:4]
    found = zip_lora.judged(Judge(), [*dark[:3], zip_lora.paled(dark[3])])
    assert found == {"pale": 0.25, "subject": 0.25, "background": 0.25, "position": 0.25, "subject, not pale": 0.75}


def test_the_table_has_the_means() -> None:
    run = {name: {"pale": 0.0, "subject": 1.0} for name in zip_lora.SETS}
    other = run | {"zipped": {"pale": 1.0, "subject": 0.5}}
    lines = zip_lora.table({"robot/0": run, "robot/1": other}).splitlines()
    assert lines[-1] == "| zipped | 2 | 0.50 | 0.75 |"
