"""The interpreter's process, and what it must know: which memory a launch may touch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import Tensor

from .interpreted import HERE, pytest_configure, pytest_pyfunc_call

__all__ = ["pytest_configure", "pytest_pyfunc_call"]


@pytest.fixture(autouse=True)
def reachable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the interpreter, a tensor whose address goes into a table may be accessed until the test ends."""
    if not HERE or request.node.get_closest_marker("interpreted") is None:
        yield
        return
    from safelora_kernels.triton import tables

    from . import interp

    def address(tensor: Tensor) -> int:
        interp.reach(tensor)
        return tensor.data_ptr()

    monkeypatch.setattr(tables, "address", address)
    yield
    interp.forget()
