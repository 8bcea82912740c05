"""Unpacking an archive of weights, which may come from anybody.

Every member's name, kind and size is checked before a byte is written, and only safetensors, JSON and the like are let
in: a pickle runs code when it is read.
"""

from __future__ import annotations

import gzip
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

from preprocessing.errors import UserError

Wanted = Callable[[str], bool]
_SAFE_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}/){0,3}[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")
# .pti is cog-sdxl's name for a .safetensors file of embeddings, and is read as one
_SUFFIXES = frozenset({".safetensors", ".pti", ".json", ".jsonl", ".yaml", ".html", ".md", ".png"})
_PICKLES = frozenset({".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"})
_LONG_HEADERS = frozenset(
    {
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    }
)
_LONG_HEADER_BYTES = 64 * 1024
_LONGEST_END = 2**20  # bytes of zeros that close a tar; the usual blocking makes them 1 to 10 KiB
# What tarfile and gzip raise on bytes that are no archive, or not all of one.
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, RecursionError, ValueError)


@dataclass(frozen=True)
class Limits:
    """How much an archive may hold."""

    members: int = 2000
    total_bytes: int = 16 * 2**30
    other_bytes: int = 64 * 2**20  # of one member that is not .safetensors
    ratio: int = 100  # of unpacked to packed bytes, once more than `free_bytes` come out
    free_bytes: int = 64 * 2**20


LIMITS = Limits()


class _Header(tarfile.TarInfo):
    """A member's header, refused where it would make tarfile read an endless name into memory."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _LONG_HEADERS and not 0 <= header.size <= _LONG_HEADER_BYTES:
            # Not a tarfile.HeaderError, which tarfile takes for the end of the archive.
            raise ValueError(f"a header of {header.size} bytes")
        return header


def unpack(archive: Path, folder: Path, marker: str, limits: Limits, foreign: Wanted | None) -> None:
    """Write the members of a tar or tar.gz into `folder`; with `foreign` those alone that it wants, where the archive
    has no member `marker`. UserError for an archive that holds anything else, or is damaged; nothing is written then.
    """
    with archive.open("rb") as file:
        packed_with_gzip = file.read(2) == b"\x1f\x8b"
    try:
        with tarfile.open(archive, "r:gz" if packed_with_gzip else "r:", tarinfo=_Header) as tar:
            members = _checked(tar, archive, marker, limits, foreign)
            for name, member in members.items():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with tar.extractfile(member) as source, target.open("xb") as out:
                    shutil.copyfileobj(source, out)
    except _DAMAGE as error:
        _refuse(archive, f"is not a whole tar or tar.gz ({error})")


def _checked(
    tar: tarfile.TarFile, archive: Path, marker: str, limits: Limits, foreign: Wanted | None
) -> dict[str, tarfile.TarInfo]:
    """The regular files of `tar` by name, every one of them allowed. Nothing is unpacked yet."""
    members: dict[str, tarfile.TarInfo] = {}
    taken: set[str] = set()  # in lower case: some file systems do not tell the cases apart
    faults: list[str] = []
    total, packed = 0, archive.stat().st_size
    for count, member in enumerate(tar, start=1):
        if count > limits.members:
            _refuse(archive, f"holds more than {limits.members} members")
        if member.isdir():
            continue  # folders are made for the files in them
        name = member.name.removeprefix("./")
        fault = fault_of(name, member, limits)
        if not fault and name.lower() in taken:
            fault = "twice"
        if fault:
            faults.append(f"holds {member.name[:100]!r}, {fault}")
            if foreign is None or member.size < 0:
                _refuse(archive, faults[0])
        else:
            taken.add(name.lower())
            members[name] = member
        # Before the next header is looked for, since that unpacks this member.
        total += member.size
        if total > limits.total_bytes:
            _refuse(archive, f"would unpack to more than {limits.total_bytes} bytes")
        if total > max(limits.free_bytes, limits.ratio * packed):
            _refuse(archive, f"would unpack to more than {limits.ratio} times its size")
    # tarfile takes a bad header for the end, and gzip compares its checksum only where everything has been read.
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(_LONGEST_END)
    if not tarfile.BLOCKSIZE <= len(end) < _LONGEST_END or any(end):
        _refuse(archive, "is damaged or cut short")
    if any(parent.as_posix().lower() in taken for name in members for parent in PurePosixPath(name).parents):
        _refuse(archive, "holds a name both as a file and as a folder")
    if marker in members:
        if faults:
            _refuse(archive, faults[0])
        return members
    if foreign is None:
        _refuse(archive, f"has no {marker}")
    members = {name: member for name, member in members.items() if foreign(name)}
    if not members:
        _refuse(archive, f"{faults[0]}, and no weights" if faults else "holds no weights")
    return members


def fault_of(name: str, member: tarfile.TarInfo, limits: Limits) -> str | None:
    """Why a member of this name may not be in an archive of weights; None where it may."""
    return _name_fault(name) or _size_fault(member, limits)


def _name_fault(name: str) -> str | None:
    if not _SAFE_NAME.fullmatch(name):
        return "not a plain relative name"
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in _PICKLES:
        return "a pickle, which could run code and is never read"
    if suffix not in _SUFFIXES:
        return "which is no part of an archive of weights"
    return None


def _size_fault(member: tarfile.TarInfo, limits: Limits) -> str | None:
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        return "not a regular file"
    most = limits.total_bytes if member.name.endswith(".safetensors") else limits.other_bytes
    if not 0 <= member.size <= most:
        return f"which has {member.size} bytes where at most {most} are allowed"
    return None


def _refuse(archive: Path, reason: str) -> NoReturn:
    raise UserError(f"{archive} {reason}; give the trained_model.tar that train.py wrote, or its folder.")
