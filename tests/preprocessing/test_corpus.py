"""One upload of everything that people and attackers send, and the verdict that each file should get."""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pillow_heif import register_heif_opener
from skimage import data
from sklearn.datasets import load_sample_images

from preprocessing.errors import UserError
from preprocessing.findings import examine
from preprocessing.preflight import write_preflight
from preprocessing.prepare import prepare
from preprocessing.prepared import PreparedDataset
from preprocessing.settings import PrepareSettings

register_heif_opener()
SIDE = 96


@dataclass(frozen=True)
class Case:
    """A file's content, the verdict on it, and words of the reason or of what was done."""

    content: bytes
    verdict: str = "used"
    words: str = ""


def picture(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (SIDE, SIDE), **options: object) -> bytes:
    noise = Image.effect_noise(size, 60).convert("RGB")
    file = io.BytesIO()
    noise.convert(mode).save(file, kind, **options)
    return file.getvalue()


def headed_png(width: int, height: int) -> bytes:
    """A PNG that says it is so large, without its pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def flat(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height), 90).save(file, "PNG")
    return file.getvalue()


def animated(kind: str) -> bytes:
    frames = [Image.effect_noise((SIDE, SIDE), 30 + n).convert("RGB") for n in range(3)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture("JPEG", size=(140, 90), exif=exif)


LONG = "long " * 40 + "name"
CASES: dict[str, Case] = {
    # formats
    "a.jpg": Case(picture("JPEG")),
    "progressive.jpg": Case(picture("JPEG", progressive=True)),
    "b.png": Case(picture()),
    "c.webp": Case(picture("WEBP")),
    "d.heic": Case(picture("HEIF")),
    "e.avif": Case(picture("AVIF")),
    "f.tif": Case(picture("TIFF", compression="tiff_lzw")),
    "g.bmp": Case(picture("BMP")),
    "h.gif": Case(picture("GIF")),
    "i.jp2": Case(picture("JPEG2000")),
    "j.ppm": Case(picture("PPM")),
    "moving.gif": Case(animated("GIF"), "fixed", "first of 3 frames"),
    "moving.webp": Case(animated("WEBP"), "fixed", "first of 3 frames"),
    # colours
    "grey.png": Case(picture(mode="L")),
    "bits.png": Case(picture(mode="1")),
    "palette.png": Case(picture(mode="P")),
    "ink.jpg": Case(picture("JPEG", "CMYK"), "fixed", "CMYK"),
    "deep.png": Case(picture(mode="I;16"), "fixed", "8 bits"),
    "clear.png": Case(picture(mode="RGBA")),
    "upright.jpg": Case(rotated(), "fixed", "turned upright"),
    # names
    "wrong.png": Case(picture("JPEG"), "fixed", "is JPEG although"),
    "wrong.jpg": Case(picture("WEBP"), "fixed", "is WEBP although"),
    "without_ending": Case(picture()),
    "日本語 🙂.png": Case(picture()),
    unicodedata.normalize("NFC", "é à.png"): Case(picture()),
    f"{LONG}.png": Case(picture()),
    "deep/er/and/deeper/x.png": Case(picture()),
    "<b>&amp;'\".png": Case(picture()),
    "\u202egnp.exe": Case(picture(), "fixed", "ends in .exe"),
    # sizes
    "1x1.png": Case(flat(1, 1), "rejected", "fewer than"),
    "sliver.png": Case(flat(2000, 80), "fixed", "cut away"),
    "small.png": Case(flat(40, 40), "fixed", "small: trained at 40 x 40"),
    "20000x20000.png": Case(flat(20_000, 20_000), "rejected", "over the limit"),
    "bomb.png": Case(headed_png(100_000, 100_000), "rejected", "over the limit"),
    # damage
    "empty.png": Case(b"", "rejected", "not a picture"),
    "text.jpg": Case(b"hello, I am text", "rejected", "not a picture"),
    "page.png": Case(b"<!DOCTYPE html><title>404</title>", "rejected", "not a picture"),
    "cut.jpg": Case(picture("JPEG")[:900], "rejected", "damaged"),
    "cut.png": Case(picture()[:900], "rejected", "damaged"),
    "cut.webp": Case(picture("WEBP")[:500], "rejected", ""),
    "cut.heic": Case(picture("HEIF")[:500], "rejected", ""),
    "drawing.svg": Case(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "rejected", "not a picture"),
    "paper.pdf": Case(b"%PDF-1.4\n%%EOF", "rejected", "not a picture"),
    "film.mp4": Case(b"\0\0\0\x18ftypmp42" + bytes(200), "rejected", "not a picture"),
    "inner.zip": Case(b"PK\x03\x04" + bytes(100), "rejected", "not a picture"),
    # words and masks
    "a.txt": Case(b"a photo of TOK", "aside", "a.jpg"),
    "alone.txt": Case(b"nobody's", "rejected", "without a picture"),
    "captions.csv": Case(b"caption,image_file\nsomething,b.png\n", "aside", "captions"),
    "b.mask.png": Case(picture(mode="L"), "aside", "b.png"),
    "lost.mask.png": Case(picture(mode="L"), "rejected", "a mask without"),
    # systems
    "__MACOSX/._a.jpg": Case(b"\0\5\x16\7", "aside", "hidden or system"),
    ".DS_Store": Case(b"\0", "aside", "hidden or system"),
    "Thumbs.db": Case(b"\0", "aside", "hidden or system"),
    "deep/desktop.ini": Case(b"", "aside", "hidden or system"),
}


def as_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, case in CASES.items():
            archive.writestr(name, case.content)


def as_mac_zip(path: Path) -> None:
    """As the Finder packs: a folder around it, a twin in __MACOSX for every file, decomposed names without the flag."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("My pictures/", b"")
        for name, case in CASES.items():
            decomposed = unicodedata.normalize("NFD", name)
            archive.writestr(f"My pictures/{decomposed}", case.content)
            archive.writestr(f"__MACOSX/My pictures/._{decomposed.rpartition('/')[2]}", b"\0\5\x16\7")
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 7), (b"PK\x01\x02", 9)):
        place = data.find(mark)
        while place >= 0:
            data[place + offset] &= ~8
            place = data.find(mark, place + 1)
    path.write_bytes(data)


