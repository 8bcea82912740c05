"""Any archive that Hypothesis can think of: nothing is written outside its folder, and no error but a UserError."""

import gzip
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as how
from hypothesis import strategies as st

from preprocessing.archive import unpack
from preprocessing.errors import UserError
from preprocessing.limits import Limits

LIMITS = Limits(members=50, total_bytes=200_000, ratio_free_bytes=50_000)
PARTS = st.sampled_from(
    ("..", ".", "", "a", "b.png", "C:", "~", "con", "é", "\u202e", "x" * 300, "__MACOSX", "a\\b", "\\..", " ")
)
NAMES = st.one_of(
    st.lists(PARTS, min_size=1, max_size=5).map("/".join),
    st.lists(PARTS, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts)),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=40),
)
CONTENTS = st.one_of(st.binary(max_size=300), st.integers(0, 60_000).map(bytes))
KINDS = st.sampled_from(
    (tarfile.REGTYPE,) * 5
    + (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE)
)
MODES = st.sampled_from((0o100644, 0o120777, 0o040755, 0o060600, 0o010644, 0))
DAMAGE = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4)


@st.composite
def zips(draw: st.DrawFn) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content, mode in draw(st.lists(st.tuples(NAMES, CONTENTS, MODES), max_size=6)):
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            info.compress_type = draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)))
            archive.writestr(info, content)
    return file.getvalue()


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    file = io.BytesIO()
    form = draw(st.sampled_from((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
    with tarfile.open(fileobj=file, mode="w", format=form, errors="surrogateescape") as archive:
        for name, content, kind in draw(st.lists(st.tuples(NAMES, CONTENTS, KINDS), max_size=6)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, draw(NAMES)
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            try:
                archive.addfile(info, io.BytesIO(content))
            except ValueError:  # a name too long for this form
                continue
    packed = file.getvalue()
    return gzip.compress(packed) if draw(st.booleans()) else packed


@st.composite
def damaged(draw: st.DrawFn, made: st.SearchStrategy[bytes]) -> bytes:
    content = bytearray(draw(made))
    for place, value in draw(DAMAGE):
        if content:
            content[place % len(content)] = value
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["zip", "tar", "bytes"])
def test_an_archive_never_leaves_its_folder_and_never_ends_in_a_traceback(kind, tmp_path_factory):
    made = {"zip": damaged(zips()), "tar": damaged(tars()), "bytes": st.binary(max_size=2000)}[kind]
    outcomes = set()

    @how(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(made)
    def check(content: bytes) -> None:
        place = tmp_path_factory.mktemp("any")
        (place / "data").write_bytes(content)
        before = set(os.listdir(place))
        try:
            found = unpack(place / "data", place / "into", LIMITS)
        except UserError as error:
            assert str(error).strip() and "\n" not in str(error)
            outcomes.add("refused")
        else:
            outcomes.add("unpacked")
            for file in found.files:
                assert file.path.parent == place / "into" and file.path.is_file() and not file.path.is_symlink()
                assert ".." not in Path(file.name).parts and not Path(file.name).is_absolute()
                file.name.encode()
        assert set(os.listdir(place)) - before <= {"into"}
        inside = list((place / "into").rglob("*")) if (place / "into").exists() else []
        assert all(path.parent == place / "into" and path.is_file() and not path.is_symlink() for path in inside)
        assert sum(path.stat().st_size for path in inside) <= LIMITS.total_bytes

    check()
    assert outcomes == {"refused"} if kind == "bytes" else outcomes == {"refused", "unpacked"}
