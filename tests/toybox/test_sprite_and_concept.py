"""Reading sprites, the split of the backgrounds, and the archives that are made of a sprite."""

import collections
import io
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageDraw

from preprocessing.errors import UserError
from toybox import concept
from toybox.draw_sprites import SIDE, known
from toybox.draw_sprites import SPRITES as DRAWN
from toybox.finder import Finder, find_pair
from toybox.palette import COLOURS
from toybox.prompts import base_scenes
from toybox.score import SPRITES
from toybox.sprite import MIN_COLOURS, combinations, for_training, load_sprite, visible_colours
from toybox.world import CENTRES, OVERSAMPLE, PATTERNS, RADII, SIZE, draw_background, render

ROBOT = SPRITES / "robot.png"


def disc(colour: tuple[int, int, int], size: tuple[int, int] = (90, 90)) -> Image.Image:
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    ImageDraw.Draw(picture).ellipse([0, 0, size[0] - 1, size[1] - 1], fill=colour)
    return picture


def test_every_colour_and_pattern_is_on_both_sides_of_the_split():
    sides = collections.Counter()
    for pattern in PATTERNS:
        for colour in COLOURS:
            side = for_training(pattern, colour)
            sides.update([side, (side, pattern), (side, colour)])
    assert sides[True] + sides[False] == 48 and 0.55 <= sides[True] / 48 <= 0.65
    assert all(sides[side, name] for side in (True, False) for name in (*PATTERNS, *COLOURS))


@pytest.mark.parametrize("colour", COLOURS)
def test_backgrounds_of_the_sprites_own_colour_are_left_out(colour):
    kept = visible_colours(disc(COLOURS[colour]))
    assert colour not in kept and len(kept) >= MIN_COLOURS


def test_a_sprite_of_all_colours_still_has_backgrounds_on_both_sides():
    picture = Image.new("RGBA", (120, 20))
    for i, colour in enumerate(COLOURS.values()):
        picture.paste((*colour, 255), (10 * i, 0, 10 * i + 10, 20))
    assert len(visible_colours(picture)) >= MIN_COLOURS
    assert combinations(picture, True, random.Random(0)) and combinations(picture, False, random.Random(0))


def test_the_transparent_margin_is_cropped(tmp_path):
    canvas = Image.new("RGBA", (300, 200), (255, 0, 0, 3))  # a faint veil is no part of the drawing
    canvas.paste(disc((10, 20, 200), (50, 80)), (200, 40), disc((10, 20, 200), (50, 80)))
    canvas.save(tmp_path / "x.png")
    assert load_sprite(tmp_path / "x.png").size == (50, 80)


def test_a_palette_with_a_transparent_colour_is_a_sprite(tmp_path):
    picture = Image.new("P", (40, 40), 0)
    picture.putpalette([0, 0, 0, 200, 30, 30])
    picture.paste(1, (10, 5, 30, 35))
    picture.save(tmp_path / "x.png", transparency=0)
    assert load_sprite(tmp_path / "x.png").size == (20, 30)


def _no_alpha(path):
    Image.new("RGB", (30, 30)).save(path)


def _empty(path):
    Image.new("RGBA", (30, 30), (200, 0, 0, 0)).save(path)


def _text(path):
    path.write_text("not a picture")


def _truncated(path):
    path.write_bytes(ROBOT.read_bytes()[:400])


HOSTILE = {
    "no alpha channel": _no_alpha,
    "fully transparent": _empty,
    "cannot be read": _text,
    "cannot be read ": _truncated,
    "does not exist": lambda path: None,
}


@pytest.mark.parametrize("message", HOSTILE)
def test_what_is_no_sprite_is_refused_in_one_sentence(tmp_path, message):
    HOSTILE[message](tmp_path / "x.png")
    with pytest.raises(UserError, match=message.strip()) as caught:
        load_sprite(tmp_path / "x.png")
    assert "x.png" in str(caught.value) and "\n" not in str(caught.value)


def make(tmp_path, *options: str) -> zipfile.ZipFile:
    out = tmp_path / "made" / "X.zip"
    args = concept.parser().parse_args(["--sprite", str(ROBOT), "--out", str(out), *options])
    concept.make_archive(args)
    assert [path.name for path in out.parent.iterdir()] == ["X.zip"]
    return zipfile.ZipFile(out)


def test_the_archive_holds_numbered_pictures_with_captions(tmp_path):
    with make(tmp_path, "--count", "12") as archive:
        assert archive.namelist() == [f"{i:03}.{kind}" for i in range(12) for kind in ("png", "txt")]
        for i in range(12):
            picture = Image.open(io.BytesIO(archive.read(f"{i:03}.png")))
            assert (picture.size, picture.mode) == ((SIZE, SIZE), "RGB")
            assert "TOK" in archive.read(f"{i:03}.txt").decode().split()
        assert len({archive.read(f"{i:03}.txt") for i in range(12)}) > 8


def test_the_same_seed_makes_the_same_bytes_and_another_does_not(tmp_path):
    archives = []
    for run, seed in enumerate(("4", "4", "5")):
        make(tmp_path / str(run), "--seed", seed).close()
        archives.append((tmp_path / str(run) / "made" / "X.zip").read_bytes())
    assert archives[0] == archives[1] != archives[2]


def test_no_captions_and_another_trigger(tmp_path):
    with make(tmp_path / "a", "--no_captions") as bare, make(tmp_path / "b", "--trigger", "<zorp>") as named:
        assert bare.namelist() == [name for name in named.namelist() if name.endswith(".png")]
        assert [bare.read(name) for name in bare.namelist()] == [named.read(name) for name in bare.namelist()]
        assert all(b"<zorp>" in named.read(name) for name in named.namelist() if name.endswith(".txt"))


