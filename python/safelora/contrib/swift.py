"""ms-swift callback: ``swift sft --external_plugins <this file> --callbacks safelora …``.

Its settings come from the environment, since ms-swift passes none to a callback: SAFELORA_BASE (the model before
alignment) and SAFELORA_THRESHOLD or SAFELORA_NUM_LAYERS.
"""

from __future__ import annotations

import os
from typing import Any

from swift.callbacks import callbacks_map

from safelora.callback import SafeLoraCallback
from safelora.errors import SafeLoraError


def safelora_callback(args: Any, trainer: Any) -> SafeLoraCallback:
    """The callback with the settings of the environment. Raises SafeLoraError where they are incomplete."""
    base = os.environ.get("SAFELORA_BASE")
    threshold, count = os.environ.get("SAFELORA_THRESHOLD"), os.environ.get("SAFELORA_NUM_LAYERS")
    if not base or (threshold is None) == (count is None):
        raise SafeLoraError(
            "set SAFELORA_BASE to the model before alignment, and SAFELORA_THRESHOLD or SAFELORA_NUM_LAYERS."
        )
    return SafeLoraCallback(
        base=base,
        threshold=None if threshold is None else float(threshold),
        num_layers=None if count is None else int(count),
    )


callbacks_map["safelora"] = safelora_callback
