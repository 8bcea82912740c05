"""The real server of predictions: weights from an address, what they draw, and that no mistake leaves a trace."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from preprocessing.errors import LONGEST_MESSAGE
from tests.cog import service
from tests.cog.conftest import pixels
from tests.cog.outside import Outside
from tests.cog.service import Service

PICTURE = {"prompt": "a photo of TOK", "seed": 7, "num_inference_steps": 3}


def drawn(artist: Service, **given: Any) -> list[bytes]:
    result = artist.run(PICTURE | given)
    assert result["status"] == "succeeded", result
    return [service.content(url) for url in result["output"]]


def png(size: tuple[int, int], colour: Any, mode: str = "RGB") -> str:
    packed = io.BytesIO()
    Image.new(mode, size, colour).save(packed, "PNG")
    return service.data_url(packed.getvalue(), "image/png")


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def colours(picture: Image.Image) -> set[Any]:
    return {colour for _, colour in picture.getcolors(picture.width * picture.height)}


@pytest.fixture
def base(artist: Service, tiny_sd: Path) -> bytes:
    """What the base model alone draws."""
    return drawn(artist, base_model=str(tiny_sd))[0]


def test_weights_from_an_address_draw_and_leave(artist: Service, world: Outside, weights: str, base: bytes) -> None:
    first, second = drawn(artist, replicate_weights=weights, num_outputs=2)
    assert opened(first).size == (32, 32)
    assert pixels(first) not in (pixels(base), pixels(second))
    assert drawn(artist, replicate_weights=weights, seed=8)[0] == second  # its own seed, whatever its neighbours
    assert world.fetched.count(urlsplit(weights).path) == 1  # the cache has them
    same = service.data_url(world.files[urlsplit(weights).path], "application/x-tar")
    assert pixels(drawn(artist, replicate_weights=same)[0]) == pixels(first)


def test_after_weights_were_in_the_base_is_as_before(artist: Service, weights: str, base: bytes, tiny_sd: Path) -> None:
    drawn(artist, replicate_weights=weights)
    assert drawn(artist, base_model=str(tiny_sd))[0] == base


def test_the_seed_is_told(artist: Service, tiny_sd: Path) -> None:
    given = {"prompt": "x", "base_model": str(tiny_sd), "num_inference_steps": 1}
    result = artist.run(given)
    told = result["logs"].split("seed: ")[1].split()[0]
    again = artist.run(given | {"seed": int(told)})
    assert service.content(again["output"][0]) == service.content(result["output"][0])


def test_image_to_image_and_inpainting(artist: Service, tiny_sd: Path) -> None:
    start = {"base_model": str(tiny_sd), "image": png((32, 32), (250, 10, 10))}
    whole = opened(drawn(artist, **start, prompt_strength=1.0)[0])
    kept = opened(drawn(artist, **start, prompt_strength=0.0)[0])
    assert colours(kept) == {(250, 10, 10)} != colours(whole)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    packed = io.BytesIO()
    mask.save(packed, "PNG")
    part = opened(drawn(artist, **start, mask=service.data_url(packed.getvalue(), "image/png"))[0])
    assert colours(part.crop((0, 0, 16, 32))) == {(250, 10, 10)}
    assert colours(part.crop((16, 0, 32, 32))) != {(250, 10, 10)}


MISTAKES = [
    ({"replicate_weights": "{served}/nowhere.tar?token=s3cret"}, "/nowhere.tar cannot be downloaded (status 404)"),
    ({"replicate_weights": "http://me:s3cret@127.0.0.1:9/x?token=s3cret"}, "weights http://127.0.0.1:9/x cannot be"),
    ({"replicate_weights": "data:application/x-tar;base64,AAAA"}, "tar"),
    ({"replicate_weights": "data:application/x-tar;base64,%%%"}, "base64"),
    ({"replicate_weights": "nowhere at all"}, "weights nowhere at all do not exist"),
    ({"replicate_weights": "{served}/pickle"}, "pickle"),
    ({"replicate_weights": "{served}/cut"}, "is not a whole tar"),
    ({"image": "{served}/nowhere.png?token=s3cret"}, "/nowhere.png cannot be downloaded (status 404)"),
    ({"image": "data:image/png;base64,AAAA"}, "cannot be read"),
    ({"mask": png((32, 32), 255, "L")}, "give image too"),
    ({"mask": png((16, 16), 255, "L"), "image": png((32, 32), 5, "L")}, "of the same size"),
    ({"width": 33}, "width 33 is not a multiple of"),
    ({"base_model": "nobody/nothing"}, "base_model 'nobody/nothing'"),
]


@pytest.mark.parametrize(("wrong", "told"), MISTAKES)
def test_a_mistake_is_one_short_sentence_and_changes_nothing(
    wrong: dict[str, Any], told: str, artist: Service, world: Outside, weights: str
) -> None:
    before = drawn(artist, replicate_weights=weights)
    whole = world.files[urlsplit(weights).path]
    world.files |= {"/pickle": b"\x80\x02}q\x00.", "/cut": whole[: len(whole) // 2]}
    start = artist.log.stat().st_size
    given = {name: v.replace("{served}", world.address) if isinstance(v, str) else v for name, v in wrong.items()}
    result = artist.run(PICTURE | {"replicate_weights": weights} | given)
    assert result["status"] == "failed"
    assert told in result["error"]
    assert len(result["error"]) < LONGEST_MESSAGE + len("Input validation error: ") and "\n" not in result["error"]
    log = artist.log.read_bytes()[start:].decode()
    assert not any("s3cret" in text or "Traceback" in text for text in (result["error"], result["logs"], log))
    assert drawn(artist, replicate_weights=weights) == before


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"prompt": 5}, "prompt"),
        ({"num_outputs": 0}, "num_outputs"),
        ({"scheduler": "eulr"}, "scheduler"),
        ({"lora_scale": 5}, "lora_scale"),
    ],
)
def test_what_the_schema_refuses(wrong: dict[str, Any], field: str, artist: Service) -> None:
    answer = artist.call("POST", "/predictions", {"input": PICTURE | wrong})
    assert answer.status == 422
    assert [one["loc"][-1] for one in answer.body["detail"]] == [field]


def test_an_unknown_input_is_dropped_by_cog_which_says_so_in_its_log(
    artist: Service, tiny_sd: Path, base: bytes
) -> None:
    assert drawn(artist, base_model=str(tiny_sd), negative="x")[0] == base
    assert "Stripped unknown input fields" in artist.log.read_text(encoding="utf-8")


def test_a_cancel_leaves_the_weights_as_they_were(artist: Service, weights: str) -> None:
    before = drawn(artist, replicate_weights=weights)
    endless = PICTURE | {"replicate_weights": weights, "num_inference_steps": 1000, "num_outputs": 64}
    assert artist.start("endless", endless).status == 202
    artist.poll("endless", lambda state: state["status"] == "processing")
    assert artist.call("POST", "/predictions", {"input": PICTURE}).status == 409
    assert artist.call("POST", "/predictions/endless/cancel").status == 200
    assert artist.idle(10) < 2
    assert drawn(artist, replicate_weights=weights) == before
