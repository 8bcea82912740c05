"""An archive (zip, tar or tar.gz, told by its content and never by its name) or a folder -> the files in it.

Members are written under running numbers, so no name in an archive ever becomes a path on disk. Names are checked all
the same, because an archive with a traversal, a link or a device in it was not made by somebody who packs pictures.
"""

from __future__ import annotations

import errno
import gzip
import os
import re
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from preprocessing.errors import UserError
from preprocessing.limits import LIMITS, MIB, Limits
from preprocessing.pictures import is_picture
from preprocessing.prepared import Reject

CHUNK = MIB
IGNORED_NAMES = {"__macosx", "thumbs.db", "desktop.ini"}
# Members of a shard that its reader would unpack once more, to any size.
PACKED_AGAIN = {".bz2", ".gz", ".lz4", ".npz", ".pth", ".xz", ".zst"}
# What the readers of the standard library raise on damaged input.
DAMAGE = (
    OSError,  # only some of them: see _damage_reported
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    EOFError,
    struct.error,
    ValueError,
    OverflowError,
    NotImplementedError,
    RecursionError,  # tarfile follows chained extension headers by recursion
)


@dataclass(frozen=True)
class SourceFile:
    """A file of the upload: its name there ("/" between folders, Unicode NFC) and where its bytes lie now."""

    name: str
    path: Path


@dataclass(frozen=True)
class Unpacked:
    """Files sorted by name, what was left out, and the names of hidden and system files, which nobody misses."""

    files: tuple[SourceFile, ...]
    rejects: tuple[Reject, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    is_folder: bool
    fault: str | None  # why this kind of member is refused
    open: Callable[[], IO[bytes] | None]


class _Budget:
    """Counts members and bytes against the limits, by declared sizes: neither format yields more than it declares."""

    def __init__(self, source: Path, limits: Limits, packed_bytes: int | None):
        self.source, self.limits, self.packed_bytes = source, limits, packed_bytes
        self.members = self.bytes = 0

    def take(self, size: int) -> None:
        self.members += 1
        self.bytes += size
        limits = self.limits
        if self.members > limits.members:
            raise UserError(f"{self.source} holds more than {limits.members:,} files, which is the limit: split it.")
        if self.bytes > limits.total_bytes:
            raise UserError(
                f"{self.source} holds more than the limit of {limits.total_bytes // MIB:,} MiB: "
                "split it or scale the pictures down."
            )
        if (
            self.packed_bytes is not None
            and self.bytes > limits.ratio_free_bytes
            and self.bytes > limits.ratio * self.packed_bytes
        ):
            raise UserError(
                f"{self.source} unpacks to more than {limits.ratio:g} times its size, as no archive of pictures does: "
                "pack the pictures again."
            )


class _CappedReader:
    """A file for tarfile, which reads an extension header of any declared length in one go: here one chunk at most."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile):
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= CHUNK:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def check_source(source: Path) -> None:
    """Raise UserError unless `source` is a file or a folder that can be read."""
    if not source.exists():
        raise UserError(f"input_images: there is nothing at {source}: give an archive or a folder of pictures.")
    if not (source.is_file() or source.is_dir()):
        raise UserError(f"input_images: {source} is neither a file nor a folder: give an archive or a folder.")
    if not os.access(source, os.R_OK):
        raise UserError(f"input_images: {source} may not be read: change its permissions.")


def unpack(source: Path, into: Path, limits: Limits = LIMITS) -> Unpacked:
    """Unpack `source` (archive or folder) under the folder `into`, which is made; a folder's files stay where they are.

    Raises UserError where nothing is at `source`, where it is no such archive, is encrypted, cut off or damaged, where
    a member's name leaves the archive, a member is neither file nor folder, or a limit is passed.
    """
    check_source(source)
    if source.is_dir():
        return walk(source, limits)
    into.mkdir(parents=True)
    budget = _Budget(source, limits, source.stat().st_size)
    members = {"zip": _zip_members, "tar": _tar_members, "tar.gz": _gzip_members}[_format(source)]
    with _damage_reported(source), closing(members(source)) as found:
        return _extract(source, found, into, budget)


def check_shard(source: Path, limits: Limits = LIMITS) -> None:
    """Raise UserError for a shard (a plain tar whose members are read one by one into memory) that is cut off or
    damaged, or where a member's name leaves it, a member is no file, or is too large. Only headers are read.
    """
    with _damage_reported(source), closing(_tar_members(source)) as members:
        for member in members:
            name = _checked_name(source, member.name)
            packed = "packed by itself" if PurePosixPath(name).suffix.lower() in PACKED_AGAIN else None
            _refuse_faulty(source, name, member.fault or packed)
            if member.size > limits.streamed_bytes:
                most = f"{limits.streamed_bytes // MIB:,} MiB"
                raise UserError(f"{source}: {name[:80]!r} has more than the limit of {most}: leave it out.")


def _refuse_faulty(source: Path, name: str, fault: str | None) -> None:
    if fault:
        raise UserError(f"{source}: {name[:80]!r} is {fault}, which is refused: pack plain picture files.")


def _format(source: Path) -> str:
    with source.open("rb") as file:
        head = file.read(tarfile.BLOCKSIZE)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(b"\x1f\x8b"):
        return "tar.gz"
    if _is_tar_header(head):
        return "tar"
    if is_picture(source):
        raise UserError(f"input_images: {source} is a single picture: put the pictures into a folder or a zip.")
    if zipfile.is_zipfile(source):  # a self-extracting one; tried last, because a tar that ends in a zip passes too
        return "zip"
    raise UserError(
        f"input_images: {source} is neither zip, tar nor tar.gz, whatever its name says: pack the pictures as a zip."
    )


def _is_tar_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.EOFHeaderError:  # a block of zeros: a tar of nothing
        return True
    except tarfile.TarError:
        return False
    return True


@contextmanager
def _damage_reported(source: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        # A gzip file that is none has no errno, and zipfile seeks to before the start; a full disk is no damage.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        detail = str(error) or type(error).__name__
        raise UserError(f"{source} is damaged or was cut off ({detail[:100]}): pack or upload it again.") from error


def _zip_members(source: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(source) as archive:
        for info in archive.infolist():
            name = _zip_name(info)
            is_folder = name.endswith(("/", "\\"))
            yield _Member(name, info.file_size, is_folder, _zip_fault(info), lambda info=info: archive.open(info))


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The member's name; macOS writes UTF-8 without the flag that says so, which zipfile reads as code page 437."""
    if info.flag_bits & 0x800:
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeDecodeError:
        return info.filename


def _zip_fault(info: zipfile.ZipInfo) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "a link"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a device or other special file"
    if info.flag_bits & 0x41:
        return "encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"packed by the uncommon zip method {info.compress_type}"
    return None


def _gzip_members(source: Path) -> Iterator[_Member]:
    with gzip.open(source) as file:
        yield from _members_of_tar(file)


def _tar_members(source: Path) -> Iterator[_Member]:
    with source.open("rb") as file:
        yield from _members_of_tar(file)


def _members_of_tar(file: IO[bytes] | gzip.GzipFile) -> Iterator[_Member]:
    reader = _CappedReader(file)
    with tarfile.open(fileobj=reader, mode="r:", errors="surrogateescape") as archive:
        for info in archive:
            if info.size < 0:
                raise tarfile.ReadError("a member of negative size")
            size = info.size if info.isreg() else 0
            yield _Member(info.name, size, info.isdir(), _tar_fault(info), lambda info=info: archive.extractfile(info))
            archive.members = []  # tarfile remembers every member; one pass needs none of them
        # tarfile takes a broken header for the end of the archive: only a block of zeros is one.
        reader.seek(archive.offset)
        if reader.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end mark")


def _tar_fault(info: tarfile.TarInfo) -> str | None:
    if info.issym() or info.islnk():
        return "a link"
    if info.issparse() or not (info.isreg() or info.isdir()):
        return "a device or other special file"
    return None


def _extract(source: Path, members: Iterator[_Member], into: Path, budget: _Budget) -> Unpacked:
    files: dict[str, SourceFile] = {}
    rejects, ignored = [], []
    for number, member in enumerate(members):
        name = _checked_name(source, member.name)
        _refuse_faulty(source, name, member.fault)
        budget.take(member.size)
        if member.is_folder or not name:
            continue
        if _is_ignored(name):
            ignored.append(name)
            continue
        if name in files:  # as with `tar --append`, the later one counts
            rejects.append(Reject(source=name, reason="the archive holds a later file of the same name"))
        files[name] = SourceFile(name, into / f"{number:06d}")
        _copy(member, files[name].path)
    return Unpacked(tuple(files[name] for name in sorted(files)), tuple(rejects), tuple(sorted(ignored)))


def _copy(member: _Member, path: Path) -> None:
    packed = member.open()
    if packed is None:
        raise tarfile.ReadError(f"no data for {member.name[:80]!r}")
    with packed, path.open("wb") as file:
        while chunk := packed.read(CHUNK):
            file.write(chunk)


def _checked_name(source: Path, raw: str) -> str:
    name = raw.replace("\\", "/")  # some packers on Windows write backslashes
    parts = name.split("/")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        raise UserError(
            f"{source}: {raw[:80]!r} is an absolute name, which is refused: pack a plain folder of pictures."
        )
    if ".." in parts:
        raise UserError(f"{source}: {raw[:80]!r} leads out of the archive: pack a plain folder of pictures.")
    return _shown("/".join(part for part in parts if part not in ("", ".")))


def _shown(name: str) -> str:
    """A name that can be written as UTF-8 and compared: NFC, bytes that are no UTF-8 as escapes."""
    return unicodedata.normalize("NFC", name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))


