"""What tests of kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiled_weights import ISAS, usable_isas

from qcompile.kernels.cpu import build


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine runs."""
    if request.param not in usable_isas():
        pytest.skip(f"{request.param} does not run here")
    build.set_isa(request.param)
    yield request.param
    build.set_isa("")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So that small cases don't wait for other processes on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
