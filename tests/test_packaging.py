"""What is installed is what is in the folders: the wheel, a plain install, an editable one, and the entry points."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
FOLDERS = ("qcompile", "passes", "kernels")
#: What a package holds besides Python: kernel sources, what the dump shows in a browser, and the marker for types.
DATA_SUFFIXES = {".cpp", ".h", ".cu", ".metal", ".html", ".css", ".js", ".typed"}

USE = """
import torch, qcompile, qcompile.passes, qcompile.kernels
from qcompile.kernels import QTensor, Scheme
w, x = torch.randn(24, 64), torch.randn(3, 64)
q = QTensor.quantize(w, Scheme.parse("qint8/channel=0/symmetric/float32"))
y = torch.ops.qcompile.linear(x, q.data, q.scale, q.zero, None, str(q.scheme), [24, 64])
error = float((y - x @ w.t()).norm() / (x @ w.t()).norm())
print(qcompile.__file__, qcompile.passes.__file__, qcompile.kernels.__file__, 0 < error < 0.02, sep="\\n")
"""


def _installed_name(path: Path) -> str:
    """Where a file of the checkout stands in the wheel."""
    parts = path.relative_to(ROOT).parts
    return "/".join(parts if parts[0] == "qcompile" else ("qcompile", *parts))


def _files(suffixes: set[str]) -> set[str]:
    return {
        _installed_name(path)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that no build folder is left in the checkout and none of an older build is used."""
    source = tmp_path_factory.mktemp("source")
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        path = ROOT / name
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, source / name)
    target = tmp_path_factory.mktemp("wheel")
    _pip("wheel", str(source), "--no-deps", *_isolation(), "-w", str(target))
    (built,) = target.glob("*.whl")
    return built


def _isolation() -> list[str]:
    """Build with the setuptools at hand where it is new enough: no download, and no index needed."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return []
    return ["--no-build-isolation"] if int(version.split(".")[0]) >= 77 else []


def _pip(*arguments: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def _run(code: str, cwd: Path, **environment: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_the_package_list_is_the_folders() -> None:
    have = {
        _installed_name(path.parent).replace("/", ".")
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert set(SETUPTOOLS["packages"]) == have
    for name in have:
        parts = name.split(".")[1:]
        folder = ROOT.joinpath(*parts) if parts[:1] in (["passes"], ["kernels"]) else ROOT.joinpath(*name.split("."))
        assert (folder / "__init__.py").is_file(), f"{name} has no __init__.py"


def test_the_wheel_holds_every_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = _files({".py"} | DATA_SUFFIXES)
    assert "qcompile/py.typed" in expected and any(name.endswith(".cpp") for name in expected)
    assert names == expected
    assert not any(name.split("/")[0] != "qcompile" for name in names)


def test_the_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    _pip("install", "--no-deps", "--target", str(target), str(wheel))
    # -I would drop PYTHONPATH; an editable install of the checkout comes after it in the search.
    *places, right = _run(USE, elsewhere, PYTHONPATH=str(target))
    assert right == "True" and all(place.startswith(str(target)) for place in places)
    sources = _run("from qcompile.kernels import cpu; print(cpu.__path__[0])", elsewhere, PYTHONPATH=str(target))
    assert any(Path(sources[0]).glob("*.cpp"))


def test_what_is_installed_here_works_from_another_folder(tmp_path: Path) -> None:
    """The editable install that the tests run in (or a plain one, where somebody tests that)."""
    places = _run(USE, tmp_path)
    assert places[-1] == "True" and len(places) == 4


def test_the_checkout_is_no_package_named_kernels(tmp_path: Path) -> None:
    """transformers looks for a package of that name; with the checkout as working directory it must not find ours."""
    code = "import importlib.util as u\ntry:\n import kernels\n print(getattr(kernels, '__file__', None))\n"
    code += "except ImportError: print(None)"
    (here,), (there,) = _run(code, ROOT), _run(code, tmp_path)
    assert here == there and "qcompile" not in here
    assert _run("import transformers; print('fine')", ROOT)[-1] == "fine"


def test_entry_points(tmp_path: Path) -> None:
    """Each names something that is there, and Dynamo's is found without importing qcompile."""
    for group, names in (("torch_dynamo_backends", {"qcompile"}), ("console_scripts", {"qcompile"})):
        found = {
            point.name: point
            for point in importlib.metadata.entry_points(group=group)
            if point.dist is not None and point.dist.name == "qcompile"
        }
        assert set(found) == names
        assert all(callable(point.load()) for point in found.values())
    code = (
        "import sys, torch\n"
        "import torch._dynamo\n"
        "print('qcompile' in torch._dynamo.list_backends(), any(m.startswith('qcompile') for m in sys.modules))"
    )
    assert _run(code, tmp_path)[-1] == "True False"


def test_requirements_are_pinned_to_the_torch_that_is_tested() -> None:
    (torch,) = [line for line in PROJECT["project"]["dependencies"] if line.startswith("torch")]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pinned = next(line.split("torch==")[1] for line in makefile.splitlines() if line.startswith("TORCH ?="))
    major, minor, _ = pinned.split(".")
    assert torch == f"torch>={major}.{minor},<{major}.{int(minor) + 1}"
