"""Every Triton kernel, run by Triton's interpreter, against a float64 reference; and the interpreter itself."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed here")

#: Families of cases and how many each has at least, so that none can go missing unseen.
FAMILIES = {"few_rows": 69, "many_rows": 80, "epilogues": 38, "rows": 37, "both_quantized": 160}


def interpreted(script: str, *arguments: str) -> str:
    """The output of a script of the support folder, in a process of its own whose kernels are interpreted."""
    paths = [str(SUPPORT), *(p for p in sys.path if p)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-P", str(SUPPORT / script), *arguments] if sys.version_info >= (3, 11) else [
        sys.executable, str(SUPPORT / script), *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_agree_with_float64(family: str) -> None:
    cases = [json.loads(line) for line in interpreted("triton_cases.py", family).splitlines()]
    wrong = [f"{name}: {found:.2e}, allowed {bound:.0e}" for name, found, bound in cases if not found <= bound]
    assert not wrong, "\n".join(wrong)
    assert len(cases) >= FAMILIES[family]


def test_the_interpreter_is_exact() -> None:
    checks = json.loads(interpreted("triton_interpreter_checks.py"))
    assert len(checks) >= 14
    assert all(checks.values()), [name for name, held in checks.items() if not held]