def test_several_sprites_have_a_folder_each(tmp_path):
    teapot_too = ["--sprite", str(ROBOT), str(SPRITES / "teapot.png"), "--trigger", "ROB", "TEA", "--count", "3"]
    with make(tmp_path / "two", *teapot_too) as both, make(tmp_path / "one", "--trigger", "ROB", "--count", "3") as one:
        names = [f"{i:03}.{kind}" for i in range(3) for kind in ("png", "txt")]
        assert both.namelist() == [f"{folder}/{name}" for folder in ("ROB", "TEA") for name in names]
        assert [both.read(f"ROB/{name}") for name in names] == [one.read(name) for name in names]
        assert all("TEA" in both.read(f"TEA/00{i}.txt").decode().split() for i in range(3))
        assert all(both.read(f"TEA/00{i}.png") != both.read(f"ROB/00{i}.png") for i in range(3))


def test_two_sprites_together_have_a_folder_of_their_own(tmp_path):
    two = ["--sprite", str(ROBOT), str(SPRITES / "teapot.png"), "--trigger", "ROB", "TEA", "--count", "3", "--masks"]
    with make(tmp_path / "a", *two) as apart, make(tmp_path / "b", *two, "--together", "5") as together:
        names = [f"together/{i:03}.{kind}" for i in range(5) for kind in ("png", "txt", "mask.png")]
        assert together.namelist() == apart.namelist() + names
        assert all(together.read(name) == apart.read(name) for name in apart.namelist())
        finders = tuple(Finder(load_sprite(SPRITES / f"{name}.png")) for name in ("robot", "teapot"))
        for i in range(5):
            assert "ROB beside TEA" in together.read(f"together/{i:03}.txt").decode()
            picture, mask = (Image.open(together.open(f"together/{i:03}{end}.png")) for end in ("", ".mask"))
            finds = find_pair(finders, picture.convert("RGB"))
            assert all(find.found for find in finds)
            assert all(mask.getpixel((round(find.place.x), round(find.place.y))) for find in finds)


@pytest.mark.parametrize("count", [15, 30, 60])
def test_positions_sizes_and_patterns_are_covered_evenly(count):
    planned = concept.plan(load_sprite(ROBOT), count, random.Random(9))
    pairs = collections.Counter((p.position, p.size) for p in planned)
    assert len(pairs) == len(CENTRES) * len(RADII) and len(set(pairs.values())) == 1
    patterns = collections.Counter(p.background.pattern for p in planned)
    assert max(patterns.values()) - min(patterns.values()) <= count // 4
    assert all(for_training(p.background.pattern, p.background.colour) for p in planned)


def test_training_and_score_share_no_background():
    sprite = load_sprite(ROBOT)
    seen = {(p.background.pattern, p.background.colour) for p in concept.plan(sprite, 200, random.Random(1))}
    asked = {(p.background.pattern, p.background.colour) for p in concept.plan(sprite, 200, random.Random(1), False)}
    assert seen and asked and not seen & asked


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--count", "0"], "--count"),
        (["--count", "5000"], "--count"),
        (["--together", "-1"], "--together"),
        (["--together", "5"], "two sprites"),
        (["--trigger", "two words"], "--trigger"),
        (["--trigger", "A", "B"], "give 1 different"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, word):
    with pytest.raises(UserError, match=word):
        make(tmp_path, *options)
    assert not (tmp_path / "made").exists()


def test_the_command_line_ends_with_code_2_and_one_line(tmp_path):
    _no_alpha(tmp_path / "x.png")
    command = [
        sys.executable,
        "-m",
        "toybox.concept",
        "--sprite",
        str(tmp_path / "x.png"),
        "--out",
        str(tmp_path / "y"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SPRITES.parent.parent)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "alpha" in done.stderr


@pytest.mark.parametrize("draw", DRAWN)
def test_the_demo_sprites_are_what_their_script_draws(draw):
    with Image.open(SPRITES / f"{draw.__name__}.png") as shipped:
        assert shipped.mode == "RGBA" and shipped.size == (SIDE, SIDE)
        assert ImageChops.difference(shipped, draw()).getbbox(alpha_only=False) is None


def test_masks_lie_where_the_sprite_is(tmp_path):
    out = tmp_path / "x.zip"
    for wanted in ([], ["--masks"]):
        concept.main(["--sprite", str(SPRITES / "robot.png"), "--out", str(out), "--count", "3", *wanted])
        with zipfile.ZipFile(out) as archive:
            names = archive.namelist()
            assert ("001.mask.png" in names) == bool(wanted) and len(names) == (9 if wanted else 6)
    with zipfile.ZipFile(out) as archive:
        picture, mask = (Image.open(archive.open(f"001{end}.png")) for end in ("", ".mask"))
        picture.load()
        mask.load()
    assert mask.mode == "L" and mask.size == picture.size
    (pasted,) = concept.plan(load_sprite(SPRITES / "robot.png"), 3, random.Random(0))[1:2]
    bare = draw_background(pasted.background).reduce(OVERSAMPLE)
    changed = np.abs(np.asarray(picture, int) - np.asarray(bare, int)).max(axis=2) > 0
    covered = np.asarray(mask) > 0
    assert (changed <= covered).all() and changed.sum() > 0.9 * covered.sum()


def test_a_known_sprite_is_what_the_world_draws():
    finder = Finder(known("moon", "yellow"))
    moons = [scene for scene in base_scenes(200) if scene.shape == "moon"]
    assert any(scene.colour == "yellow" for scene in moons) and any(scene.colour != "yellow" for scene in moons)
    for scene in moons:
        assert finder.find(render(scene)).found == (scene.colour == "yellow")
