"""The input filter on SmolLM2-135M: all 210 linear layers, 40 safety and 32 task prompts of the vault demo.

    python benchmarks/filter_smollm2.py --threads 2

The adapter is random: time does not depend on its values. Wall and processor time; the checkpoints are made on first
use (examples/vault/model.py).
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from pathlib import Path

import torch

from safelora import filter_adapter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "vault"))
from model import aligned_checkpoint, base_checkpoint
from prompts import REFUSAL, forbidden, records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weight", choices=("none", "grad"), nargs="+", default=["none", "grad"])
    arguments = parser.parse_args()
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    aligned = aligned_checkpoint(base_checkpoint())
    tokenizer = AutoTokenizer.from_pretrained(aligned)
    safety = [(prompt, REFUSAL) for prompt in random.Random(7).sample(forbidden("train"), 40)]
    task = [(record.prompt, record.answer) for record in records("train", 32)]
    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    for weight in arguments.weight:
        wall, processor = time.perf_counter(), time.process_time()
        report = filter_adapter(model, safety, task, weight=weight, tokenizer=tokenizer)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{weight}: {len(report.filtered)} modules, wall {wall:.1f} s, processor {processor:.1f} s, "
              f"{report.seconds}, peak of the process {peak:.1f} GiB", flush=True)  # fmt: skip
        report.undo()


if __name__ == "__main__":
    main()
