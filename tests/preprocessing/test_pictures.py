"""Every way of storing a picture comes out as upright RGB on white; what cannot be read says why."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from pillow_heif import register_heif_opener

from preprocessing.limits import Limits
from preprocessing.pictures import UnreadablePicture, decode, is_picture

register_heif_opener()
ORIENTATION = 0x0112


def noise(height: int = 24, width: int = 40, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth() -> Image.Image:
    """Colours that any lossy format keeps nearly: red grows to the right, green downwards."""
    down, right = np.mgrid[0:64, 0:96]
    return Image.fromarray(np.stack([right * 2, down * 3, np.full_like(down, 90)], axis=-1).astype(np.uint8))


def saved(path: Path, image: Image.Image, kind: str = "PNG", **options: object) -> Path:
    image.save(path, kind, **options)
    return path


def pixels(path: Path) -> np.ndarray:
    picture = decode(path)
    assert picture.rgb.mode == "RGB"
    return np.asarray(picture.rgb).astype(int)


# How a camera stored what we want to see upright, by the EXIF standard's table of the 0th row and 0th column.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[::-1],
    7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda x: x.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(tmp_path, orientation, kind):
    upright = noise()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    options = {"lossless": True} if kind == "WEBP" else {}
    path = saved(tmp_path / "x", stored, kind, exif=exif, **options)
    assert np.array_equal(pixels(path), upright)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["JPEG", "HEIF", "AVIF"])
def test_exif_orientation_is_applied_once_by_lossy_formats(tmp_path, orientation, kind):
    upright = np.asarray(smooth())
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    got = pixels(saved(tmp_path / "x", stored, kind, exif=exif.tobytes()))
    assert np.abs(got - upright).max() <= 12


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_malformed_exif_data_do_not_spoil_a_picture(tmp_path, exif):
    assert np.array_equal(pixels(saved(tmp_path / "x", Image.fromarray(noise()), exif=exif)), noise())


def test_alpha_turns_with_the_picture(tmp_path):
    upright = noise(channels=4)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = saved(tmp_path / "x", Image.fromarray(np.ascontiguousarray(STORED[6](upright))), exif=exif)
    assert np.array_equal(np.asarray(decode(path).alpha), upright[..., 3])


def test_alpha_is_flattened_on_white(tmp_path):
    rgba = noise(channels=4)
    picture = decode(saved(tmp_path / "x", Image.fromarray(rgba)))
    alpha = rgba[..., 3:].astype(float) / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(picture.rgb) - expected).max() <= 1
    assert np.array_equal(np.asarray(picture.alpha), rgba[..., 3])


def test_opaque_alpha_is_no_alpha(tmp_path):
    image = Image.fromarray(noise()).convert("RGBA")
    assert decode(saved(tmp_path / "x", image)).alpha is None


def test_transparency_of_palettes_grey_and_single_colours(tmp_path):
    red_and_clear = np.zeros((8, 8), np.uint8)
    red_and_clear[:, 4:] = 1
    palette = Image.fromarray(red_and_clear)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    grey = Image.fromarray(red_and_clear * 200)
    colour = Image.fromarray(np.stack([255 - red_and_clear * 255, red_and_clear * 0, red_and_clear * 255], -1))
    cases = {
        "index": (palette, {"transparency": 1}, (255, 0, 0)),
        "bytes": (palette, {"transparency": b"\xff\x00"}, (255, 0, 0)),
        "grey": (grey, {"transparency": 200}, (0, 0, 0)),
        "colour": (colour, {"transparency": (0, 0, 255)}, (255, 0, 0)),
    }
    for name, (image, options, left) in cases.items():
        path = saved(tmp_path / name, image, **options)
        got = pixels(path)
        assert tuple(got[0, 0]) == left, name
        assert tuple(got[0, 7]) == (255, 255, 255), name
        assert np.array_equal(np.asarray(decode(path).alpha), 255 - red_and_clear * 255), name


def test_grey_with_alpha(tmp_path):
    values = np.stack([np.full((4, 4), 100, np.uint8), np.full((4, 4), 128, np.uint8)], -1)
    assert pixels(saved(tmp_path / "x", Image.fromarray(values, "LA")))[0, 0] == pytest.approx([177] * 3, abs=1)


def test_one_bit_and_grey(tmp_path):
    bits = np.eye(8, dtype=bool)
    assert np.array_equal(pixels(saved(tmp_path / "bits", Image.fromarray(bits)))[..., 1], bits * np.uint8(255))
    grey = noise()[..., 0]
    assert np.array_equal(pixels(saved(tmp_path / "grey", Image.fromarray(grey)))[..., 2], grey)


def png_16_bit(values: np.ndarray) -> bytes:
    """A PNG with 16 bits a channel, which Pillow cannot write in colour. [H, W, C], C of 1 to 4."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = values.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_keeps_its_brightness(tmp_path, channels):
    values = np.random.default_rng(0).integers(0, 65536, (8, 8, channels))
    if channels in (2, 4):
        values[..., -1] = 65535
    (tmp_path / "x").write_bytes(png_16_bit(values))
    expected = values[..., : 1 if channels < 3 else 3] / 257
    assert np.abs(pixels(tmp_path / "x") - expected).max() <= 1


