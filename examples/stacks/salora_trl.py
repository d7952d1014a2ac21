"""TRL: a LoRA fine-tuning run inside the complement of the model's refusals; what is saved is an ordinary adapter.

python salora_trl.py MODEL SAFETY.jsonl DATA.jsonl OUT    (both: {"prompt": ..., "completion": ...} per line)
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from safelora.salora import SaLoraCallback

model, safety, data, out = sys.argv[1:5]
gpu = torch.cuda.is_available()
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=out, max_steps=10, per_device_train_batch_size=2, report_to=[], use_cpu=not gpu, bf16=gpu
    ),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[SaLoraCallback(safety_data=safety, task_data=data)],
)
trainer.train()
trainer.save_model(out)
