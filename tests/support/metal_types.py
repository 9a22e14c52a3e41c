"""Checks the types of a Metal source with clang: device, constant and threadgroup memory are address spaces 1, 2 and 3."""

from __future__ import annotations

from pathlib import Path

_HEADERS = Path(__file__).parent / "metal_shim" / "check"


def problems(source: str) -> list[str]:
    """What clang says of the text, as ``line: message``; empty where it is right. Needs the package ``libclang``."""
    from clang import cindex

    arguments = [
        "-x", "c++", "-std=c++14", "-target", "x86_64-unknown-linux-gnu", "-nostdinc", "-nostdlibinc", "-fsyntax-only",
        f"-isystem{_HEADERS}", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-Wno-unknown-attributes",
        "-Wno-unused-parameter", "-Wno-implicit-int-float-conversion", "-Wno-sign-conversion", "-Wno-unused-function",
    ]  # fmt: skip
    unit = cindex.Index.create().parse("kernel.metal", args=arguments, unsaved_files=[("kernel.metal", source)])
    return [f"{d.location.line}: {d.spelling}" for d in unit.diagnostics if d.severity >= cindex.Diagnostic.Warning]