def test_wide_grey_is_scaled_by_what_its_values_span(tmp_path):
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    cases = {
        "16-bit tiff": (ramp * 65535).astype(np.uint16),
        "32-bit tiff of 16-bit values": (ramp * 65535).astype(np.int32),
        "32-bit tiff of 8-bit values": (ramp * 255).astype(np.int32),
        "float of 0 to 1": ramp.astype(np.float32),
        "float of 0 to 255": (ramp * 255).astype(np.float32),
        "float of any span": (ramp * 1e6).astype(np.float32),
    }
    for name, values in cases.items():
        got = pixels(saved(tmp_path / name, Image.fromarray(values), "TIFF"))
        assert np.abs(got[..., 0] - ramp * 255).max() <= 1.01, name
    values = np.array([[np.nan, np.inf], [0.5, 1.0]], np.float32)
    got = pixels(saved(tmp_path / "nan", Image.fromarray(values), "TIFF"))
    assert got[..., 0].tolist() == [[0, 0], [128, 255]]


def test_black_16_bit_picture(tmp_path):
    path = saved(tmp_path / "x", Image.fromarray(np.zeros((4, 4), np.int32)), "TIFF")
    assert pixels(path).max() == 0


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(tmp_path, kind):
    for ink, expected in {
        (255, 0, 0, 0): (0, 255, 255),
        (0, 255, 255, 0): (255, 0, 0),
        (0, 0, 0, 255): (0, 0, 0),
        (0, 0, 0, 0): (255, 255, 255),
    }.items():
        path = saved(tmp_path / "x", Image.new("CMYK", (16, 16), ink), kind)
        assert pixels(path)[8, 8] == pytest.approx(expected, abs=3)


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("JPEG", 8), ("WEBP", 12), ("AVIF", 8), ("HEIF", 8), ("JPEG2000", 1), ("QOI", 0), ("PPM", 0)],
)
def test_formats(tmp_path, kind, tolerance):
    path = saved(tmp_path / "any name", smooth(), kind)
    assert np.abs(pixels(path) - np.asarray(smooth())).max() <= tolerance
    assert is_picture(path)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame(tmp_path, kind):
    frames = [Image.new("RGB", (32, 16), colour) for colour in ("red", "lime", "blue")]
    path = saved(tmp_path / "x", frames[0], kind, save_all=True, append_images=frames[1:])
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert pixels(path)[8, 16] == pytest.approx([255, 0, 0], abs=4)


