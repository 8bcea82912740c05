"""The scores, with the renderer in the place of a model: what is drawn right scores 1, what is drawn wrong does not."""

import argparse
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from preprocessing.errors import UserError
from toybox import score
from toybox.captions import caption
from toybox.concept import picture_of
from toybox.drawings import random_drawing
from toybox.prompts import base_scenes, kept_for_score, unrelated_scenes
from toybox.score import SPRITES, AdapterPictures, AdapterTask, judge_adapter, score_base
from toybox.shapes import SHAPES
from toybox.sprite import load_sprite
from toybox.world import CENTRES, PATTERNS, held_out, render

ROOT = Path(score.__file__).parent.parent
COUNT = 30


def renderer(scenes, alter=lambda scene: scene):
    """A model that draws the scene a prompt came from, altered."""
    known = {caption(scene): scene for scene in scenes}
    return lambda prompts: [render(alter(known[prompt])) for prompt in prompts]


def test_the_base_prompts_are_fixed_and_hold_what_the_issue_asks():
    scenes = base_scenes(200)
    assert scenes == base_scenes(200)
    assert sum(held_out(s.shape, s.colour) for s in scenes) == 40
    assert len({caption(s) for s in scenes}) == 200
    assert {s.position for s in scenes} == set(CENTRES) and {s.background.pattern for s in scenes} == set(PATTERNS)
    assert {s.shape for s in scenes} == set(SHAPES)
    assert all(s.accent is None and s.colour != s.background.colour for s in scenes)


def test_a_perfect_model_scores_everything():
    table = score_base(renderer(base_scenes(COUNT)), COUNT)
    assert [row["pictures"] for row in table.values()] == [COUNT, COUNT - COUNT // 5, COUNT // 5]
    assert all(row[name] == 1 for row in table.values() for name in score.ATTRIBUTES)


def test_each_fault_shows_in_its_own_column():
    def recentred(scene):
        return replace(scene, position="left" if scene.position != "left" else "right")

    def repainted(scene):
        if not held_out(scene.shape, scene.colour):
            return scene
        return replace(scene, colour="black" if "black" not in (scene.colour, scene.background.colour) else "yellow")

    table = score_base(renderer(base_scenes(COUNT), recentred), COUNT)
    assert table["all"]["position"] == 0 and table["all"]["shape"] == 1 and table["all"]["background"] == 1
    table = score_base(renderer(base_scenes(COUNT), repainted), COUNT)
    assert table["seen pairs"]["colour"] == 1
    assert table["held-out pairs"]["colour"] < 0.2 and table["held-out pairs"]["shape"] == 1


def test_unrelated_prompts_are_none_of_the_preservation_prompts():
    defaults = json.loads((ROOT / "toybox" / "sd" / "training_defaults.json").read_text(encoding="utf-8"))
    kept = {f"{scene.colour} {scene.shape}" for scene in unrelated_scenes(200)}
    prompts = defaults["any"]["preservation_prompts"]
    assert not [prompt for prompt in prompts for pair in kept if pair in prompt]
    assert all(kept_for_score(s.shape, s.colour) and not held_out(s.shape, s.colour) for s in unrelated_scenes(64))


@pytest.fixture(scope="module")
def task():
    sprite = load_sprite(SPRITES / "teapot.png")
    return sprite, AdapterTask.of(sprite, 12), [render(scene) for scene in unrelated_scenes(12)]


def test_a_perfect_adapter(task):
    sprite, wanted, unrelated = task
    pictures = AdapterPictures([picture_of(sprite, p) for p in wanted.subjects], unrelated, unrelated)
    result = judge_adapter(sprite, wanted, pictures)
    assert (result["subject"], result["background"], result["position"]) == (1, 1, 1)
    assert 0.95 < result["likeness"] <= 1
    assert (result["drift"], result["bleed"], result["pictures"]) == (0, 0, 12)
    assert set(result["drift_attributes"].values()) == {0}
    json.dumps(result)


def test_an_adapter_that_draws_its_subject_everywhere(task):
    sprite, wanted, unrelated = task
    subjects = [picture_of(sprite, p) for p in wanted.subjects]
    result = judge_adapter(sprite, wanted, AdapterPictures(subjects, unrelated, subjects))
    assert result["bleed"] == 1 and result["drift"] > 0.1
    assert result["drift_attributes"]["shape"] > 0.9 and result["drift_attributes"]["background"] > 0.7


def test_an_adapter_that_learned_another_subject_or_ignores_the_prompt(task):
    sprite, wanted, unrelated = task
    rng = random.Random(2)
    strangers = [picture_of(random_drawing(rng), p) for p in wanted.subjects]
    result = judge_adapter(sprite, wanted, AdapterPictures(strangers, unrelated, unrelated))
    assert result["subject"] == 0 and result["background"] > 0.9 and result["position"] > 0.9
    assert result["likeness"] < 0.6
    moved = [picture_of(sprite, p) for p in wanted.subjects[1:] + wanted.subjects[:1]]
    result = judge_adapter(sprite, wanted, AdapterPictures(moved, unrelated, unrelated))
    assert result["subject"] == 1 and result["background"] == 0 and result["position"] == 0


def test_the_subjects_prompts_carry_the_trigger_in_plain_wording(task):
    _, wanted, _ = task
    for prompt, pasted in zip(wanted.subject_prompts("zorp"), wanted.subjects, strict=True):
        ground = f"a {pasted.background.pattern} {pasted.background.colour} background"
        assert prompt.startswith(f"zorp on {ground} ")


def test_too_few_pictures_are_refused():
    args = argparse.Namespace(pictures=10, sprite=SPRITES / "robot.png", weights=Path("none.tar"))
    with pytest.raises(UserError, match="64 or more"):
        score.score_adapter(args)


def test_a_missing_sprite_ends_with_code_2_and_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "toybox.score",
        "adapter",
        "--weights",
        "x.tar",
        "--sprite",
        str(tmp_path / "no.png"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no.png" in done.stderr
