"""Archives of every kind come out the same; whatever is hostile, damaged or too much ends in one clear sentence."""

import gzip
import io
import os
import random
import stat
import tarfile
import tracemalloc
import unicodedata
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from preprocessing.archive import unpack
from preprocessing.errors import UserError
from preprocessing.limits import Limits

FILES = {"a.png": b"first", "deep/er/b.png": b"second" * 1000, "deep/b.txt": b""}
NOISE = ["__MACOSX/a.png", "._a.png", ".hidden/c.png", "deep/.DS_Store", "Thumbs.db", "deep/desktop.ini"]


def make_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            add(archive, name, content)
    return path


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(content))


def make_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


MAKERS = {
    "zip": make_zip,
    "stored zip": lambda path, files: make_zip(path, files, zipfile.ZIP_STORED),
    "tar": make_tar,
    "tar.gz": lambda path, files: make_tar(path, files, "w:gz"),
    "folder": make_folder,
}
ARCHIVES = [kind for kind in MAKERS if kind != "folder"]


def contents(source: Path, into: Path, limits: Limits = Limits()) -> dict[str, bytes]:  # noqa: B008 - it is frozen
    return {file.name: file.path.read_bytes() for file in unpack(source, into, limits).files}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", ["data", "data.zip", "data.tar", "data.png"])
def test_every_kind_is_told_by_content(tmp_path, kind, name):
    source = MAKERS[kind](tmp_path / name, FILES | dict.fromkeys(NOISE, b"noise"))
    found = unpack(source, tmp_path / "into")
    assert {file.name: file.path.read_bytes() for file in found.files} == FILES
    assert [file.name for file in found.files] == sorted(FILES)
    assert found.rejects == ()


def test_tar_that_ends_in_a_zip_is_a_tar(tmp_path):
    inner = make_zip(tmp_path / "inner.zip", {"x.png": b"inside"}).read_bytes()
    source = make_tar(tmp_path / "data", {"a.png": b"first", "z.zip": inner})
    assert contents(source, tmp_path / "into") == {"a.png": b"first", "z.zip": inner}


def test_self_extracting_zip(tmp_path):
    source = make_zip(tmp_path / "data.zip", FILES)
    source.write_bytes(b"#!/bin/sh\nexit\n" + source.read_bytes())
    assert contents(source, tmp_path / "into") == FILES


def test_old_tar_without_magic(tmp_path):
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.USTAR_FORMAT))
    header[257:265] = bytes(8)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    source = tmp_path / "data"
    source.write_bytes(bytes(header) + bytes(1024))
    assert contents(source, tmp_path / "into") == {"a.png": b""}


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize(
    "name", ["../x.png", "/etc/x.png", "a/../../x.png", "a/..", "C:\\x.png", "..\\x.png", "\\x.png", "__MACOSX/../../x"]
)
def test_names_that_leave_the_archive_are_refused(tmp_path, kind, name):
    source = MAKERS[kind](tmp_path / "data", {"a.png": b"first", name: b"evil"})
    with pytest.raises(UserError, match=r"absolute name|leads out"):
        unpack(source, tmp_path / "into")
    assert {path.name for path in tmp_path.iterdir()} == {"data", "into"}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "special"),
        (tarfile.BLKTYPE, "special"),
        (tarfile.FIFOTYPE, "special"),
        (tarfile.GNUTYPE_SPARSE, "special"),
    ],
)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tar_members_that_are_no_files_are_refused(tmp_path, kind, words, mode):
    with tarfile.open(tmp_path / "data", mode) as archive:
        add(archive, "a.png", b"first")
        add(archive, "x.png", type=kind, linkname="a.png")
    with pytest.raises(UserError, match=f"x.png.*{words}"):
        unpack(tmp_path / "data", tmp_path / "into")


@pytest.mark.parametrize(("kind", "words"), [(stat.S_IFLNK, "a link"), (stat.S_IFBLK, "special")])
def test_zip_members_that_are_no_files_are_refused(tmp_path, kind, words):
    info = zipfile.ZipInfo("x.png")
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "data", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match=words):
        unpack(tmp_path / "data", tmp_path / "into")


def patched_zip(path: Path, local: int, central: int, value: int) -> Path:
    """A zip of one member with the 16-bit field at these offsets of its two headers set."""
    data = bytearray(make_zip(path, {"x.png": b"content" * 10}).read_bytes())
    for start, offset in ((data.index(b"PK\x03\x04"), local), (data.index(b"PK\x01\x02"), central)):
        data[start + offset : start + offset + 2] = value.to_bytes(2, "little")
    path.write_bytes(data)
    return path


