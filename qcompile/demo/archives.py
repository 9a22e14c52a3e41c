"""Unpacking what was fetched: member by member, under a limit of bytes, nothing outside the folder.

A wheel or .zip, a .tgz, or a Debian package; never through ``extractall``.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

__all__ = ["unpack"]

_CHUNK = 1 << 20
_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60


def unpack(archive: Path, into: Path, keep: Callable[[str], bool], limit: int) -> list[Path]:
    """Write the regular files of a .whl/.zip, .tgz or .deb whose names ``keep`` accepts below the folder ``into``.

    Names that are absolute, contain ``..`` or leave ``into``, links and devices raise; so does an archive whose kept
    files, as declared or as they turn out, exceed ``limit`` bytes.

    Raises:
        ValueError: for such an archive, or one of another type, or when ``keep`` accepted nothing.
    """
    if archive.suffix in (".whl", ".zip"):
        members = _zip_members(archive)
    elif archive.suffix in (".tgz", ".gz"):
        members = _tar_members(archive)
    elif archive.suffix == ".deb":
        members = _deb_members(archive)
    else:
        raise ValueError(f"{archive.name} is none of .whl, .zip, .tgz, .tar.gz, .deb")
    written: list[Path] = []
    left = limit
    for name, size, opened in members:
        if not keep(name):
            continue
        target = into / _safe(name, archive)
        if opened is None:
            raise ValueError(f"{archive.name} holds {name!r}, which is no regular file")
        if size > left:
            raise ValueError(f"{archive.name} unpacks to more than {limit} bytes: refused at {name!r}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with opened() as source, target.open("wb") as sink:
            left -= _copy(source, sink, left, f"{archive.name}: {name!r}")
        written.append(target)
    if not written:
        raise ValueError(f"{archive.name} holds none of the files that are wanted from it")
    return written


_Member = tuple[str, int, Callable[[], IO[bytes]] | None]


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as bundle:
        for info in bundle.infolist():
            if info.is_dir():
                continue
            # The upper half of external_attr is the Unix mode; 0o120000 marks a symbolic link.
            link = (info.external_attr >> 16) & 0o170000 == 0o120000
            yield info.filename, info.file_size, None if link else partial(bundle.open, info)


def _tar_members(archive: Path) -> Iterator[_Member]:
    with tarfile.open(archive, "r:gz") as bundle:
        yield from _files(bundle)


def _files(bundle: tarfile.TarFile) -> Iterator[_Member]:
    for info in bundle:
        if info.isdir():
            continue
        name = info.name.removeprefix("./")  # as Debian's packages write them
        yield name, info.size, partial(_extracted, bundle, info) if info.isreg() else None


def _deb_members(archive: Path) -> Iterator[_Member]:
    """The files that a Debian package installs: an ar archive, one of whose parts is ``data.tar.xz`` (deb(5))."""
    with archive.open("rb") as file:
        if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
            raise ValueError(f"{archive.name} does not begin as an ar archive, which a Debian package is")
        while header := file.read(_AR_HEADER):
            name, size = header[:16].decode("latin-1").strip().rstrip("/"), header[48:58].strip()
            if len(header) != _AR_HEADER or header[58:] != b"`\n" or not size.isdigit():
                raise ValueError(f"{archive.name} has a damaged header at byte {file.tell() - len(header)}")
            if name.startswith("data.tar"):
                if name not in ("data.tar.xz", "data.tar.gz"):
                    raise ValueError(f"{archive.name} holds {name}; data.tar.xz and data.tar.gz can be read")
                content = io.BytesIO(file.read(int(size)))
                with tarfile.open(fileobj=content, mode="r:*") as bundle:
                    yield from _files(bundle)
                return
            file.seek(int(size) + int(size) % 2, io.SEEK_CUR)  # parts begin at even offsets
    raise ValueError(f"{archive.name} has no part named data.tar.xz or data.tar.gz")


def _extracted(bundle: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = bundle.extractfile(info)
    if file is None:
        raise ValueError(f"{info.name!r} holds no data")
    return file


def _safe(name: str, archive: Path) -> Path:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        raise ValueError(f"{archive.name} holds a file named {name!r}, which could be written outside its folder")
    return Path(*path.parts)


def _copy(source: IO[bytes], sink: IO[bytes], limit: int, what: str) -> int:
    count = 0
    while chunk := source.read(_CHUNK):
        count += len(chunk)
        if count > limit:
            raise ValueError(f"{what} is longer than its archive says: refused")
        sink.write(chunk)
    return count