def _is_ignored(name: str) -> bool:
    return any(part.startswith(".") or part.casefold() in IGNORED_NAMES for part in name.split("/"))


def walk(folder: Path, limits: Limits = LIMITS) -> Unpacked:
    """The files of a folder where they lie; a link or special file in it is listed as left out and never followed.

    Raises UserError where a limit is passed or a subfolder cannot be read.
    """
    files, rejects, ignored = [], [], []
    budget = _Budget(folder, limits, None)
    for root, subfolders, names in os.walk(folder, onerror=_raise):
        passed_over = {name for name in subfolders if _is_ignored(name)}
        subfolders[:] = [name for name in subfolders if name not in passed_over]
        for name in [*names, *subfolders, *passed_over]:
            path = Path(root, name)
            shown = _shown(path.relative_to(folder).as_posix())
            if _is_ignored(name):
                ignored.append(shown)
                continue
            budget.take(path.lstat().st_size)
            if path.is_symlink():
                rejects.append(Reject(source=shown, reason="a link, which is not followed: put the file itself there"))
            elif path.is_file():
                files.append(SourceFile(shown, path))
            elif not path.is_dir():
                rejects.append(Reject(source=shown, reason="neither a file nor a folder"))
    files.sort(key=lambda file: file.name)
    rejects.sort(key=lambda reject: reject.source)
    return Unpacked(tuple(files), tuple(rejects), tuple(sorted(ignored)))


def _raise(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}): change its permissions.") from error
