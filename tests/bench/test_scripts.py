"""The scripts run, with whichever peers there are, and leave figures that the page is made of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from benchkit.records import Run

BENCH = Path(__file__).resolve().parents[2] / "bench"
SCRIPTS = sorted(path.name for path in BENCH.glob("*.py"))


def _script(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCH / name), *words], capture_output=True, text=True, check=False)


def test_jobs_are_scripts() -> None:
    import run

    assert {f"{name}.py" for name in run.JOBS} <= set(SCRIPTS)
    assert set(run.QUICK) <= set(run.JOBS) and set(run.AVX2) <= set(run.JOBS)


def test_layers_and_page(tmp_path: Path) -> None:
    figures = tmp_path / "benchmarks"
    words = [
        "--shapes",
        "48x64",
        "--rows",
        "1,3",
        "--schemes",
        "int4g32",
        "--also",
        "int3",
        "--seconds",
        "0.01",
        "--threads",
        "1",
    ]
    done = _script("layers.py", *words, "--json", str(figures / "layers.json"))
    assert done.returncode == 0, done.stderr
    kept = Run.load(figures / "layers.json")
    assert kept.command == "python bench/layers.py " + " ".join(words)
    for m in (1, 3):
        for engine in ("qcompile", "float32 compiled"):
            record = kept.find(engine, shape="48x64", scheme="int4g32", M=m)
            assert record is not None and record.value > 0 and record.unit == "ms"
    assert kept.find("of bandwidth", scheme="int3", M=1) is not None
    done = _script("run.py", "--render", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "One layer, weights from memory" in (tmp_path / "benchmarks.md").read_text()


def test_unknown_names_are_refused() -> None:
    done = _script("run.py", "--only", "layers,leyers")
    assert done.returncode == 1 and "'layers,leyers'" in done.stderr and "leyers is none of" in done.stderr


def test_no_figures(tmp_path: Path) -> None:
    done = _script("run.py", "--render", "--out", str(tmp_path))
    assert done.returncode == 1 and "holds no figures" in done.stderr


@pytest.mark.parametrize("scheme", ["int7", "float", "int4gx"])
def test_unknown_scheme(scheme: str) -> None:
    from layers import parse_scheme

    with pytest.raises(SystemExit, match="give int2, int3, int4, int5, int6 or int8"):
        parse_scheme(scheme)


class _Event:
    """One event as torch's profiler gives it."""

    def __init__(self, name: str, start: int, duration: int, shapes: list[list[int]], dtypes: list[str]) -> None:
        self._values = name, start, duration, shapes, dtypes

    name = property(lambda self: lambda: self._values[0])
    start_ns = property(lambda self: lambda: self._values[1])
    duration_ns = property(lambda self: lambda: self._values[2])
    shapes = property(lambda self: lambda: self._values[3])
    dtypes = property(lambda self: lambda: self._values[4])


def test_profile_is_summed() -> None:
    from token_time import summed

    linear = [[1, 1, 64], [2, 2, 256], [2, 1, 16]]
    types = ["float", "unsigned char", "float"]
    events = [
        _Event("Torch-Compiled Region: 0/0", 0, 1000, [], []),
        *(_Event("qcompile::linear_tiled_forward", 10 + 500 * i, 100 + 100 * i, linear, types) for i in range(2)),
        *(_Event("aten::empty", 20 + 500 * i, 10, [], []) for i in range(2)),  # inside the operator
        *(_Event("graph_0_cpp_fused_add_0", 300 + 500 * i, 30, [], []) for i in range(2)),
    ]
    found = summed(events, 2)
    assert set(found) == {"qcompile::linear_tiled 32 x 64, 4 bits", "Inductor's loops"}
    share = found["qcompile::linear_tiled 32 x 64, 4 bits"]
    assert share.calls == 1 and share.bytes == 64 * 4 + 1024 + 32 * 4
    assert share.seconds == pytest.approx(150e-9)
