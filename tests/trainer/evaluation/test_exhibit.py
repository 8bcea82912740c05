"""Which pictures are drawn to judge weights, and what is read from them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from preprocessing.errors import UserError
from trainer import preview
from trainer.evaluation.exhibit import Exhibit, look, refuse_blank
from trainer.evaluation.gallery import Wish
from trainer.evaluation.pictures import diversity, is_blank, nearest, thumbnail

PROMPTS = ["a dog", "a photo of TOK", "TOK on a beach"]


def noise(seed: int, side: int = 64) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST)


def exhibit(settings, steps: int = 450, scalable: bool = True, **changes: object) -> Exhibit:
    large = {"max_train_steps": steps, "train_batch_size": 12, "class_word": "robot", "preview_seeds": (0, 1)}
    return Exhibit.of(PROMPTS, settings(**large | changes), 20, scalable)


def test_a_large_run_draws_two_seeds_at_three_strengths_with_and_without_the_trigger(settings):
    shown = exhibit(settings)
    assert shown.pairs == (("a photo of TOK", "a photo of robot"),)
    assert (shown.grid_seeds == (0, 1) and len(shown.variety_seeds) == 0) or len(shown.variety_seeds) <= 2
    rows = shown.rows(0)
    assert list(rows) == ["a photo of TOK", "a photo of robot"]
    assert [wish.strength for wish in rows["a photo of robot"]] == [None, 0.5, 1.0, 1.5]
    wished = set(shown.wishes())
    assert {Wish("a dog", 1, None), Wish("a dog", 1, 1.0), Wish("a photo of robot", 1, 1.5)} <= wished
    assert all(Wish(wish.prompt, wish.seed, None) in wished for wish in shown.subjects("TOK"))
    assert all("TOK" in wish.prompt and wish.strength == 1 for wish in shown.subjects("TOK"))


def test_a_short_run_draws_little_more_than_its_previews(settings):
    short, long = exhibit(settings, steps=3), exhibit(settings, steps=5000)
    assert len(short.grid_seeds) == 1 and not short.variety_seeds
    assert len(long.grid_seeds) == 2 and len(long.variety_seeds) == 2
    assert set(short.wishes()) < set(long.wishes())


def test_weights_without_a_strength_are_shown_at_full(settings):
    shown = exhibit(settings, scalable=False)
    assert {wish.strength for wish in shown.wishes()} == {None, 1.0}


def test_without_a_trigger_in_any_prompt_there_is_one_row(settings):
    shown = Exhibit.of(["a dog"], settings(), 20, True)
    assert list(shown.rows(0)) == ["a dog"] and shown.subjects("TOK") == []


def test_black_pictures_fail_unless_the_base_model_draws_them_too():
    wish, base = Wish("TOK", 3), Wish("TOK", 3, None)
    black, grey, drawn = (Image.new("RGB", (8, 8), (level,) * 3) for level in (0, 90, 0))
    drawn = noise(1, 8)
    assert is_blank(black) and is_blank(grey) and not is_blank(drawn)
    refuse_blank({wish: drawn, base: drawn}, [wish])
    refuse_blank({wish: black, base: black}, [wish])
    for blank in (black, grey):
        with pytest.raises(UserError, match="one colour for 'TOK' \\(seed 3\\)"):
            refuse_blank({wish: blank, base: drawn}, [wish])


def test_a_copy_is_near_and_so_is_its_mirror_image():
    pictures = [thumbnail(noise(seed)) for seed in range(6)]
    mirrored = pictures[4][:, ::-1]
    found = nearest([pictures[2], mirrored, thumbnail(noise(77))], pictures)
    assert [(one.picture, one.distance) for one in found[:2]] == [(2, 0.0), (4, 0.0)]
    assert found[2].distance == pytest.approx(1, abs=0.2)  # as far as the pictures from one another


def test_diversity_is_one_for_the_base_and_none_for_one_picture():
    base = [[thumbnail(noise(seed)) for seed in range(4)]]
    assert diversity(base, base) == pytest.approx(1)
    assert diversity([[base[0][0]] * 4], base) == 0
    half = [[0.5 * one for one in base[0]]]
    assert diversity(half, base) == pytest.approx(0.5)
    assert diversity([base[0][:1]], [base[0][:1]]) is None


def test_copies_of_the_data_set_are_counted(settings, dataset):
    shown = exhibit(settings, steps=3, preview_seeds=(0,))
    with Image.open(dataset.folder / dataset.items[1].image) as copied:
        copied.load()
    pictures = {wish: noise(i) for i, wish in enumerate(shown.wishes())}
    pictures[Wish("a photo of TOK", 0)] = copied
    seen = look(pictures, shown, dataset)
    first, neighbour = seen.neighbours[0]
    assert (first.prompt, neighbour.picture, neighbour.distance) == ("a photo of TOK", 1, 0.0)
    assert seen.near_copies == 1 / len(shown.subjects("TOK"))


def test_a_job_whose_weights_draw_black_fails(settings, dataset, monkeypatch, tmp_path):
    def drawn(base_model, archive, wishes, *_):
        return {wish: noise(1, 8) if wish.strength is None else Image.new("RGB", (8, 8)) for wish in wishes}

    monkeypatch.setattr(preview, "drawn", drawn)
    chosen = settings(output_dir=tmp_path, preview_prompts=("TOK",))
    with pytest.raises(UserError, match="a picture of one colour"):
        preview.draw_gallery(tmp_path / "x.tar", dataset, chosen, lambda *_: None)
    assert list((tmp_path / "samples").glob("*_adapted.png"))  # they can be looked at
