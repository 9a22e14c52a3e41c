"""A cubin's machine code as text, by NVIDIA's disassembler: of the toolkit, or the one that Triton's wheel brings."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path


def disassembler() -> str | None:
    """``nvdisasm``, or None."""
    found = shutil.which("nvdisasm")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(bundled) if bundled.exists() else None
    return found


def instructions(cubin: bytes) -> list[str]:
    """The names of the instructions in order, as ``LDG.E.128.CONSTANT``."""
    tool = disassembler()
    if tool is None:
        raise RuntimeError("no nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    return re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", done.stdout)
