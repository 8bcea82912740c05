"""The scores of conditions: a copy of what was asked for scores 1, another scene does not."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image, ImageChops

from toybox.captions import caption
from toybox.condition_score import edges_obeyed, known_kept, right_half, score_condition
from toybox.prompts import base_scenes
from toybox.world import render

FIRST, SECOND = (render(scene) for scene in base_scenes(2))
BLANK = Image.new("RGB", FIRST.size, "white")


def test_edges_are_obeyed_whatever_the_colours_and_to_a_pixel():
    assert edges_obeyed(FIRST, FIRST) == 1
    assert edges_obeyed(ImageChops.invert(FIRST), FIRST) == pytest.approx(1, abs=0.02)
    moved = ImageChops.offset(FIRST, 1, 0)
    assert edges_obeyed(FIRST, SECOND) < 0.6 < 0.85 < edges_obeyed(moved, FIRST)


def test_no_edges_where_none_are_wanted_is_right_and_else_wrong():
    assert edges_obeyed(BLANK, BLANK) == 1
    assert edges_obeyed(BLANK, FIRST) == edges_obeyed(FIRST, BLANK) == 0


def test_what_is_known_is_compared_outside_the_hole_alone():
    hole = right_half()
    assert known_kept(Image.composite(BLANK, FIRST, hole), FIRST, hole) == 1
    black = Image.new("RGB", FIRST.size)
    assert known_kept(Image.composite(FIRST, black, hole), BLANK, hole) == 0


@pytest.mark.parametrize("told", [False, True])
def test_a_condition_is_scored_by_what_it_alone_can_tell_or_beside_its_caption(told: bool):
    """A generator that copies its condition is right in everything, and one that draws one scene always is not."""
    seen, wording = [], {caption(scene) if told else "" for scene in base_scenes(8)}

    class Copies:
        manifests = ()

        def use(self, weights: Path) -> None:
            self.manifests = [SimpleNamespace(settings={"condition_tasks": ["fill"]})]

        def draw_prompts(self, prompts, seeds, settings):
            assert wording.issuperset(prompts)
            if settings.condition is None:
                return [render(base_scenes(8)[0]) for _ in prompts]
            assert not settings.keep_known
            seen.append(Image.open(settings.mask).getextrema())
            with Image.open(settings.condition[0]) as picture:
                return [picture.convert("RGB")]

    table = score_condition(Copies(), Path("unused.tar"), 8, told)
    assert min(table["with"].values()) == 1 and max(table["without"].values()) < 1
    assert seen == [(0, 255)] * 8
