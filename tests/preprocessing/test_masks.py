"""Masks: the right thing shows, in the size of its picture, by alpha, user, words or faces."""

import numpy as np
import pytest
from PIL import Image, ImageDraw
from skimage import data

from preprocessing.archive import SourceFile
from preprocessing.buckets import fit
from preprocessing.masks import box_of, face_mask, find_faces, read_mask
from preprocessing.pictures import UnreadablePicture
from preprocessing.prepare import prepare
from preprocessing.settings import PrepareSettings
from preprocessing.text_masks import TextMasker
from preprocessing.user_masks import pair_masks

FACE = (165, 60, 280, 175)  # of the astronaut in scikit-image's sample, read off the picture


def astronaut() -> Image.Image:
    return Image.fromarray(data.astronaut())


def settings(source, **changes) -> PrepareSettings:
    return PrepareSettings(**{"input_images": source, "resolution": 64, "captioner": "none"} | changes)


def overlap(first, second) -> float:
    """Intersection over union of two boxes."""
    sides = [max(0, min(first[i + 2], second[i + 2]) - max(first[i], second[i])) for i in (0, 1)]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return sides[0] * sides[1] / (sum(areas) - sides[0] * sides[1])


@pytest.mark.parametrize("scale", [0.5, 1, 3])
def test_a_photographed_face_is_found_at_any_size(scale):
    picture = astronaut().resize([round(side * scale) for side in astronaut().size])
    faces = find_faces(picture)
    assert overlap([edge / scale for edge in faces[0]], FACE) > 0.5
    mask = face_mask(picture)
    assert (mask.mode, mask.size) == ("L", picture.size)
    values = np.asarray(mask.resize(astronaut().size))
    assert values[75:150, 190:255].min() > 200  # eyes, nose and mouth
    assert values[300:].max() == 0 and values[:, 400:].max() == 0


def test_pictures_without_a_face_have_no_mask():
    for name in ("chelsea", "coffee", "brick"):
        assert face_mask(Image.fromarray(getattr(data, name)()).convert("RGB")) is None
    assert face_mask(Image.new("RGB", (5, 3))) is None


def test_box_of_a_mask():
    mask = Image.new("L", (40, 30), 100)
    assert box_of(mask) is None
    mask.paste(200, (5, 6, 20, 28))
    assert box_of(mask) == (5, 6, 20, 28)


def test_users_masks_are_read_by_alpha_or_brightness_and_brought_to_size(tmp_path):
    grey = Image.new("L", (20, 10))
    grey.paste(255, (10, 0, 20, 10))
    grey.save(tmp_path / "grey.png")
    clear = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (10, 0, 20, 10))
    clear.save(tmp_path / "clear.png")
    for name in ("grey.png", "clear.png"):
        mask = read_mask(tmp_path / name, (40, 20))
        assert mask.size == (40, 20)
        assert np.asarray(mask)[:, 24:].min() == 255 and np.asarray(mask)[:, :16].max() == 0


