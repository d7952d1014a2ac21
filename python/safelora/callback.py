"""Safe LoRA at the end of a Hugging Face Trainer or TRL run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .adapter import REPORT_FILE
from .errors import SafeLoraError
from .live import LiveJob, LiveReport, apply_safe_lora, safe_lora_applied
from .peft_model import chosen_adapter, unwrap, whole

SAFE_FOLDER = "safelora"
RAW_FOLDER = "unprojected"


class SafeLoraCallback(TrainerCallback):  # type: ignore[misc]
    """Projects the adapter when training ends, so that what is saved afterwards is safe.

    Everything that can be refused is refused when training begins: a base that does not fit, a variant that is not
    s·B·A. At the end :func:`safelora.apply_safe_lora` changes the model in place (after load_best_model_at_end) and
    the report goes to `output_dir`/safelora_report.json, beside the adapter that `trainer.save_model()` writes.
    Checkpoints stay raw, so that resuming is exact; so do those that `push_to_hub` pushes while training.

    Args:
        base: the model before alignment, as for :func:`safelora.apply_safe_lora`.
        safe_checkpoints: write a projected copy of each checkpoint's adapter to `checkpoint-N`/safelora.
        report_files: further files for the report: .json, .html or .png, by suffix.
        options: as for :func:`safelora.apply_safe_lora`: threshold or num_layers, rule, normalize, adapter_name,
            aligned, allow_projected, local_files_only, revision_base, revision_aligned.

    Attributes:
        report: the :class:`safelora.LiveReport` once training has ended, with `undo()`.

    Where the projection fails at the end, the trained adapter is saved as it is to `output_dir`/unprojected, and the
    error is raised.
    """

    def __init__(
        self,
        base: Any,
        *,
        safe_checkpoints: bool = False,
        report_files: tuple[str | os.PathLike[str], ...] = (),
        **options: Any,
    ) -> None:
        self.base = base
        self.safe_checkpoints = safe_checkpoints
        self.report_files = report_files
        self.options = options
        self.report: LiveReport | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        options = self._options(args)
        with LiveJob(model, options.pop("distributed")) as job:
            job.prepare(self.base, **options)
        if state.is_world_process_zero:
            (Path(args.output_dir) / REPORT_FILE).unlink(missing_ok=True)  # of an earlier run

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.safe_checkpoints:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / SAFE_FOLDER
        with safe_lora_applied(model, self.base, **self._options(args)) as report:
            self._save_adapter(model, folder, state.is_world_process_zero)
            if state.is_world_process_zero:
                report.save(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        try:
            self.report = apply_safe_lora(model, self.base, **self._options(args))
        except Exception as error:
            folder = Path(args.output_dir) / RAW_FOLDER
            self._save_adapter(model, folder, state.is_world_process_zero)
            raise SafeLoraError(f"{error} The adapter as trained, NOT projected, was saved to {folder}.") from error
        if state.is_world_process_zero:
            os.makedirs(args.output_dir, exist_ok=True)
            self.report.save(args.output_dir)
            for path in self.report_files:
                self.report.save(path)

    def _options(self, args: Any) -> dict[str, Any]:
        return {"distributed": args.world_size > 1, **self.options}

    def _save_adapter(self, model: Any, folder: Path, main: bool) -> None:
        """Save the adapter; a collective call where it is sharded."""
        _, model = unwrap(model)
        name = chosen_adapter(model, self.options.get("adapter_name"))
        state = {key: whole(value) if f".{name}" in key else value for key, value in model.state_dict().items()}
        if main:
            model.save_pretrained(folder, state_dict=state, selected_adapters=[name])
