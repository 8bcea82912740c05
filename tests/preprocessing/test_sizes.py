"""Small pictures, several resolutions, repeats: every picture is accounted for, and nothing is enlarged unsaid."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as how
from hypothesis import strategies as st
from PIL import Image

from preprocessing.prepare import prepare
from preprocessing.settings import PrepareSettings


def settings(source, **changes) -> PrepareSettings:
    return PrepareSettings(**{"input_images": source, "resolution": 64, "captioner": "none"} | changes)


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def small(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    noise((200, 180)).save(folder / "large.png")
    noise((40, 40)).save(folder / "small.png")
    noise((5, 3)).save(folder / "tiny.png")
    return folder


def told(dataset) -> dict[str, tuple[tuple[int, int], tuple[str, ...]]]:
    return {item.source: (item.size, item.notes) for item in dataset.items}


def test_small_pictures_are_kept_at_their_own_size(small, tmp_path):
    dataset = prepare(settings(small), 8, tmp_path / "out")
    assert told(dataset) == {
        "large.png": ((64, 64), ()),
        "small.png": ((40, 40), ("small: trained at 40 x 40 in place of 64 x 64",)),
    }
    assert [reject.source for reject in dataset.rejects] == ["tiny.png"]
    with Image.open(dataset.folder / dataset.items[1].image) as image:
        assert np.array_equal(np.asarray(image), np.asarray(noise((40, 40))))


def test_small_pictures_are_refused(small, tmp_path):
    dataset = prepare(settings(small, small_pictures="refuse"), 8, tmp_path / "out")
    assert [item.source for item in dataset.items] == ["large.png"]
    assert [reject.source for reject in dataset.rejects] == ["small.png", "tiny.png"]
    assert dataset.rejects[0].reason.startswith("40 x 40 pixels, fewer than its bucket's 64 x 64")


def test_small_pictures_are_enlarged_and_that_is_said(small, tmp_path):
    dataset = prepare(settings(small, small_pictures="upscale"), 8, tmp_path / "out")
    assert {name: notes for name, (_, notes) in told(dataset).items()}["small.png"] == (
        "enlarged 1.6 times by Lanczos",
    )
    assert {item.source: item.size for item in dataset.items}["tiny.png"][0] > 40
    assert dataset.rejects == ()


@pytest.fixture(scope="session")
def swin_folder(tmp_path_factory):
    """A stock Swin2SR folder with random weights that enlarges twice."""
    import torch
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution
    from transformers.models.swin2sr.image_processing_pil_swin2sr import Swin2SRImageProcessorPil

    torch.manual_seed(0)
    config = Swin2SRConfig(image_size=8, embed_dim=12, depths=[1], num_heads=[2], window_size=4, upscale=2)
    folder = tmp_path_factory.mktemp("swin")
    Swin2SRForImageSuperResolution(config).save_pretrained(folder)
    Swin2SRImageProcessorPil().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
def test_a_model_enlarges_behind_the_same_setting(small, swin_folder, tmp_path):
    noise((40, 40)).save(small / "again.png")
    chosen = settings(small, small_pictures="upscale", upscale_model=str(swin_folder))
    dataset = prepare(chosen, 8, tmp_path / "out")
    plain = prepare(settings(small, small_pictures="upscale"), 8, tmp_path / "plain")
    by_name = {item.source: item for item in dataset.items}
    assert by_name["small.png"].notes == ("enlarged 1.6 times by the model",)
    assert by_name["small.png"].digest == by_name["again.png"].digest
    digests = {item.source: item.digest for item in plain.items}
    assert {name for name, item in by_name.items() if item.digest == digests[name]} == {"large.png"}
    for item in dataset.items:
        with Image.open(dataset.folder / item.image) as image:
            assert image.size == item.size
    again = prepare(chosen.model_copy(update={"trigger_word": "SKS"}), 8, tmp_path / "out")
    assert [item.digest for item in again.items] == [item.digest for item in dataset.items]


def test_several_resolutions_train_every_picture_where_it_is_large_enough(small, tmp_path):
    dataset = prepare(settings(small, resolution=32, extra_resolutions=(64, 128, 256, 32)), 8, tmp_path / "out")
    sizes = [(item.source, item.size) for item in dataset.items]
    assert sizes == [
        ("large.png", (32, 32)),
        ("large.png", (64, 64)),
        ("large.png", (136, 120)),
        ("small.png", (32, 32)),
    ]
    assert len({item.caption for item in dataset.items}) == 1
    assert len((dataset.folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_repeats_come_from_tables_and_if_wished_from_folders(small, tmp_path):
    (small / "10_dog").mkdir()
    for name in ("large", "small"):
        (small / f"{name}.png").rename(small / "10_dog" / f"{name}.png")
    (small / "metadata.csv").write_text("file_name,text,repeats\n10_dog/small.png,,3\ntiny.png,x,\n", encoding="utf-8")
    changes = {"small_pictures": "upscale"}
    dataset = prepare(settings(small, **changes), 8, tmp_path / "plain")
    assert {item.source: item.repeats for item in dataset.items} == {
        "10_dog/large.png": 1,
        "10_dog/small.png": 3,
        "tiny.png": 1,
    }
    by_folder = prepare(settings(small, folder_repeats=True, **changes), 8, tmp_path / "folders")
    assert [item.repeats for item in by_folder.items] == [10, 3, 1]
    assert by_folder.dataset_hash != dataset.dataset_hash


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=5),
    st.sampled_from(("keep", "refuse", "upscale")),
    st.sampled_from(((64, 8), (64, 32), (96, 24))),
)
@how(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_picture_ever_vanishes(tmp_path_factory, sizes, small_pictures, trained):
    folder = tmp_path_factory.mktemp("any") / "data"
    folder.mkdir()
    noise((256, 256)).save(folder / "sure.png")
    for number, size in enumerate(sizes):
        noise(size).save(folder / f"{number}.png")
    chosen = settings(folder, resolution=trained[0], extra_resolutions=(trained[0] * 2,), small_pictures=small_pictures)
    dataset = prepare(chosen, trained[1], folder.parent / "out")
    used, left_out = {item.source for item in dataset.items}, {reject.source for reject in dataset.rejects}
    assert used | left_out == {path.name for path in folder.iterdir()}
    assert not used & left_out
    for item in dataset.items:
        assert all(side % trained[1] == 0 for side in item.size)
        # Nothing is enlarged unless that was asked for and is said.
        enlarged = any(after > before for before, after in zip(item.original_size, item.resized_size, strict=True))
        assert enlarged == any(note.startswith("enlarged") for note in item.notes)
        assert small_pictures == "upscale" or not enlarged
