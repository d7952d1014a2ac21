"""TRL: a LoRA fine-tuning run whose final adapter is projected before it is saved.

python trl_sft.py MODEL BASE DATA.jsonl OUT    (DATA: {"messages": [...]} or {"text": ...} per line)
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from safelora import SafeLoraCallback

model, base, data, out = sys.argv[1:5]
gpu = torch.cuda.is_available()
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=out, max_steps=10, per_device_train_batch_size=2, report_to=[], use_cpu=not gpu, bf16=gpu
    ),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[SafeLoraCallback(base=base, threshold=0.35)],
)
trainer.train()
trainer.save_model(out)
