"""`run_exp` as LLaMA-Factory's supervised fine-tuning: the caller's callbacks come first, the final save last."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments


class LogCallback(TrainerCallback):
    """Stands for those that LLaMA-Factory appends to the caller's list."""


def run_exp(args: dict[str, Any] | None = None, callbacks: list[TrainerCallback] | None = None) -> None:
    assert isinstance(args, dict)
    callbacks = callbacks or []
    callbacks.append(LogCallback())
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args["model_name_or_path"])
    assert args["finetuning_type"] == "lora"
    model = get_peft_model(model, LoraConfig(r=args["lora_rank"], target_modules=args["lora_target"].split(",")))
    tokens = torch.randint(3, 29, (8, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        args["output_dir"], max_steps=args["max_steps"], learning_rate=args["learning_rate"], report_to=[], use_cpu=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=None)
    trainer.save_model()
    trainer.save_state()