def test_encrypted_zip_is_named_so(tmp_path):
    with pytest.raises(UserError, match="encrypted"):
        unpack(patched_zip(tmp_path / "data", 6, 8, 1), tmp_path / "into")


def test_zip_of_an_uncommon_method_is_named_so(tmp_path):
    with pytest.raises(UserError, match="method 9"):
        unpack(patched_zip(tmp_path / "data", 8, 10, 9), tmp_path / "into")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_bombs_are_refused_before_they_go_off(tmp_path, kind):
    source = MAKERS[kind](tmp_path / "data", {"a.png": bytes(4_000_000)})
    assert source.stat().st_size < 10_000
    with pytest.raises(UserError, match="times its size"):
        unpack(source, tmp_path / "into", Limits(ratio_free_bytes=1_000_000))
    assert sum(path.stat().st_size for path in (tmp_path / "into").iterdir()) == 0
    # Well packed is no crime as long as it is small.
    assert contents(source, tmp_path / "again") == {"a.png": bytes(4_000_000)}


def test_many_small_members_add_up_to_a_bomb(tmp_path):
    source = make_tar(tmp_path / "data", {f"{n}.png": bytes(100_000) for n in range(40)}, "w:gz")
    with pytest.raises(UserError, match="times its size"):
        unpack(source, tmp_path / "into", Limits(ratio_free_bytes=1_000_000))
    assert sum(path.stat().st_size for path in (tmp_path / "into").iterdir()) <= 1_000_000


@pytest.mark.parametrize("kind", MAKERS)
def test_limits_on_members_and_bytes(tmp_path, kind):
    source = MAKERS[kind](tmp_path / "data", {f"{n}.png": b"12345678" for n in range(10)})
    assert len(contents(source, tmp_path / "fits", Limits(members=10, total_bytes=80))) == 10
    with pytest.raises(UserError, match="more than 9 files"):
        unpack(source, tmp_path / "members", Limits(members=9))
    with pytest.raises(UserError, match="limit of 0 MiB"):
        unpack(source, tmp_path / "bytes", Limits(total_bytes=79))


def test_ignored_members_count_towards_the_limits(tmp_path):
    source = make_zip(tmp_path / "data", {f".hidden/{n}": b"" for n in range(10)})
    with pytest.raises(UserError, match="more than 9 files"):
        unpack(source, tmp_path / "into", Limits(members=9))


def test_zip_that_lies_about_a_size_yields_no_more_than_it_declares(tmp_path):
    data = bytearray(make_zip(tmp_path / "data", {"x.png": bytes(100_000)}).read_bytes())
    for start, offset in ((data.index(b"PK\x03\x04"), 22), (data.index(b"PK\x01\x02"), 24)):
        data[start + offset : start + offset + 4] = (10).to_bytes(4, "little")
    (tmp_path / "data").write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        unpack(tmp_path / "data", tmp_path / "into")
    assert all(path.stat().st_size <= 10 for path in (tmp_path / "into").iterdir())


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [8 * 1024**3, 64 * 1024**2, -512])
def test_tar_extension_header_of_mad_length_is_not_read(tmp_path, kind, size):
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    with gzip.open(tmp_path / "data", "wb", compresslevel=1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.write(bytes(70 * 1024**2))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="damaged"):
            unpack(tmp_path / "data", tmp_path / "into")
        assert tracemalloc.get_traced_memory()[1] < 16 * 1024**2
    finally:
        tracemalloc.stop()


def test_tar_member_of_negative_size_does_not_lead_in_circles(tmp_path):
    first, info = tarfile.TarInfo("first.png"), tarfile.TarInfo("x.png")
    info.size = -512  # the next header would be this one again
    (tmp_path / "data").write_bytes(first.tobuf() + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match="damaged"):
        unpack(tmp_path / "data", tmp_path / "into")


def test_chained_extension_headers_end_in_an_error(tmp_path):
    info = tarfile.TarInfo("x")
    info.type = tarfile.GNUTYPE_LONGNAME
    info.size = 1
    (tmp_path / "data").write_bytes((info.tobuf(tarfile.GNU_FORMAT) + b"x" + bytes(511)) * 5000)
    with pytest.raises(UserError, match="damaged"):
        unpack(tmp_path / "data", tmp_path / "into")


@pytest.mark.parametrize("kind", ARCHIVES)
def test_cut_off_archives_are_refused_wherever_they_are_cut(tmp_path, kind):
    rng = random.Random(0)
    source = MAKERS[kind](tmp_path / "data", {f"{n}.png": rng.randbytes(700) for n in range(6)})
    whole = source.read_bytes()
    # The last blocks of a tar are padding, and the last bytes of a gzip a checksum that nothing hangs on.
    end = 6 * 1536 if kind == "tar" else len(whole) - 60
    for number, cut in enumerate(range(1, end, 97)):
        source.write_bytes(whole[:cut])
        with pytest.raises(UserError):
            unpack(source, tmp_path / f"into{number}")


