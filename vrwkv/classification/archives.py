"""Files in tars and zips, found once, so that each can be read at any time and by any process."""

import io
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from vrwkv.classification.folder import natural_order
from vrwkv.runtime.errors import UserError, first_line
from vrwkv.runtime.images import Packed

ENDINGS = (".tar", ".zip")
ZIP_HEADER = struct.Struct("<4s22xHH")
"""Of a file in a zip: its first bytes, and how long its name and what else is said of it are, which follow."""


@dataclass(frozen=True, slots=True)
class Member(Packed):
    """A file in an archive; those of tars lie there as they are."""

    archive: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """What it holds."""
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def open(self) -> BinaryIO:
        """See `Packed`."""
        return io.BytesIO(self.read())

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


@dataclass(frozen=True, slots=True)
class ZipMember(Member):
    """A file in a zip: `offset` is that of its header, which says where its `size` bytes begin."""

    deflated: bool
    checksum: int

    def read(self) -> bytes:
        """What it holds. Raises OSError where it is damaged."""
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            header = file.read(ZIP_HEADER.size)
            if len(header) < ZIP_HEADER.size or not header.startswith(b"PK\3\4"):
                raise OSError(f"no header at byte {self.offset}")
            file.seek(sum(ZIP_HEADER.unpack(header)[1:]), os.SEEK_CUR)
            content = file.read(self.size)
        try:
            content = zlib.decompress(content, -zlib.MAX_WBITS) if self.deflated else content
        except zlib.error as error:
            raise OSError(first_line(error)) from error
        if zlib.crc32(content) != self.checksum:
            raise OSError("its checksum is not that of its content")
        return content


def members_of(path: str) -> Iterator[Member]:
    """The files in a tar, those of tars within it included, or in a zip, without hidden ones.

    Raises:
        UserError: it cannot be read to its end, or files in it not without what goes before.
    """
    try:
        if path.lower().endswith(".zip"):
            yield from _zip_members(path)
        else:
            with tarfile.open(path, "r:") as tar:
                yield from _tar_members(path, tar, "", 0)
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path[-3:].lower()} {path}: {first_line(error)}") from error


def _zip_members(path: str) -> Iterator[ZipMember]:
    with zipfile.ZipFile(path) as file:
        for info in file.infolist():
            if info.is_dir() or PurePosixPath(info.filename).name.startswith("."):
                continue
            member = ZipMember(
                path,
                info.filename,
                info.header_offset,
                info.compress_size,
                info.compress_type == zipfile.ZIP_DEFLATED,
                info.CRC,
            )
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(f"file {member} is encrypted or compressed by something else than deflate")
            yield member


def _tar_members(path: str, tar: tarfile.TarFile, prefix: str, begin: int) -> Iterator[Member]:
    for member in tar:
        name = PurePosixPath(prefix, member.name)
        if not member.isfile() or name.name.startswith("."):
            continue
        if name.suffix.lower() == ".tar":
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                yield from _tar_members(path, inner, str(name.with_suffix("")), begin + member.offset_data)
        else:
            yield Member(path, str(name), begin + member.offset_data, member.size)
    # tarfile takes a damaged header for the end, without which pictures would be missing silently.
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"damaged or cut off at byte {begin + tar.offset}")


def find_archives(root: str, split: str) -> list[str]:
    """Where the pictures of a split lie in archives: `root` itself, `root/split.tar` or `.zip`, or all of
    `root/split/*.tar` and `*.zip` where there are no folders beside them; empty without any.

    Raises:
        UserError: there are both `root/split.tar` and `root/split.zip`.
    """
    if root.lower().endswith(ENDINGS) and os.path.isfile(root):
        return [root]
    path = Path(root, split)
    found = [f"{path}{ending}" for ending in ENDINGS if os.path.isfile(f"{path}{ending}")]
    if len(found) > 1:
        raise UserError(f"required is one of {' and '.join(found)}, given are both")
    if found or not os.path.isdir(path):
        return found
    with os.scandir(path) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    if any(entry.is_dir() for entry in visible):
        return []
    archives = (entry.path for entry in visible if entry.name.lower().endswith(ENDINGS))
    return sorted(archives, key=natural_order)