def as_tar(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, case in CASES.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(case.content)
            archive.addfile(info, io.BytesIO(case.content))


def as_folder(path: Path) -> None:
    for name, case in CASES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(case.content)


PACKERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "zip": (as_zip, ""),
    "mac zip": (as_mac_zip, "My pictures/"),
    "tar.gz": (as_tar, ""),
    "folder": (as_folder, ""),
}


def settings(source: Path, **changes: object) -> PrepareSettings:
    return PrepareSettings(**{"input_images": source, "resolution": 64, "captioner": "none"} | changes)


@pytest.fixture(scope="module", params=PACKERS)
def prepared(request, tmp_path_factory) -> tuple[PreparedDataset, str]:
    pack, prefix = PACKERS[request.param]
    folder = tmp_path_factory.mktemp("corpus")
    pack(folder / "data")
    return prepare(settings(folder / "data"), 8, folder / "prepared"), prefix


@pytest.mark.filterwarnings("ignore")
def test_every_file_gets_its_verdict(prepared):
    dataset, prefix = prepared
    found = {file.source: file for file in examine(dataset).files}
    for name, case in CASES.items():
        if name.startswith("__MACOSX") and prefix + name not in found:
            name, prefix_of = "__MACOSX", ""  # of a folder nobody looks inside
        else:
            prefix_of = prefix
        file = found[prefix_of + name]
        assert (name, file.verdict) == (name, case.verdict), file
        assert case.words in "; ".join(file.done), file
    pictures = {prefix + name for name, case in CASES.items() if case.verdict in ("used", "fixed")}
    assert {item.source for item in dataset.items} == pictures


@pytest.mark.filterwarnings("ignore")
def test_the_report_of_all_this_is_sound(prepared):
    dataset, _ = prepared
    findings = examine(dataset)
    page = write_preflight(dataset, findings).read_text(encoding="utf-8")
    assert "<b>&amp;" not in page and "&lt;b&gt;" in page
    stored = json.loads((dataset.folder / "dataset.json").read_text(encoding="utf-8"))
    assert stored["counts"]["files"] == len(findings.files)
    assert findings.counts["used"] + findings.counts["fixed"] == len({item.source for item in dataset.items})


