"""Axolotl plugin: the adapter that training saves is projected.

In the YAML file::

    plugins:
      - safelora.contrib.axolotl.SafeLoraPlugin
    safelora_base: meta-llama/Llama-2-7b-hf   # the model before alignment
    safelora_threshold: 0.35                  # or safelora_num_layers: 20
"""

from __future__ import annotations

import logging
from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from ..errors import SafeLoraError

_log = logging.getLogger(__name__)


class SafeLoraArgs(BaseModel):  # type: ignore[misc]
    """The plugin's keys in Axolotl's configuration."""

    safelora_base: str | None = None
    safelora_threshold: float | None = None
    safelora_num_layers: int | None = None
    safelora_rule: Literal["strict", "authors"] = "strict"
    safelora_report: str | None = None


class SafeLoraPlugin(BasePlugin):  # type: ignore[misc]
    """Applies Safe LoRA (arXiv 2405.16833) after training, before Axolotl saves the adapter. Checkpoints stay raw."""

    def __init__(self) -> None:
        super().__init__()
        self._done: set[int] = set()

    def get_input_args(self) -> str:
        return f"{__name__}.SafeLoraArgs"

    def pre_model_load(self, cfg: Any) -> None:
        """Refuses an incomplete configuration before anything is loaded or trained."""
        if not cfg.safelora_base:
            raise SafeLoraError("safelora_base is missing: name the model before alignment (directory or repository).")
        if (cfg.safelora_threshold is None) == (cfg.safelora_num_layers is None):
            raise SafeLoraError("give safelora_threshold or safelora_num_layers, and only one of them.")

    def post_train(self, cfg: Any, model: Any) -> None:
        # Axolotl calls this before and again after it saves; projecting twice would shrink the update twice.
        if id(model) in self._done:
            return
        from safelora import apply_safe_lora

        report = apply_safe_lora(
            model,
            base=cfg.safelora_base,
            threshold=cfg.safelora_threshold,
            num_layers=cfg.safelora_num_layers,
            rule=cfg.safelora_rule or "strict",
        )
        self._done.add(id(model))
        _log.info(report.summary())
        if cfg.safelora_report:
            report.save(cfg.safelora_report)
