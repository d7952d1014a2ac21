from __future__ import annotations

from typing import Any

callbacks_map: dict[str, Any] = {}
