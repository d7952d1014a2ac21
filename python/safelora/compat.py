"""The interface of the authors' published code (IBM/SafeLoRA), on this package's arithmetic."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from .errors import SafeLoraError
from .live import LiveReport, apply_safe_lora


@dataclass
class SafeLoRAConfig:
    """The authors' options.

    base_model_path, aligned_model_path: the models before and after alignment; both are needed.
    select_layers_type: "number" projects the `num_proj_layers` modules with the lowest cosines, "threshold" those whose
        cosine is at most `threshold`. Cosines are rounded to five decimals, so that ties select more.
    devices: accepted and not used: the computation takes place where the adapter is.
    """

    base_model_path: str | None = None
    aligned_model_path: str | None = None
    select_layers_type: str = "number"
    threshold: float = 0.5
    num_proj_layers: int = 10
    devices: str = "cuda"

    def __post_init__(self) -> None:
        _check(self)


class SafeLoRA:
    """Projects the "default" adapter of `peft_model` in place; `config` is a :class:`SafeLoRAConfig`, or its class.

    The decisions are those of the authors' code wherever that pairs weights and adapters rightly. Not kept are its
    faults: modules are paired by name; rank patterns, biases, Conv1D, subsets of layers, regular expressions and
    r = d_out work; V = 0 leaves a module alone; neither model is loaded whole, and no d_out × d_out matrix is formed.

    Attributes:
        model, peft_model: the projected model (the one that was given).
        model_ori: a copy of the model as it was, made when it is asked for.
        peft_config, config: the adapter's and the given configuration.
        report: the :class:`safelora.LiveReport`, with `undo()`.

    Raises:
        SafeLoraError: a ValueError, for what the configuration lacks, and as :func:`safelora.apply_safe_lora`.
    """

    def __init__(self, peft_model: Any, config: Any) -> None:
        _check(config)
        if "default" not in peft_model.peft_config:
            raise SafeLoraError(f"the model has no adapter 'default', only {', '.join(peft_model.peft_config)}.")
        by_number = config.select_layers_type == "number"
        self.config = config
        self.peft_model = peft_model
        self.peft_config = peft_model.peft_config["default"]
        self.report: LiveReport = apply_safe_lora(
            peft_model,
            config.base_model_path,
            aligned=config.aligned_model_path,
            threshold=None if by_number else config.threshold,
            num_layers=config.num_proj_layers if by_number else None,
            rule="authors",
            adapter_name="default",
        )
        self.model = peft_model
        pdst = "undefined" if self.report.pdst is None else f"{self.report.pdst:.4f}"
        print(f"{self.report.summary()} Pdst {pdst} (above 0.8 is good).")

    @property
    def model_ori(self) -> Any:
        return copy.deepcopy(self.peft_model, self.report.originals())


def _check(config: Any) -> None:
    for name in ("base_model_path", "aligned_model_path"):
        if getattr(config, name, None) is None:
            raise SafeLoraError(f"{name} is not set; both the base and the aligned model are needed.")
    if config.select_layers_type not in ("threshold", "number"):
        raise SafeLoraError(f"select_layers_type is {config.select_layers_type!r}, expected 'threshold' or 'number'.")
