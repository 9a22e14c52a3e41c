"""The launch itself, through NVIDIA's own Python bindings, to a driver that only says what it was asked to do."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qcompile.kernels.cuda import build, linear

STUB = Path(__file__).parents[2] / "support" / "cuda_shim" / "libcuda_stub.c"
CC = shutil.which("gcc") or shutil.which("cc")
HAS_BINDINGS = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None
#: What torch would say of a GPU, and two products: one that is launched twice, and one that the driver refuses.
PROGRAM = """
import contextlib, torch
from qcompile.kernels.cuda import linear

class Stream:
    cuda_stream = 119

torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.current_device = lambda: 0
torch.cuda.current_stream = lambda *device: Stream
torch.cuda.get_device_capability = lambda *device: (8, 0)
x, codes = torch.zeros(3, 256, dtype=torch.float16), torch.zeros(64, 64, dtype=torch.int16)
scale, out = torch.ones(64, 2, dtype=torch.float16), torch.zeros(3, 64, dtype=torch.float16)
print("expect", *(t.data_ptr() for t in (x, codes, scale, out)), flush=True)
for _ in range(2):
    linear.launch(x, codes, scale, None, None, 4, 128, out)
made = linear.plan(x, 64, scale, None, None, 4, 128)
try:
    linear.start(linear.Plan(made.definitions, (999, 1), 32), [x] * 8, (3, 64, 256, 2))
except RuntimeError as error:
    print("refused", error)
"""


@pytest.mark.skipif(not HAS_BINDINGS, reason="needs cuda-bindings")
@pytest.mark.skipif(build.compiler() is None, reason="needs NVRTC or nvcc")
@pytest.mark.skipif(CC is None or sys.platform != "linux", reason="needs a C compiler on Linux")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real driver here")
def test_the_driver_is_asked_for_the_right_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = str(tmp_path / "libcuda.so.1")
    subprocess.run([str(CC), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(STUB), "-o", library, "-ldl"], check=True)
    # NVRTC does not work beside a driver that is none, so the kernel is on the disk before.
    monkeypatch.setenv("QCOMPILE_CACHE_DIR", str(tmp_path))
    x, scale = torch.zeros(3, 256, dtype=torch.float16), torch.ones(64, 2, dtype=torch.float16)
    build.binary(linear.plan(x, 64, scale, None, None, 4, 128).source, 80)
    found = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("LD_LIBRARY_PATH")]))
    environment = {**os.environ, "LD_LIBRARY_PATH": found}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    x_at, codes_at, scale_at, out_at = lines[0][1:]
    # 4 blocks of 16 rows, 2 warps (2 blocks of columns), torch's stream; what is not read points to the result
    arguments = [x_at, codes_at, scale_at, out_at, out_at, out_at, out_at, out_at, "3", "64", "256", "2"]
    assert lines[1] == lines[2] == ["launch", "1", "4", "1", "1", "64", "1", "1", "0", "119", *arguments]
    assert lines[4][0] == "refused" and "could not be launched" in done.stdout
