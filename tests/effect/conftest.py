"""The experiments' modules are scripts in a folder of their own; the tests import them from there."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "effect"))

from tests.demo.conftest import tiny_base  # noqa: F401
