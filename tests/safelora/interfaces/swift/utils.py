from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType


def import_external_file(file_path: str) -> ModuleType:
    """As --external_plugins does it: by the bare name of the file, with its directory first on the path."""
    path = Path(file_path).expanduser().absolute()
    sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.name.split(".", 1)[0])
