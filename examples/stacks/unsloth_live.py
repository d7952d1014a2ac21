"""Unsloth: project the live model after training. python unsloth_live.py MODEL BASE OUT"""

import sys

from unsloth import FastLanguageModel

from safelora import apply_safe_lora

name, base, out = sys.argv[1:4]
model, tokenizer = FastLanguageModel.from_pretrained(name, max_seq_length=2048, load_in_4bit=False)
model = FastLanguageModel.get_peft_model(model, r=16, target_modules=["q_proj", "v_proj"])

# ... train as usual ...

report = apply_safe_lora(model, base=base, threshold=0.35)
print(report.summary())
model.save_pretrained(out)
report.save(out)  # the report, and the mark by which the adapter is known as projected