def zip_of(path: Path, name: str, mode: int = 0, content: bytes = b"x") -> None:
    info = zipfile.ZipInfo(name)
    info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", CASES["b.png"].content)
        archive.writestr(info, content)


def tar_of(path: Path, **fields: object) -> None:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("x.png")
        for field, value in fields.items():
            setattr(info, field, value)
        archive.addfile(info)


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "zip slip": (lambda path: zip_of(path, "../../evil.png"), "leads out"),
    "zip absolute": (lambda path: zip_of(path, "/tmp/evil.png"), "absolute name"),
    "zip drive": (lambda path: zip_of(path, "C:\\evil.png"), "absolute name"),
    "zip link": (lambda path: zip_of(path, "x.png", stat.S_IFLNK | 0o777, b"/etc/passwd"), "a link"),
    "zip device": (lambda path: zip_of(path, "x.png", stat.S_IFBLK), "special file"),
    "zip bomb": (lambda path: zip_of(path, "x.png", 0, bytes(200_000_000)), "times its size"),
    "tar slip": (lambda path: tar_of(path, name="../evil.png"), "leads out"),
    "tar link": (lambda path: tar_of(path, type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link"),
    "tar hard link": (lambda path: tar_of(path, type=tarfile.LNKTYPE, linkname="a.png"), "a link"),
    "tar pipe": (lambda path: tar_of(path, type=tarfile.FIFOTYPE), "special file"),
    "cut zip": (lambda path: (as_zip(path), os.truncate(path, path.stat().st_size // 2)), "damaged|neither zip"),
    "cut tar.gz": (lambda path: (as_tar(path), os.truncate(path, path.stat().st_size // 2)), "damaged"),
    "picture": (lambda path: path.write_bytes(CASES["a.jpg"].content), "single picture"),
    "rar": (lambda path: path.write_bytes(b"Rar!\x1a\x07\x01\x00" + bytes(100)), "neither zip, tar nor tar.gz"),
    "empty": (lambda path: path.write_bytes(b""), "neither zip, tar nor tar.gz"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_end_in_one_sentence_and_leave_nothing(kind, tmp_path):
    make, words = HOSTILE[kind]
    (tmp_path / "in").mkdir()
    make(tmp_path / "in/data.zip")
    with pytest.raises(UserError, match=words) as caught:
        prepare(settings(tmp_path / "in/data.zip"), 8, tmp_path / "out/prepared")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["data.zip"]


def test_real_photographs_keep_what_they_show(tmp_path):
    """scikit-image's and scikit-learn's samples: each crop is the middle of its photograph, nothing squashed."""
    china, flower = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    photographs = {
        name: Image.fromarray(getattr(data, name)()) for name in ("astronaut", "camera", "chelsea", "coffee")
    }
    photographs |= {"china": china, "flower": flower, "rocket": Image.fromarray(data.rocket())}
    folder = tmp_path / "data"
    folder.mkdir()
    for name, photograph in photographs.items():
        photograph.save(folder / f"{name}.jpg", quality=95)
    dataset = prepare(settings(folder, resolution=256), 32, tmp_path / "out")
    assert len(dataset.items) == len(photographs) and dataset.rejects == ()
    for item in dataset.items:
        whole = photographs[Path(item.source).stem].convert("RGB").resize(item.resized_size, Image.Resampling.LANCZOS)
        left, top = item.crop
        expected = whole.crop((left, top, left + item.size[0], top + item.size[1])).reduce(4)
        with Image.open(dataset.folder / item.image) as image:
            difference = np.abs(np.asarray(image.reduce(4), dtype=float) - np.asarray(expected))
        assert difference.mean() < 4  # a shift by four pixels makes it 9 and more
        assert all("cut away" in note for note in item.notes)
    findings = examine(dataset)
    assert findings.near_duplicates == () and findings.warnings == ()
