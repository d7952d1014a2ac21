from __future__ import annotations

from typing import Any

import transformers

from .callbacks import callbacks_map


class Trainer(transformers.Trainer):
    """Makes the callbacks that the arguments name before it is a Trainer itself; nothing saves the final model."""

    def __init__(self, *, args: Any, callbacks: list[str], **options: Any) -> None:
        made = [callbacks_map[name](args, self) for name in callbacks]
        super().__init__(args=args, callbacks=made, **options)