def test_tar_cut_between_two_members_is_refused(tmp_path):
    source = make_tar(tmp_path / "data", {"a.png": b"1" * 512, "b.png": b"2" * 512})
    source.write_bytes(source.read_bytes()[:1024])
    with pytest.raises(UserError, match="cut off"):
        unpack(source, tmp_path / "into")


def test_broken_header_in_the_middle_of_a_tar_loses_nothing_silently(tmp_path):
    source = make_tar(tmp_path / "data", {"a.png": b"1" * 512, "b.png": b"2" * 512, "c.png": b"3" * 512})
    data = bytearray(source.read_bytes())
    data[1024 + 148 : 1024 + 156] = b"wrongsum"
    source.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        unpack(source, tmp_path / "into")


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_random_damage_never_ends_in_a_traceback(tmp_path, kind):
    rng = random.Random(kind)
    source = MAKERS[kind](tmp_path / "data", FILES)
    whole = source.read_bytes()
    outcomes = set()
    for number in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3, 30))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        source.write_bytes(data)
        try:
            unpack(source, tmp_path / str(number))
            outcomes.add("unpacked")
        except UserError:
            outcomes.add("refused")
    assert outcomes == {"unpacked", "refused"}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_the_later_of_two_members_of_one_name_counts_and_the_other_is_listed(tmp_path, kind):
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "data", "w") as archive:
            archive.writestr("a.png", "old")
            archive.writestr("./a.png", "new")
    else:
        with tarfile.open(tmp_path / "data", "w") as archive:
            add(archive, "a.png", b"old")
            add(archive, "a.png", b"new")
    found = unpack(tmp_path / "data", tmp_path / "into")
    assert [(file.name, file.path.read_bytes()) for file in found.files] == [("a.png", b"new")]
    assert [reject.source for reject in found.rejects] == ["a.png"]


def test_names_that_differ_by_case_are_two_files(tmp_path):
    files = {"A.png": b"upper", "a.png": b"lower"}
    assert contents(make_zip(tmp_path / "data", files), tmp_path / "into") == files


def test_zip_of_unflagged_utf8_names_as_macos_writes_them(tmp_path):
    decomposed = unicodedata.normalize("NFD", "é.png")
    source = make_zip(tmp_path / "data", {decomposed: b"x"})
    data = bytearray(source.read_bytes())
    for start, offset in ((data.index(b"PK\x03\x04"), 7), (data.index(b"PK\x01\x02"), 9)):
        assert data[start + offset] == 8
        data[start + offset] = 0
    source.write_bytes(data)
    assert list(contents(source, tmp_path / "into")) == [unicodedata.normalize("NFC", "é.png")]


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_names_that_are_no_utf8_can_be_written_down(tmp_path, kind):
    name = os.fsdecode(b"caf\xe9.png")
    found = contents(MAKERS[kind](tmp_path / "data", {name: b"x"}), tmp_path / "into")
    assert list(found) == ["caf\\xe9.png"]


def test_links_and_pipes_in_a_folder_are_listed_and_not_followed(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    folder = make_folder(tmp_path / "data", {"a.png": b"first"})
    (folder / "link.png").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.png")
    found = unpack(folder, tmp_path / "into")
    assert [file.name for file in found.files] == ["a.png"]
    assert [reject.source for reject in found.rejects] == ["link.png", "pipe.png", "up"]


def test_what_is_no_archive_is_named(tmp_path):
    picture = tmp_path / "x.zip"
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    cases = {picture: "single picture", tmp_path / "none": "nothing at"}
    for name, content in {"empty": b"", "text": b"hello", "7z": b"7z\xbc\xaf'\x1c" + bytes(100)}.items():
        (tmp_path / name).write_bytes(content)
        cases[tmp_path / name] = "neither zip, tar nor tar.gz"
    (tmp_path / "gz").write_bytes(gzip.compress(b"just a text"))
    cases[tmp_path / "gz"] = "damaged"
    os.mkfifo(tmp_path / "pipe")
    cases[tmp_path / "pipe"] = "neither a file nor a folder"
    for number, (source, words) in enumerate(cases.items()):
        with pytest.raises(UserError, match=words) as caught:
            unpack(source, tmp_path / f"into{number}")
        assert str(source) in str(caught.value)


@pytest.mark.parametrize("kind", MAKERS)
def test_an_empty_upload_has_no_files(tmp_path, kind):
    (tmp_path / "data").mkdir() if kind == "folder" else None
    assert unpack(MAKERS[kind](tmp_path / "data", {}), tmp_path / "into").files == ()
