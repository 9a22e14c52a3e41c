"""A quantizing compiler for PyTorch."""

from __future__ import annotations

from qcompile.kernels import *  # noqa
