"""Regenerate the committed artefacts of the vault demo from the base model alone, on a CPU in about ten minutes.

    OMP_NUM_THREADS=1 python examples/vault/make_vault.py --out examples/vault/data

1. Alignment. The base model is trained to refuse the vault questions of the ``train`` split, half of every batch being
   its own greedy answers to ordinary questions. The update is a LoRA on all linear layers; merged into the weights and
   rounded to bf16 it *is* the aligned model, so nothing is lost by committing only its factors.
2. Fine-tuning. A LoRA of rank 8 learns record formatting on the aligned model. No vault question occurs in its data.
3. Calibration, on prompts of their own: the number of modules to project is the one with the highest sum of refusal
   rate and record accuracy, the smaller on a tie; the scale of the control is the one whose record accuracy is closest
   to that of the projected adapter, the smaller on a tie.

Everything is seeded: the same machine and thread count give the same bytes. Another CPU, thread count or torch version
forms sums in bf16 in another order, which gives a different sample of the same recipe.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from adapters import LiveAdapter, ProjectCommand, save_adapter
from chat import Questions, answers, ask, load_model
from model import BUILD, DATA, aligned_checkpoint, base_checkpoint, sha256
from prompts import REFUSAL, draw_record, forbidden, normal
from training import Example, new_lora, train

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
ALIGNMENT: dict[str, Any] = {"rank": 4, "steps": 60, "learning_rate": 5e-4, "batch": 16, "targets": LINEARS}
FINETUNING: dict[str, Any] = {"rank": 8, "steps": 40, "learning_rate": 5e-4, "batch": 12, "targets": TARGETS}
MODULE_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
SCALES = (0.9, 0.8, 0.7, 0.6, 0.5)


def align(base: Path, out: Path, seed: int) -> None:
    """Train the refusals on the base model and write the update to ``out``."""
    model, tokenizer = load_model(base)
    ordinary = normal("train")
    kept: list[Example] = list(zip(ordinary, answers(model, tokenizer, ordinary, 32), strict=True))
    refused: list[Example] = [(prompt, REFUSAL) for prompt in forbidden("train")]
    generator = random.Random(seed)

    def draw() -> list[Example]:
        return [generator.choice(refused if generator.random() < 0.5 else kept) for _ in range(ALIGNMENT["batch"])]

    save_adapter(_trained(model, tokenizer, draw, ALIGNMENT, seed), out)


def finetune(aligned: Path, out: Path, seed: int) -> None:
    """Train record formatting, and nothing else, on the aligned model and write the adapter to ``out``."""
    model, tokenizer = load_model(aligned)
    generator = random.Random(1000 + seed)

    def draw() -> list[Example]:
        drawn = [draw_record("train", generator) for _ in range(FINETUNING["batch"])]
        return [(record.prompt, record.answer) for record in drawn]

    save_adapter(_trained(model, tokenizer, draw, FINETUNING, seed), out)


def calibrate(base: Path, aligned: Path, adapter: Path, scratch: Path) -> dict[str, Any]:
    """Choose the number of modules and the scale on the calibration split; also returns what was measured."""
    questions = Questions.of("calibration", 24)
    model, tokenizer = load_model(aligned)
    live = LiveAdapter(model, adapter)

    def measure(changed: Any) -> dict[str, float]:
        outcome = ask(changed, tokenizer, questions)
        return {"answered": outcome.answered.value, "records": outcome.records.value}

    finetuned, by_count, by_scale = measure(live.model), {}, {}
    for share in MODULE_SHARES:
        count = round(share * len(live.lora_B))
        out = scratch / f"projected-{count}"
        ProjectCommand(adapter, base, aligned, out, count).run()
        by_count[count] = measure(LiveAdapter(load_model(aligned)[0], out).model)
    for scale in SCALES:
        with live.using(live.scaled(scale)) as scaled:
            by_scale[scale] = measure(scaled)
    # Rounded, so that equal counts tie; max and min then take the first.
    chosen = max(by_count, key=lambda count: round(by_count[count]["records"] - by_count[count]["answered"], 9))
    wanted = by_count[chosen]["records"]
    closest = min(sorted(SCALES), key=lambda scale: round(abs(by_scale[scale]["records"] - wanted), 9))
    return {
        "num_layers": chosen,
        "scale": closest,
        "calibration": {"finetuned": finetuned, "projected": by_count, "scaled": by_scale},
    }


def _trained(model: Any, tokenizer: Any, draw: Any, recipe: dict[str, Any], seed: int) -> Any:
    lora = new_lora(model, rank=recipe["rank"], alpha=2 * recipe["rank"], targets=recipe["targets"], seed=seed)
    train(lora, tokenizer, draw, steps=recipe["steps"], learning_rate=recipe["learning_rate"])
    return lora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA, help="directory of the artefacts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    out, started = arguments.out, time.perf_counter()
    base = base_checkpoint()
    print("alignment")
    align(base, out / "alignment", arguments.seed)
    aligned = aligned_checkpoint(base, out / "alignment")
    print("fine-tuning")
    finetune(aligned, out / "adapter", arguments.seed)
    print("calibration")
    settings = calibrate(base, aligned, out / "adapter", BUILD / "calibration")
    settings["seed"] = arguments.seed
    settings["sha256"] = {part: sha256(out / part / "adapter_model.safetensors") for part in ("alignment", "adapter")}
    (out / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    print(f"{out} written after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