def test_masks_that_do_not_fit_are_told(tmp_path):
    Image.new("L", (20, 10), 255).save(tmp_path / "shape.png")
    Image.new("L", (20, 20)).save(tmp_path / "black.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    for name, words in {"shape": "not the shape", "black": "shows nothing", "broken": "not a picture"}.items():
        with pytest.raises(UnreadablePicture, match=words):
            read_mask(tmp_path / f"{name}.png", (20, 20))


def paired(*names: str):
    pictures, masks, told = pair_masks([SourceFile(name, None) for name in names])
    return [file.name for file in pictures], {name: file.name for name, file in masks.items()}, told


def test_masks_find_their_pictures():
    pictures, masks, told = paired(
        "a.jpg", "a.mask.png", "b.png", "b.png.mask.png", "deep/c.webp", "deep/masks/c.png", "masks/deep/d.png",
        "deep/d.png", "images/e.png", "masks/e.PNG", "F.png", "f.MASK.png",
    )  # fmt: skip
    assert pictures == ["a.jpg", "b.png", "deep/c.webp", "deep/d.png", "images/e.png", "F.png"]
    assert masks == {
        "a.jpg": "a.mask.png", "b.png": "b.png.mask.png", "deep/c.webp": "deep/masks/c.png",
        "deep/d.png": "masks/deep/d.png", "images/e.png": "masks/e.PNG", "F.png": "f.MASK.png",
    }  # fmt: skip
    assert len(told) == 6


def test_pictures_of_masks_are_pictures_and_masks_of_nothing_are_told():
    pictures, masks, told = paired(
        "masks/venice.jpg", "masks/rome.jpg", "lost.mask.png", "x.png", "x.mask.png", "masks/x.png"
    )
    assert pictures == ["masks/venice.jpg", "masks/rome.jpg", "x.png"]
    assert masks == {"x.png": "x.mask.png"}
    assert {one.source: getattr(one, "reason", "used") for one in told} == {
        "lost.mask.png": "a mask without a picture of the same name beside it",
        "x.mask.png": "used",
        "masks/x.png": "another mask of x.png is used",
    }


def test_a_users_mask_wins_and_goes_through_the_same_crop(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGBA", (200, 100), (255, 0, 0, 128)).save(folder / "a.png")
    mask = Image.new("L", (200, 100))
    ImageDraw.Draw(mask).rectangle((60, 0, 99, 99), fill=255)
    mask.save(folder / "a.mask.png")
    for changes in ({}, {"mask_from": "alpha"}, {"mask_from": "face"}):
        dataset = prepare(settings(folder, **changes), 8, tmp_path / f"out{len(changes)}{changes.get('mask_from')}")
        (item,) = dataset.items
        with Image.open(dataset.folder / item.mask) as image:
            expected = fit((200, 100), item.size).apply(mask, Image.Resampling.BILINEAR)
            assert np.array_equal(np.asarray(image), np.asarray(expected))
        assert "masked by the mask in the upload" in item.notes
        assert [(aside.source, aside.use) for aside in dataset.asides] == [("a.mask.png", "mask of a.png")]
    assert prepare(settings(folder, mask_from="none"), 8, tmp_path / "none").items[0].mask is None


def test_the_background_keeps_the_weight_that_it_is_given(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 32, 64))
    half.save(folder / "a.mask.png")
    dataset = prepare(settings(folder, mask_background=0.2), 8, tmp_path / "out")
    with Image.open(dataset.folder / dataset.items[0].mask) as image:
        assert image.getpixel((60, 30)) == 51 and image.getpixel((3, 30)) == 255


def test_mode_face_masks_and_crops_to_the_face(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    wide = Image.new("RGB", (1400, 512), "grey")
    wide.paste(astronaut(), (888, 0))
    wide.save(folder / "a.png")
    Image.fromarray(data.chelsea()).save(folder / "cat.png")
    dataset = prepare(settings(folder, mode="face"), 8, tmp_path / "out")
    face, cat = dataset.items
    with Image.open(dataset.folder / face.image) as image:
        assert len(find_faces(image.convert("RGB").resize([side * 4 for side in image.size]))) == 1
    left, right = (face.crop[0] / face.resized_size[0], (face.crop[0] + face.size[0]) / face.resized_size[0])
    assert left < (888 + FACE[0]) / 1400 and (888 + FACE[2]) / 1400 < right
    assert face.mask and cat.mask is None
    assert "no face found: trained without a mask" in cat.notes
    assert face.caption == "a photo of TOK"
    assert dataset.rejects == ()


@pytest.fixture(scope="session")
def clipseg_folder(tmp_path_factory, word_tokenizer):
    """A stock CLIPSeg folder, untaught, whose answer is made to follow the picture's brightness."""
    import torch
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = word_tokenizer(["<pad>", "<s>", "</s>"], pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = CLIPSegConfig(
        text_config=shape
        | {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1},
        vision_config=shape | {"image_size": 64, "patch_size": 16},
        projection_dim=16,
        reduce_dim=8,
        extract_layers=[0, 1],
        conditional_layer=0,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    model = CLIPSegForImageSegmentation(config).eval()
    images = ViTImageProcessorPil(size={"height": 64, "width": 64})
    teach_halves(model, tokenizer, images)
    folder = tmp_path_factory.mktemp("clipseg")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    return folder


def half_white(where: str, size=(64, 64)) -> Image.Image:
    picture = Image.new("RGB", size)
    across, down = size
    box = {"left": (0, 0, across // 2, down), "right": (across // 2, 0, across, down), "none": (0, 0, 0, 0)}[where]
    picture.paste("white", box)
    return picture


def teach_halves(model, tokenizer, images) -> None:
    import torch

    pictures = [half_white(where) for where in ("left", "right", "none")]
    words = tokenizer(["red"] * 3, return_tensors="pt")
    pixels = images(images=pictures, return_tensors="pt")["pixel_values"]
    wanted = torch.stack([torch.from_numpy(np.asarray(picture.convert("L")).copy()) for picture in pictures]) / 255
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(110):
        logits = model(
            input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=pixels
        ).logits.reshape(wanted.shape)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.mark.filterwarnings("ignore")
def test_masks_by_words_lie_where_the_model_sees_them(clipseg_folder):
    masker = TextMasker("red", str(clipseg_folder))
    left, right, none = masker.masks([half_white("left", (80, 40)), half_white("right"), half_white("none")])
    assert (left.mode, left.size, right.size) == ("L", (80, 40), (64, 64))
    assert np.asarray(left)[:, :24].mean() > 200 and np.asarray(left)[:, 60:].mean() < 60
    assert np.asarray(right)[:, 44:].mean() > 200 and np.asarray(right)[:, :16].mean() < 60
    assert none is None


@pytest.mark.filterwarnings("ignore")
def test_mask_text_masks_the_pictures_of_an_upload_and_crops_to_them(tmp_path, clipseg_folder):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("left", "right", "none"):
        half_white(name, (160, 80)).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"nothing")
    half_white("left", (160, 80)).save(folder / "own.png")
    half_white("right", (160, 80)).save(folder / "own.mask.png")
    chosen = settings(folder, mask_from="text", mask_prompt="red", mask_model=str(clipseg_folder), resolution=32)
    chosen = chosen.model_copy(update={"crop": "mask", "crop_margin": 0.0, "bucket_ratio": 1.0})
    dataset = prepare(chosen, 8, tmp_path / "out")
    items = {item.source: item for item in dataset.items}
    assert [reject.source for reject in dataset.rejects] == ["broken.png"]
    assert items["none.png"].mask is None and "nothing of mask_prompt found" in items["none.png"].notes[0]
    assert "masked by the mask in the upload" in items["own.png"].notes
    middles = {name: item.crop[0] + item.size[0] / 2 - item.resized_size[0] / 2 for name, item in items.items()}
    assert middles["left.png"] < 0 < middles["right.png"] and abs(middles["none.png"]) <= 1
    assert not (dataset.folder / "whole").exists()
    again = prepare(chosen.model_copy(update={"trigger_word": "SKS"}), 8, tmp_path / "out")
    assert [item.digest for item in again.items] == [item.digest for item in dataset.items]
