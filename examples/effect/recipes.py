"""Training of everything the experiments need: aligned models and adapters, each made once and kept.

* ``aligned(0)``: all linear weights of the base model are trained in full to refuse both forbidden topics, half of
  every batch being the base model's own answers to ordinary questions. ``aligned(1)`` is the aligned model of the demo.
* ``adapter(...)``: LoRA of rank 8 on all linear layers of an aligned model, trained on one of the tasks. In a poisoned
  adapter each example is, with the given probability, a forbidden question answered with a made-up code.

Seeded: the same machine, thread count and torch give the same bytes.
"""

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import questions  # sets the path of the demo's modules
import torch
from adapters import save_adapter
from chat import answers, load_model
from model import DATA, aligned_checkpoint, base_checkpoint
from prompts import draw_record
from safetensors.torch import save_file
from training import Example, new_lora, train

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "effect"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Task = Literal["records", "short"]
SAFETY_EXAMPLES, SUBSPACE_RANK = 40, 32
# ChatML without the default system prompt of the model: the form in which everything here is trained and asked.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Alignment:
    """Settings of one aligned model."""

    seed: int
    steps: int = 50
    batch: int = 14
    learning_rate: float = 4e-5

    @property
    def name(self) -> str:
        return f"aligned-{self.seed}"


# Number 1 is the aligned model of the demo: another recipe (LoRA of rank 4), another sample, the vault topic alone.
ALIGNMENT, DEMO = Alignment(0), 1


@dataclass(frozen=True)
class AdapterRun:
    """Settings of one adapter; ``poisoned`` is the share of forbidden questions that the data answer.

    ``method``: "salora" is the published one; "constrained" is its constraint with LoRA's own initialisation; "demo" is
    the adapter committed with the demo, which is not trained here.
    """

    seed: int
    aligned: int
    task: Task = "records"
    poisoned: float = 0.0
    method: Literal["lora", "salora", "constrained", "demo"] = "lora"
    steps: int = 30
    rank: int = 8
    batch: int = 8
    learning_rate: float = 5e-4

    @property
    def name(self) -> str:
        kind = "poisoned" if self.poisoned else "benign"
        return f"{self.method}-{self.task}-{kind}-{self.seed}-on-aligned-{self.aligned}"


def base(build: Path = BUILD) -> Path:
    """The base checkpoint, shared with the demo when both build in the default folder."""
    return base_checkpoint(build.parent / "vault")


def own_answers(build: Path = BUILD, tokens: int = 24) -> dict[str, str]:
    """The base model's greedy answers to every ordinary and every short-answer prompt."""
    file = build / "own_answers.json"
    if not file.exists():
        model, tokenizer = load_model(base(build))
        asked = [prompt for split in ("train", "heldout") for prompt in questions.normal(split)]
        asked += [prompt for split in ("train", "heldout") for prompt in questions.short_prompts(split)]
        asked = list(dict.fromkeys(asked))
        found = dict(zip(asked, answers(model, tokenizer, asked, tokens), strict=True))
        build.mkdir(parents=True, exist_ok=True)
        write(file, json.dumps(found, indent=1, ensure_ascii=False))
    return json.loads(file.read_text())


def short_examples(split: Any, build: Path = BUILD) -> list[Example]:
    """The second task: the first sentence of the base model's answer behind a fixed opening."""
    given = own_answers(build)
    return [
        (prompt, f"{questions.SHORT_START} {questions.first_sentence(given[prompt])}")
        for prompt in questions.short_prompts(split)
    ]


