"""Which peers are installed. Those that are not are left out, and a line says so."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings

__all__ = ["PEERS", "available", "versions"]

PEERS = {
    "onnxruntime": "onnxruntime",
    "onnx": "onnx",
    "torchao": "torchao",
    "optimum-quanto": "optimum.quanto",
    "bitsandbytes": "bitsandbytes",
    "llama-cpp-python": "llama_cpp",
}
"""Distribution to the module that it brings."""

_told: set[str] = set()


def available(*names: str) -> bool:
    """Whether all of these distributions are installed; says which is not, once each."""
    missing = [name for name in names if not _found(PEERS[name])]
    for name in missing:
        if name not in _told:
            _told.add(name)
            print(f"skipped: {name} is not installed (pip install 'qcompile[bench]')", flush=True)
    return not missing


def versions() -> dict[str, str]:
    """Distribution to version of the peers that are installed."""
    return {name: importlib.metadata.version(name) for name, module in PEERS.items() if _found(module)}


def _found(module: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package above it
        return False
