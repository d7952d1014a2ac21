"""ms-swift callback: ``swift sft --external_plugins <this file> --callbacks safelora …``.

Its settings come from the environment, since ms-swift passes none to a callback: SAFELORA_BASE (the model before
alignment) and SAFELORA_THRESHOLD or SAFELORA_NUM_LAYERS.

ms-swift saves checkpoints and nothing after training, and checkpoints stay as trained. The projected adapter is
therefore saved by the callback, to `output_dir`/safelora, with the args.json by which ms-swift knows its model.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from swift.callbacks import callbacks_map

from safelora.callback import SAFE_FOLDER, SafeLoraCallback
from safelora.errors import SafeLoraError

_log = logging.getLogger(__name__)


class SwiftCallback(SafeLoraCallback):
    """:class:`safelora.SafeLoraCallback` that also saves the projected adapter."""

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, model=model, **kwargs)
        folder = Path(args.output_dir) / SAFE_FOLDER
        self._save_adapter(model, folder, state.is_world_process_zero)
        if state.is_world_process_zero and self.report is not None:
            self.report.save(folder)
            if (Path(args.output_dir) / "args.json").is_file():
                shutil.copyfile(Path(args.output_dir) / "args.json", folder / "args.json")
            _log.info("%s The projected adapter is in %s; checkpoints are as trained.", self.report.summary(), folder)


def safelora_callback(args: Any, trainer: Any) -> SwiftCallback:
    """The callback with the settings of the environment. Raises SafeLoraError where they are incomplete."""
    base = os.environ.get("SAFELORA_BASE")
    threshold, count = os.environ.get("SAFELORA_THRESHOLD"), os.environ.get("SAFELORA_NUM_LAYERS")
    if not base or (threshold is None) == (count is None):
        raise SafeLoraError(
            "set SAFELORA_BASE to the model before alignment, and SAFELORA_THRESHOLD or SAFELORA_NUM_LAYERS."
        )
    return SwiftCallback(
        base=base,
        threshold=None if threshold is None else float(threshold),
        num_layers=None if count is None else int(count),
    )


callbacks_map["safelora"] = safelora_callback