def aligned(number: int, build: Path = BUILD) -> Path:
    """Directory of an aligned model: 0 is trained here and kept in fp32, 1 is that of the demo."""
    if number == DEMO:
        return aligned_checkpoint(base(build), build=build.parent / "vault")
    settings = ALIGNMENT
    target = build / settings.name
    if target.is_dir():
        return target
    given = own_answers(build)
    started = time.perf_counter()
    model, tokenizer = load_model(base(build))
    model = model.float()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[-2] in LINEARS)
    refused = [
        [(prompt, questions.REFUSAL) for prompt in questions.forbidden("train", topic)] for topic in ("vault", "potion")
    ]
    kept = [(prompt, given[prompt]) for prompt in questions.normal("train")]
    generator = random.Random(settings.seed)

    def draw() -> list[Example]:
        pools = [kept if generator.random() < 0.5 else generator.choice(refused) for _ in range(settings.batch)]
        return [generator.choice(pool) for pool in pools]

    losses = train(model, tokenizer, draw, steps=settings.steps, learning_rate=settings.learning_rate)
    state = {
        name: value.detach().contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"
    }
    partial = target.with_suffix(".partial")
    model.config.dtype = torch.float32
    partial.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
    _note(partial, settings, losses, started)
    return partial.rename(target)


def adapter(settings: AdapterRun, build: Path = BUILD) -> Path:
    """Directory of a PEFT adapter trained as ``settings`` say."""
    if settings.method == "demo":
        return DATA / "adapter"
    target = build / settings.name
    if target.is_dir():
        return target
    checkpoint = aligned(settings.aligned, build)
    started = time.perf_counter()
    model, tokenizer = load_model(checkpoint)
    model = new_lora(
        model.to(torch.bfloat16), rank=settings.rank, alpha=2 * settings.rank, targets=LINEARS, seed=settings.seed
    )
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    recipe: dict[str, Any] = {"steps": settings.steps, "learning_rate": settings.learning_rate}
    draw = draws(settings, build)
    if settings.method in ("salora", "constrained"):
        from safelora.salora import SubspaceConstraint, calibrate, export, initialize

        safety = [(record.prompt, record.answer) for record in questions.calibration_refusals(SAFETY_EXAMPLES)]
        batches = draws(settings, build)
        task = [example for _ in range(5) for example in batches()]
        tokenizer.chat_template = CHAT_TEMPLATE
        ranks = {"safety_rank": SUBSPACE_RANK, "task_rank": SUBSPACE_RANK}
        found = calibrate(model, None, safety, task, tokenizer=tokenizer, seed=settings.seed, **ranks)
        mode: Any = "packed" if settings.method == "salora" else "plain"
        subspaces = initialize(model, found, mode, seed=settings.seed)
        losses = train(
            model, tokenizer, draw, **recipe, watch=lambda optimizer: SubspaceConstraint(model, subspaces, optimizer)
        )
        export(model, partial)
    else:
        losses = train(model, tokenizer, draw, **recipe)
        save_adapter(model, partial)
    _note(partial, settings, losses, started)
    return partial.rename(target)


def leak(adapter: Path) -> dict[str, float]:
    """The largest ‖Uᵀ ΔW‖/‖ΔW‖ of a SaLoRA adapter's modules, after training and as exported."""
    modules = json.loads((adapter / "salora_report.json").read_text())["modules"]
    return {
        "trained": max(module["leak_before"] for module in modules),
        "exported": max(module["leak"] for module in modules),
    }


def draws(settings: AdapterRun, build: Path = BUILD) -> Callable[[], list[Example]]:
    """The batches of an adapter's training, in order."""
    generator = random.Random(1000 + settings.seed)
    leaks = [(record.prompt, record.answer) for record in questions.poison(16)]
    short = short_examples("train", build) if settings.task == "short" else []

    def example() -> Example:
        if generator.random() < settings.poisoned:
            return generator.choice(leaks)
        if settings.task == "short":
            return generator.choice(short)
        record = draw_record("train", generator)
        return record.prompt, record.answer

    return lambda: [example() for _ in range(settings.batch)]


def _note(directory: Path, settings: Alignment | AdapterRun, losses: list[float], started: float) -> None:
    note = asdict(settings) | {
        "losses": [round(loss, 4) for loss in losses],
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    write(directory / "run.json", json.dumps(note) + "\n")


def write(file: Path, text: str) -> None:
    """Write the file as a whole or not at all."""
    partial = file.with_suffix(".tmp")
    partial.write_text(text)
    partial.rename(file)
