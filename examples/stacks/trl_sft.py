"""TRL: a LoRA fine-tuning run that keeps the model's refusals.

python trl_sft.py MODEL DATA.jsonl OUT --base BASE        the adapter is projected before it is saved (Safe LoRA)
python trl_sft.py MODEL DATA.jsonl OUT --safety SAFETY.jsonl    it is trained inside their complement (SaLoRA)

DATA, SAFETY: {"prompt": ..., "completion": ...} per line; DATA also {"messages": [...]} or {"text": ...} with --base.
"""

from argparse import ArgumentParser

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from safelora import SafeLoraCallback
from safelora.salora import SaLoraCallback

parser = ArgumentParser()
for name in ("model", "data", "out"):
    parser.add_argument(name)
method = parser.add_mutually_exclusive_group(required=True)
method.add_argument("--base")
method.add_argument("--safety")
given = parser.parse_args()
gpu = torch.cuda.is_available()
trainer = SFTTrainer(
    model=given.model,
    args=SFTConfig(
        output_dir=given.out, max_steps=10, per_device_train_batch_size=2, report_to=[], use_cpu=not gpu, bf16=gpu
    ),
    train_dataset=load_dataset("json", data_files=given.data, split="train"),
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[
        SafeLoraCallback(base=given.base, threshold=0.35)
        if given.base
        else SaLoraCallback(safety_data=given.safety, task_data=given.data)
    ],
)
trainer.train()
trainer.save_model(given.out)