def swapped_profile() -> bytes:
    """sRGB's profile with red and green exchanged, under another name."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    name = "sRGB built-in".encode("utf-16-be")
    assert name in data
    return bytes(data.replace(name, "sRGB swapped!".encode("utf-16-be")))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_profiles_are_applied(tmp_path, mode):
    image = Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode)
    path = saved(tmp_path / "x", image, icc_profile=swapped_profile())
    assert pixels(path)[4, 4] == pytest.approx([0, 255, 0], abs=2)


def test_srgb_profile_changes_nothing(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(pixels(saved(tmp_path / "x", Image.fromarray(noise()), icc_profile=profile)), noise())


@pytest.mark.parametrize("profile", [b"no profile", swapped_profile()[:200], b"\0" * 128, b"\x80" * 300])
def test_broken_profiles_are_ignored_as_viewers_do(tmp_path, profile):
    path = saved(tmp_path / "x", Image.fromarray(noise()), icc_profile=profile)
    assert np.array_equal(pixels(path), noise())


def test_profile_whose_colour_space_has_no_name_is_ignored(tmp_path):
    profile = bytearray(swapped_profile())
    profile[16:20] = b"\x80\x80\x80\x80"
    path = saved(tmp_path / "x", Image.fromarray(noise()), icc_profile=bytes(profile))
    assert np.array_equal(pixels(path), noise())


def test_profile_of_another_colour_space_is_ignored(tmp_path):
    path = saved(tmp_path / "x", Image.new("L", (8, 8), 77), icc_profile=swapped_profile())
    assert pixels(path)[4, 4].tolist() == [77, 77, 77]


def unreadable(path: Path, words: str, limits: Limits | None = None) -> None:
    with pytest.raises(UnreadablePicture, match=words) as caught:
        decode(path, limits or Limits())
    assert str(path) not in str(caught.value)


@pytest.mark.parametrize("size", [(60_000, 60_000), (20_000, 5_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_picture_bombs_are_not_decoded(tmp_path, size):
    data = bytearray(png_16_bit(np.zeros((1, 1, 1))))
    data[16:24] = struct.pack(">II", *size)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    (tmp_path / "x.png").write_bytes(data)
    unreadable(tmp_path / "x.png", "over the limit")
    assert is_picture(tmp_path / "x.png")


def test_limit_of_pixels_is_exact(tmp_path):
    path = saved(tmp_path / "x", Image.new("RGB", (20, 10)))
    assert decode(path, Limits(pixels=200)).rgb.size == (20, 10)
    unreadable(path, "20 x 10 pixels, over the limit of 199", Limits(pixels=199))


def test_what_is_no_picture_says_so(tmp_path):
    rng = random.Random(0)
    cases = {
        "noise.png": rng.randbytes(5000),
        "empty.png": b"",
        "text.png": b"hello",
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "zip.png": b"PK\x03\x04" + bytes(100),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        unreadable(tmp_path / name, "not a picture of a known format")
        assert not is_picture(tmp_path / name)


def test_wholly_transparent_pictures_show_nothing(tmp_path):
    unreadable(saved(tmp_path / "x", Image.new("RGBA", (8, 8), (255, 0, 0, 0))), "wholly transparent")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "HEIF", "AVIF"])
def test_cut_off_pictures_are_damaged(tmp_path, kind):
    whole = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(whole, kind)
    (tmp_path / "x").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    unreadable(tmp_path / "x", "damaged|not a picture")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "HEIF", "AVIF", "JPEG2000", "QOI", "PPM"]
)
def test_random_damage_never_ends_in_another_error(tmp_path, kind):
    rng = random.Random(kind)
    whole = io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    options = {} if kind in ("GIF", "BMP", "JPEG2000", "QOI", "PPM") else {"exif": exif}
    Image.fromarray(noise()).save(whole, kind, **options)
    path = tmp_path / "x"
    for _ in range(60):
        data = bytearray(whole.getvalue())
        for _ in range(rng.choice((1, 2, 20))):
            # Headers matter most, and lie at the start.
            place = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 200))
            data[place] = rng.randrange(256)
        path.write_bytes(data)
        try:
            assert decode(path, Limits(pixels=10_000)).rgb.mode == "RGB"
        except UnreadablePicture as error:
            assert str(error)


def test_trouble_of_the_machine_is_no_bad_picture(tmp_path):
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "none.png")
