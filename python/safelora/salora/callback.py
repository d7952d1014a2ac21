"""SaLoRA in a Hugging Face Trainer or TRL run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..errors import SafeLoraError
from ..peft_model import chosen_adapter, unwrap
from .calibration import calibrate
from .constraint import SubspaceConstraint
from .exporting import live_report
from .initialization import attached, initialize, pack_residual
from .subspaces import SUBSPACE_FILE, Mode, Subspaces


class SaLoraCallback(TrainerCallback):  # type: ignore[misc]
    """Calibrates where it has to, initialises the adapter, and holds it in the complement while it is trained.

    Pass it in ``callbacks=[...]`` when the Trainer is made: the adapter is initialised at the end of that, before there
    is an optimizer. ``SFTTrainer(peft_config=...)`` and a PeftModel work alike. What the Trainer saves is an ordinary
    adapter of the original model; ``checkpoint-N/salora_subspace.safetensors`` goes with each checkpoint. With mode
    "residual" that holds from the end of training on; its checkpoints belong to W' until
    :func:`safelora.salora.export_checkpoint` has been there. A resumed run is made as the first one was, and gives the
    bits that the uninterrupted one would have given.

    Args:
        subspaces: from :func:`safelora.salora.calibrate`, or the path of their file; None to calibrate here.
        safety_data, task_data: the data to calibrate with, in place of `subspaces`.
        mode: as for :func:`safelora.salora.initialize`; by default "packed" with task subspaces, else "plain". An
            adapter that was initialised already is taken as it is.
        adapter_name: the adapter; by default the active one.
        seed: of calibration and initialisation.
        calibration: further options of :func:`safelora.salora.calibrate`, `config` excepted.

    Attributes:
        subspaces, constraint: what is in force, once training has begun.
        report: the :class:`safelora.salora.ExportReport` with each module's leak, once training has ended; also written
            to `output_dir`/salora_report.json, and into the model card there.
    """

    def __init__(
        self,
        subspaces: Subspaces | str | os.PathLike[str] | None = None,
        *,
        safety_data: Any = None,
        task_data: Any = None,
        mode: Mode | None = None,
        adapter_name: str | None = None,
        seed: int = 0,
        **calibration: Any,
    ) -> None:
        if (subspaces is None) == (safety_data is None):
            raise SafeLoraError("give either subspaces, or safety_data to calibrate with.")
        if subspaces is not None and (task_data is not None or calibration):
            given = ", ".join(["task_data"] * (task_data is not None) + list(calibration))
            raise SafeLoraError(f"{given}: the subspaces are there already; nothing is calibrated.")
        if isinstance(subspaces, (str, os.PathLike)):
            subspaces = Subspaces.load(subspaces)
        self.subspaces: Subspaces | None = subspaces
        self.constraint: SubspaceConstraint | None = None
        self.report: Any = None
        self._data = (safety_data, task_data)
        self._mode = mode
        self._adapter = adapter_name
        self._seed = seed
        self._calibration = calibration

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        self.subspaces = self._initialize(args, model, processing_class)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        _, inner = unwrap(model)
        known = attached(inner, chosen_adapter(inner, self._adapter))
        if known is None:
            if (self._mode or "plain") != "plain":
                raise SafeLoraError(
                    f"mode {self._mode!r} replaces parameters, so it has to come before the optimizer: pass the "
                    "callback in callbacks=[...] when the Trainer is made, or call initialize yourself."
                )
            self._mode = "plain"
            known = self.subspaces = self._initialize(args, model, kwargs.get("processing_class"))
        kept = Path(args.output_dir) / f"checkpoint-{state.global_step}" / SUBSPACE_FILE
        if state.global_step and kept.is_file() and Subspaces.load(kept).fingerprint() != known.fingerprint():
            raise SafeLoraError(
                f"{kept} holds other subspaces or initial factors than this run: the run it belongs to had other data, "
                "options or seeds, or another machine. Go on with SaLoraCallback(that file)."
            )
        if self.constraint is not None:
            self.constraint.remove()
        self.constraint = SubspaceConstraint(model, self.subspaces or known, optimizer, adapter_name=self._adapter)
        self.subspaces = self.constraint.subspaces

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir() and self.subspaces is not None:
            self.subspaces.save(folder / SUBSPACE_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.constraint is None:  # training never began
            return
        self.constraint.remove()
        inner, adapter = self.constraint.model, self.constraint.adapter
        if self.constraint.subspaces.mode == "residual":
            self.subspaces = pack_residual(inner, adapter)
        self.report = live_report(inner, adapter)
        if state.is_world_process_zero:
            os.makedirs(args.output_dir, exist_ok=True)
            self.report.save(args.output_dir)

    def _initialize(self, args: Any, model: Any, tokenizer: Any) -> Subspaces:
        """The adapter's subspaces, initialised with them unless it is already."""
        _, inner = unwrap(model)
        adapter = chosen_adapter(inner, self._adapter)
        known = attached(inner, adapter)
        if known is not None:
            if self._mode not in (None, known.mode):
                raise SafeLoraError(f"the adapter was initialised with mode {known.mode!r}, not {self._mode!r}.")
            return known
        subspaces = self.subspaces
        if subspaces is None:
            safety, task = self._data
            options = {"seed": self._seed, "tokenizer": tokenizer, "distributed": args.world_size > 1}
            subspaces = calibrate(inner, None, safety, task, **{**options, **self._calibration})
        if subspaces.mode is not None:  # those of an earlier run's file, of which only the bases matter
            self._mode = self._mode or subspaces.mode
        mode = self._mode or ("packed" if subspaces.task_bases else "plain")
        return initialize(inner, subspaces, mode, adapter_name=adapter, seed=self._seed)
