from __future__ import annotations

from typing import Any

import pytest

from safelora.salora import Subspaces
from tests.safelora.salora.models import model, subspaces


@pytest.fixture(scope="module")
def base() -> Any:
    return model()


@pytest.fixture(scope="module")
def found(base: Any) -> Subspaces:
    return subspaces(base)
